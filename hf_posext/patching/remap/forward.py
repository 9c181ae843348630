"""State of one forward of a patched model, from the hook before it to the hook after it.

No state of a forward is stored on the model, so threads, nested calls, and copies of a model do not interfere. Each
thread has a stack of states. The tensors of the phases also carry their positions, because a gradient checkpoint runs
a layer again after its forward has ended, possibly in another thread.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.utils import logging

from ...errors import EvaluationError, UnsupportedModelError
from ..detect import RotarySite
from ..modes import CHECKPOINTING
from .cache import KeyRecord, find_cache, follow, record_of, seen_for_free
from .positions import Positions, first_axis, joined, leading_padding, order_of
from .remapping import Remapping

ATTENTION = {"sdpa": "posext-sdpa", "eager": "posext-eager"}
"""Registered names of the attention function, by the attention implementation of the unpatched model."""

logger = logging.get_logger(__name__)

_calls = threading.local()
"""Thread-local values: `state` of the innermost forward, and `carried`, the positions that came with a layer's phases.
Not a context variable, because torch.compile cannot trace those."""


class ForwardState:
    """State of one forward.

    Attributes:
        remapping (`Remapping`): remapping of the model.
        parent (`ForwardState`, *optional*): state of the enclosing forward in this thread.
        cache (`Cache`, *optional*): the user's cache.
        record (`KeyRecord`, *optional*): record of the keys in the cache.
        mask (`torch.Tensor` of shape `(batch, keys)`, *optional*): `True` for tokens that are not padding. `None` if
            there is no padding, or if padding is not known.
        own_mask (`bool`): whether the caller passed 4D masks, which may let layers see more than their windows.
        weights (`bool`): whether attention weights are requested.
        paged (`bool`): whether keys are in the pages of continuous batching.
        past (`torch.Tensor`, *optional*): positions of the keys in the cache.
        padding (`torch.Tensor`, *optional*): offset that is subtracted from the model's positions. See
            `leading_padding`.
        slot (`torch.Tensor`, *optional*): slot of the new key, in a compiled step.
        positions (`dict[str, Positions]`): positions requested from the rotary modules, by set of frequencies.
        loose (`set[str]`): sets of frequencies with layers whose cached keys are not rotated.
    """

    def __init__(self, remapping: Remapping, parent: ForwardState | None = None) -> None:
        self.remapping = remapping
        self.parent = parent
        self.backbone: Callable[[], nn.Module | None] = lambda: None
        self.cache: Any = None
        self.record: KeyRecord | None = None
        self.mask: torch.Tensor | None = None
        self.own_mask = False
        self.weights = False
        self.paged = False
        self.past: torch.Tensor | None = None
        self.padding: torch.Tensor | None = None
        self.slot: torch.Tensor | None = None
        self.positions: dict[str, Positions] = {}
        self.loose: set[str] = set()

    def open(self, cache: Any, mask: torch.Tensor | None) -> None:
        """Read the positions of the keys in the cache, and store the padding mask."""
        plan = self.remapping.plan
        if cache is not None:
            self.cache, self.record = cache, record_of(cache)
            if not torch.compiler.is_compiling():
                follow(cache, self.record)
            self.slot = self.record.open_slot(cache, plan)
            if self.slot is None:
                self.past = self.record.open(cache, plan)
            self.padding = self.record.padding
        self.mask = mask

    def close(self, cache: Any) -> None:
        """Store the positions of the keys in the record of the cache that holds them."""
        if self.slot is not None and self.positions:
            assert self.record is not None
            self.record.close_slot(next(iter(self.positions.values())).query_axes)
        elif cache is not None and self.positions:
            record = self.record or KeyRecord()
            at = next(iter(self.positions.values()))
            standing = frozenset(self.positions) - self.loose
            names = standing if self.remapping.rotates_cached_keys else frozenset()
            follow(cache, record)
            if record.padding is not self.padding:
                record.keep_padding(self.padding)
            record.close(cache, self.remapping.plan, at.key_axes, (at.aligned, at.regular), names)
        for at in self.positions.values():
            at.memo.clear()

    def release(self) -> None:
        """Drop tensors, the cache, and everything that refers back to the state."""
        self.positions, self.parent = {}, None
        self.past = self.padding = self.slot = self.cache = self.record = None

    def note(self, site: RotarySite, given: torch.Tensor, tokens: int) -> Positions:
        """Store the positions requested from a rotary module.

        Args:
            site (`RotarySite`): the rotary module.
            given (`torch.Tensor` of shape `(batch or 1, tokens)` or `(axes, batch or 1, tokens)`): positions.
            tokens (`int`): number of tokens in this forward. `given` may be longer, because Qwen4's indexer also
                requests the phases of cached keys.
        """
        at = self._step(site, given) if self.slot is not None else None
        self.positions[site.name] = at = at or self._positions(site, given, tokens)
        return at

    def _step(self, site: RotarySite, given: torch.Tensor) -> Positions | None:
        """Return positions in a compiled step, or `None` if the forward turns out not to be one."""
        assert self.slot is not None and self.record is not None
        if given.shape[-1] != 1 or given.ndim != 2:
            self.past, self.slot = self.record.open(self.cache, self.remapping.plan), None
            return None
        given = self._without_padding(given)
        slots = torch.arange(self.cache.layers[0].max_cache_len, device=given.device)
        keys = (given + slots - self.slot.to(given.device)).clamp(min=0)
        rotated = site.name in self.record.standing[0]
        return Positions(self, site, given, keys, False, True, backward_task(), None, None, self.slot, rotated)

    def _positions(self, site: RotarySite, given: torch.Tensor, tokens: int) -> Positions:
        past = self.past
        if past is not None and given.shape[-1] == past.shape[-1] + tokens:
            given = given[..., -tokens:]  # without the positions of cached keys
        single, axes = given.shape[-1] == 1, given.shape[0] if given.ndim == 3 else None
        if axes is not None:
            given = self._flat(given, single)
        counted = None if single else self._counted(given)
        if past is None and counted is not None:
            self.padding = _padding(given, counted)
        given = self._without_padding(given)
        keys = given if past is None else joined(past, given)
        aligned, regular = self._order(first_axis(keys), single, counted)
        rotated = False
        if single and regular and keys.ndim == 2 and past is not None:
            assert self.record is not None
            names, count = self.record.standing
            rotated = site.name in names and count == past.shape[-1]
        return Positions(self, site, given, keys, aligned, regular, backward_task(), axes, counted, None, rotated)

    def _flat(self, given: torch.Tensor, single: bool) -> torch.Tensor:
        """Return positions (axes, batch, tokens) on one axis if all axes are equal, as they are in text."""
        if torch.compiler.is_compiling() or self.past is not None and self.past.ndim == 3:
            return given
        alike = (given == given[:1]).all()
        if not single or seen_for_free(alike):
            return given[0] if alike else given
        torch._assert_async(alike, "a single token must be at one position, on all axes")
        return given[0]

    def _counted(self, given: torch.Tensor) -> torch.Tensor | None:
        """Return the mask (batch, tokens) of the tokens that are not padding, or `None` if all tokens count.

        Not called for a single token, which is never padding. A decoding step therefore does not read the mask.
        """
        if self.mask is None or self.remapping.delta:
            return None
        first = 0 if self.past is None else self.past.shape[-1]
        count = given.shape[-1]
        if self.mask.shape[-1] < first + count:  # the mask covers the new tokens only
            first = self.mask.shape[-1] - count
        if first < 0:
            return None
        counted = self.mask[:, first : first + count].to(given.device)
        return counted.expand(max(given.shape[-2], counted.shape[0]), -1)

    def _without_padding(self, given: torch.Tensor) -> torch.Tensor:
        """Return positions relative to the first token that is not padding."""
        return given if self.padding is None else (given - self.padding.to(given.device)).clamp(min=0)

    def _order(self, keys: torch.Tensor, single: bool, counted: torch.Tensor | None) -> tuple[bool, bool]:
        """Return whether positions of keys (rows, keys) are aligned and regular.

        For a single token, the order of the cache still applies if the token's position follows. This is checked
        without waiting for the device.
        """
        # a graph cannot read positions: attend to masked rectangles instead of stripes
        if torch.compiler.is_compiling():
            return False, False
        if single and self.past is not None and self.record is not None:
            order = self.record.order
            follows = (keys[:, -1] == keys[:, -2] + 1).all()
            if not any(order) or seen_for_free(follows) and follows:
                return order
            if not seen_for_free(follows):
                torch._assert_async(follows, "the position of a single token must follow those in the cache")
                return order
        return order_of(keys, None if counted is None else counted[:, -1].all().to(keys.device))


def _padding(given: torch.Tensor, counted: torch.Tensor) -> torch.Tensor | None:
    """Return the offset of the positions of a first forward and of forwards that continue with its cache."""
    padding = leading_padding(given, counted)
    if not torch.compiler.is_compiling() and seen_for_free(padding) and not padding.any():
        return None
    return padding


def current_state(remapping: Remapping) -> ForwardState | None:
    """Return the state of a model's innermost forward in this thread, or `None` outside of its forwards."""
    state: ForwardState | None = getattr(_calls, "state", None)
    while state is not None and state.remapping is not remapping:
        state = state.parent
    return state


