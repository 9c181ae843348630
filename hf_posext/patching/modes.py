"""Modes of a model, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` inside; afterwards every module trains, or not, as it did before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def activation_checkpointing(model: PreTrainedModel) -> Iterator[None]:
    """Inside, activations are computed again in the backward pass instead of kept.

    Raises:
        UnsupportedModelError: the model's code has no place for it.
    """
    if not model.supports_gradient_checkpointing:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not support gradient checkpointing; train without it"
        )
    # transformers called it gradient checkpointing before, and warns of that name since
    named = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{named}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model, f"{named}_checkpointing_disable")()
