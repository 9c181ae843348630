"""Calls of a model: its mode, its attention implementation, and the cache that goes from one forward to the next.

transformers 5.24 renamed `past_key_values` and `cache_params` to `cache`, in arguments and in outputs. The old names
warn until 5.40. The functions of this module find the name that a forward accepts and the field that an output
contains, so that no other module spells one.
"""

from __future__ import annotations

import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from ..errors import UnsupportedModelError
from .undo import UndoLog, own_configs, unwrap

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""Names of the cache in transformers, the newest first."""

CHECKPOINTING = "activation_checkpointing"
if not hasattr(PreTrainedModel, f"{CHECKPOINTING}_enable"):  # before transformers 5.24
    CHECKPOINTING = "gradient_checkpointing"

_lock = threading.RLock()  # the collector may end a use within another
_users: Counter[str] = Counter()
"""Users of each attention name. The last one to end removes it from transformers' registries."""


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and restore each module's training flag on exit."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, _ in flags:
        # In evaluation mode, bitsandbytes repacks 4-bit weights for a CPU with AVX512-BF16, and cannot undo that:
        # 0.50.2 then saves and merges other weights.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.training = True
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def without_autocast(model: PreTrainedModel) -> Iterator[None]:
    """Compute in the dtypes of a model, whatever autocast is on around the call."""
    kind = model.device.type if torch.amp.is_autocast_available(model.device.type) else "cpu"
    with torch.autocast("cpu", enabled=False), torch.autocast(kind, enabled=False):
        yield


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


def register_attention(name: str, function: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Register an attention function and its mask function with transformers."""
    with _lock:
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, mask)
        _users[name] += 1


def forget_attention(name: str) -> None:
    """Remove a name from transformers' registries after its last user."""
    with _lock:
        _users[name] -= 1
        if _users[name] <= 0:
            del _users[name]
            AttentionInterface._global_mapping.pop(name, None)
            AttentionMaskInterface._global_mapping.pop(name, None)


def switch_attention(model: PreTrainedModel, name: str, log: UndoLog) -> None:
    """Make a model and its text part run on a registered attention implementation, until the undo log is undone."""
    configs = (model.config, model.config.get_text_config(decoder=True))
    for config in {id(config): config for config in configs}.values():
        log.set(config, "_attn_implementation_internal", name)


@contextmanager
def switched_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Switch a model to another attention implementation, and restore the previous one on exit."""
    log = UndoLog()
    try:
        own_configs(model, log)  # another model may share them
        switch_attention(model, name, log)
        yield
    finally:
        log.undo()


@contextmanager
def replaced_attention(model: PreTrainedModel, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replace the attention of a model inside the context. `name` is for transformers' registries."""
    register_attention(name, function, sdpa_mask)
    try:
        with switched_attention(model, name):
            yield
    finally:
        forget_attention(name)


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """Return the name of the argument that takes the cache; `None` where nothing goes from one forward to the next.

    Decorators of transformers and hooks of accelerate are looked through. The `cache` of XLM and FlauBERT is a `dict`
    of one forward, and counts as none.

    Args:
        forward (`Callable`): forward of a model or of a layer, bound or not.
    """
    parameters = inspect.signature(forward).parameters
    names = (name for name in CACHE_NAMES if name in parameters)
    return next((name for name in names if "dict" not in str(parameters[name].annotation)), None)


def cache_of(output: Any) -> Any:
    """Return the cache that a model's output contains; `None` without one, or from a plain tuple."""
    # asking an output of 5.24 for an old name warns, so the old names are looked up among the fields that it lists
    fields = set(output) if isinstance(output, Mapping) else set()
    return next((output[name] for name in CACHE_NAMES if name in fields), None)


def with_cache(forward: Callable[..., Any], cache: Any) -> dict[str, Any]:
    """Return the keyword arguments that hand a cache to the forward of a model; none for the cache `None`.

    Raises:
        TypeError: the forward takes no cache.
    """
    if cache is None:
        return {}
    name = cache_argument(forward)
    if name is None:
        raise TypeError(f"{getattr(forward, '__qualname__', forward)} takes no cache")
    return {name: cache}