def begin_forward(module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Create the state of a forward. Pre-hook of a backbone.

    Raises:
        EvaluationError: the attention implementation was changed after the patch, or the cache cannot be read.
        UnsupportedModelError: the forward requests something that remapping does not support.
    """
    remapping: Remapping = module._posext_remapping
    parent: ForwardState | None = getattr(_calls, "state", None)
    if parent is not None and not torch.compiler.is_compiling():
        parent = _running(parent, module)
    state = ForwardState(remapping, parent)
    state.backbone = weakref.ref(module)
    _calls.state = state  # before anything can fail, because the hook after the forward also runs after an error
    config: Any = module._posext_text_config
    implementation = config._attn_implementation
    if implementation not in ATTENTION.values():
        raise EvaluationError(
            f"the attention was set to {implementation!r} while a patch that rotates in it is in force. "
            "Undo the patch, set the attention, then patch again"
        )
    inputs = arguments(module, args, kwargs)
    if remapping.bands.bands:
        causal = inputs.get("is_causal")
        if causal is False or (causal is None and getattr(config, "is_causal", True) is False):
            raise UnsupportedModelError(both_sides(remapping, config.model_type, "is_causal=False"))
        state.weights = _weights_asked_for(config, inputs, remapping.base)
    state.paged = isinstance(kwargs.get("cache"), PagedAttentionCache)
    mask = inputs.get("attention_mask")
    by_layer = isinstance(mask, Mapping)
    if isinstance(mask, Mapping):
        mask = next((one for one in mask.values() if isinstance(one, torch.Tensor)), None)
    # transformers makes a mask for each type of layer in every step of a static cache, where the host must not wait
    state.own_mask = isinstance(mask, torch.Tensor) and mask.ndim == 4 and not (by_layer and mask.shape[2] == 1)
    state.open(find_cache((*args, *kwargs.values())), _padding_mask(mask))


def _running(state: ForwardState | None, entered: nn.Module) -> ForwardState | None:
    """Return the innermost state whose forward still runs around that of `entered`, and release those above it.

    PyTorch calls no hook after an interrupt (`KeyboardInterrupt` is not an `Exception`). The state of that forward
    would keep its model and cache alive.
    """
    frames = []
    frame = sys._getframe(2)
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back  # type: ignore[assignment]
    modules = [each.f_locals.get("self") for each in frames if each.f_code.co_name == "_call_impl"]
    if entered in modules:
        modules.remove(entered)  # its own frame, the innermost
    traced = any("_dynamo" in each.f_code.co_filename for each in frames)  # hides frames that run
    while state is not None and not traced and state.backbone() not in modules:
        parent = state.parent
        state.release()
        state = parent
    return state


def end_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Close the state of a forward. Hook of a backbone, which also runs after an error.

    Raises:
        EvaluationError: another hook replaced the cache after the state was created.
    """
    state: ForwardState | None = getattr(_calls, "state", None)
    if state is None:
        return
    _calls.state, _calls.carried = state.parent, None
    if output is None:  # an error: the next forward detects keys that it has added to the cache
        state.release()
        return
    cache = find_cache((*args, *kwargs.values()))
    if cache is not state.cache and state.slot is None:
        raise EvaluationError(
            "a forward pre-hook that was registered after the patch has changed the cache; register it before the "
            "patch is made"
        )
    values = output.values() if hasattr(output, "values") else output if isinstance(output, tuple) else ()
    returned = find_cache(values)
    state.close(cache if returned is None else returned)
    state.release()


def begin_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Store the positions that came with a layer's phases. Pre-hook of an attention layer.

    They are needed outside of a forward: when a checkpoint runs the layer again, or other code calls it directly.
    """
    if torch.compiler.is_compiling():
        return
    remapping: Remapping = module._posext_remapping  # type: ignore[assignment]
    if torch.is_grad_enabled() or current_state(remapping) is None:
        # The phases among the arguments keep the positions alive for as long as the layer runs.
        _calls.carried = weakref.WeakValueDictionary({at.name: at for at in _carried((*args, *kwargs.values()))})
    else:
        _calls.carried = None


def positions_at(module: nn.Module, remapping: Remapping, name: str) -> Positions:
    """Return the positions of a layer's tokens and keys.

    Positions that came with the layer's phases take precedence. If phases do not pass through its arguments (compiled
    graphs, and layers with a rotary module inside), the positions of the current forward are used.

    Raises:
        EvaluationError: neither is known.
    """
    carried = None if torch.compiler.is_compiling() else getattr(_calls, "carried", None)
    positions: Positions | None = carried.get(name) if carried else None
    if positions is not None:
        return positions
    state = current_state(remapping)
    at = None if state is None else state.positions.get(name)
    task = backward_task()
    if at is None and task == -1:
        raise EvaluationError(
            f"{type(module).__name__} got phases that did not come from the model's rotary module in this forward; "
            "positions cannot be remapped there. Call the model itself, or undo the patch"
        )
    if at is None or at.task != task:
        raise EvaluationError(
            "a gradient checkpoint runs a layer again whose phases came without their positions; "
            f"turn it off for this model: model.{CHECKPOINTING}_disable()"
        )
    return at


def carry(out: Any, at: Positions) -> None:
    """Attach positions to the tensor of their phases."""
    if not torch.compiler.is_compiling():
        setattr(out if isinstance(out, torch.Tensor) else out[0], "_posext_at", at)  # noqa: B010  no such field


def backward_task() -> int:
    """Return the id of the backward pass in this thread, or -1 outside of a backward pass."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def both_sides(remapping: Remapping, kind: str, where: str) -> str:
    """Return the error message for a bidirectional model or call."""
    return (
        f"{kind} attends to both sides ({where}); {remapping.plan.method} is defined for causal attention. "
        "A frequency method such as yarn can be used there"
    )


