"""Context managers that temporarily change the mode of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from .ownership import unwrap

CHECKPOINTING = "activation_checkpointing"
if not hasattr(PreTrainedModel, f"{CHECKPOINTING}_enable"):  # before transformers 5.24
    CHECKPOINTING = "gradient_checkpointing"


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and restore each module's training flag on exit."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def outer_weights(model: nn.Module) -> Iterator[None]:
    """Let a model that FSDP2 has sharded together with its PEFT wrapper be called without that, in every process.

    The forward of the wrapper would gather embeddings and head; here they are whole until the end. Layers gather their
    own weights as ever.
    """
    if not isinstance(model, FSDPModule) or unwrap(model) is model:
        yield
        return
    with evaluation_mode(model), torch.no_grad():  # FSDP2 wants its outermost module to run before those inside it
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=unwrap(model).device))
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


@contextmanager
def activation_checkpointing(model: PreTrainedModel) -> Iterator[None]:
    """Recompute activations in the backward pass instead of storing them."""
    if not model.supports_gradient_checkpointing:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not support gradient checkpointing; train without it"
        )
    getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model, f"{CHECKPOINTING}_disable")()