def arguments(module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward by name."""
    names: tuple[str, ...] = module._posext_arguments
    return {**dict(zip(names, args, strict=False)), **kwargs} if args else kwargs


def _padding_mask(mask: Any) -> torch.Tensor | None:
    """Return the mask (batch, keys) of the keys that are not padding, or `None` if there is no padding or no mask.

    In a 4D mask (batch, 1, queries, keys), padding is a key that no token attends to.
    """
    if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 4):
        return None
    counted = mask.bool() if mask.ndim == 2 else _attended(mask)
    if not torch.compiler.is_compiling() and seen_for_free(counted) and counted.all():
        return None
    return counted


def _attended(mask: torch.Tensor) -> torch.Tensor:
    """Return the mask (batch, keys) of the keys that at least one token attends to in a 4D mask."""
    seen = (mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask.bool()).any(1)
    queries, keys = seen.shape[1:]
    ahead = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).triu(keys - queries + 1)
    # In transformers' masks, left padding attends to everything, because it would otherwise attend to nothing.
    padding = (seen & ahead).any(-1, keepdim=True)
    return (seen & ~padding).any(1)


def _weights_asked_for(config: Any, given: dict[str, Any], base: str) -> bool:
    """Return whether a forward has to return attention weights. Log a warning once if it cannot."""
    requested = given.get("output_attentions")
    if not (getattr(config, "output_attentions", False) if requested is None else requested):
        return False
    if base != "eager":
        logger.warning_once(
            "attention weights are asked for, and sdpa attention does not compute them: undo the patch, call "
            "model.set_attn_implementation('eager'), then patch again"
        )
    return base == "eager"


def _carried(values: Iterable[Any]) -> Iterator[Positions]:
    for value in values:
        for one in value if isinstance(value, tuple) else (value,):
            at = getattr(one, "_posext_at", None)
            if at is not None:
                yield at
