"""State of one forward of a patched model, from the hook before it to the hook after it, and its positions.

No state of a forward is stored on the model, so threads, nested calls, and copies of a model do not interfere. Each
thread has a stack of states. The tensors of the phases also carry their positions, because a gradient checkpoint runs
a layer again after its forward has ended, possibly in another thread.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.utils import logging

from ...errors import EvaluationError, UnsupportedModelError
from ..detect import RotarySite
from ..kernels.bands import visible
from ..modes import CHECKPOINTING
from .cache import KeyRecord, find_cache, follow, record_of, seen_for_free
from .layout import Remapping

ATTENTION = {"sdpa": "posext-sdpa", "eager": "posext-eager"}
"""Registered names of the attention function, by the attention implementation of the unpatched model."""

logger = logging.get_logger(__name__)

_calls = threading.local()
"""Thread-local values: `state` of the innermost forward, and `carried`, the positions that came with a layer's phases.
Not a context variable, because torch.compile cannot trace those."""

T = TypeVar("T")


@dataclass(frozen=True)
class Positions:
    """Positions of the tokens and keys of one forward, as requested from one rotary module.

    Positions are counted from the first token that is not padding. They have shape (batch or 1, tokens), or (axes,
    batch or 1, tokens) in multimodal models, which have several positions per token: time, height, and width. All axes
    affect the phases. The first axis decides which band a pair is in.
    """

    state: ForwardState
    site: RotarySite  # rotary module that was called, and its set of frequencies
    query_axes: torch.Tensor  # positions of the tokens
    key_axes: torch.Tensor  # positions of all keys, starting with those in the cache
    aligned: bool  # whether the positions of all keys equal their indices
    regular: bool  # whether positions in each row increase by one, except for padding before the first key
    task: int  # id of the backward pass in which the module was called, -1 outside of a backward pass
    # Number of axes that the rotary module expects. Positions that are equal on all axes, like those of text, are
    # stored once.
    axes: int | None = None
    counted: torch.Tensor | None = None  # (batch, tokens), `False` for padding tokens
    # Slot of the new key, in a compiled step with a static cache. The keys are then all slots. Free slots have later
    # positions and are masked.
    slot: torch.Tensor | None = None
    # Whether the model itself rotates the query and key of a single token to the positions of the nearest pairs. The
    # keys in the cache are then rotated, too.
    rotated: bool = False
    memo: dict[Any, Any] = field(default_factory=dict, compare=False)  # values that the layers of a forward share
    # positions of the tokens and of the keys (batch or 1, tokens or keys), on the first axis
    queries: torch.Tensor = field(init=False, repr=False, compare=False)
    keys: torch.Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "queries", first_axis(self.query_axes))
        object.__setattr__(self, "keys", first_axis(self.key_axes))

    def lengths(self, of: torch.Tensor) -> torch.Tensor:
        """Return the lengths (batch or 1, tokens or 1) of the documents of queries or keys (..., tokens)."""
        lengths = self.once("lengths", lambda: document_lengths(self.queries, self.counted))
        if of.shape[-1] != lengths.shape[-1]:  # cached keys belong to the document that continues
            counted, lengths = self.counted, lengths[:, -1:] if self.counted is None else lengths
            if counted is not None:  # that of the last token that is not padding
                last = torch.where(counted, torch.arange(counted.shape[-1], device=counted.device), 0)
                lengths = lengths.expand(len(counted), -1).gather(-1, last.amax(-1, keepdim=True))
        return lengths.to(of.device)

    def once(self, what: Any, make: Callable[[], T]) -> T:
        """Return a value that all layers of a forward share, and compute it at the first call."""
        value: T | None = self.memo.get(what)
        if value is None:
            value = self.memo[what] = make()
        return value


class ForwardState:
    """State of one forward."""

    def __init__(self, remapping: Remapping, parent: ForwardState | None = None) -> None:
        self.remapping = remapping
        self.parent = parent  # state of the enclosing forward in this thread
        self.backbone: Callable[[], nn.Module | None] = lambda: None
        self.cache: Any = None  # the user's cache, and the record of its keys
        self.record: KeyRecord | None = None
        self.mask: torch.Tensor | None = None  # (batch, keys), `True` for tokens that are not padding, if any is
        self.own_mask = False  # whether the caller passed 4D masks, which may let layers see more than their windows
        self.weights = False  # whether attention weights are requested
        self.paged = False  # whether keys are in the pages of continuous batching
        self.past: torch.Tensor | None = None  # positions of the keys in the cache
        self.padding: torch.Tensor | None = None  # offset that is subtracted from the model's positions
        self.waiting: torch.Tensor | None = None  # (batch, 1), `True` for rows of padding alone so far, if any is
        self.slot: torch.Tensor | None = None  # slot of the new key, in a compiled step
        self.positions: dict[str, Positions] = {}  # requested from the rotary modules, by set of frequencies
        self.loose: set[str] = set()  # sets of frequencies with layers whose cached keys are not rotated

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
            self.padding, self.waiting = self.record.padding, self.record.waiting
        self.mask = mask

    def close(self, cache: Any) -> None:
        """Store the positions of the keys in the record of the cache that holds them."""
        places = list(self.positions.values())
        if places and self.slot is not None:
            assert self.record is not None
            self.record.close_slot(places[0].query_axes)
        elif places and cache is not None:
            record, place = self.record or KeyRecord(), places[0]
            standing = frozenset(self.positions) - self.loose
            names = standing if self.remapping.rotates_cached_keys else frozenset()
            follow(cache, record)
            if record.padding is not self.padding:
                record.keep_padding(self.padding)
            record.waiting = self.waiting
            record.close(cache, self.remapping.plan, place.key_axes, (place.aligned, place.regular), names)
        for place in places:
            place.memo.clear()

    def release(self) -> None:
        """Drop tensors, the cache, and everything that refers back to the state."""
        self.positions, self.parent = {}, None
        self.past = self.padding = self.waiting = self.slot = self.cache = self.record = None

    def note(self, site: RotarySite, position_ids: torch.Tensor, tokens: int) -> Positions:
        """Store the positions that a rotary module receives in a forward of `tokens` tokens.

        There may be more positions than tokens, because Qwen4's indexer also requests the phases of cached keys.
        """
        place = self._step(site, position_ids) if self.slot is not None else None
        self.positions[site.name] = place = place or self._positions(site, position_ids, tokens)
        return place

    def _step(self, site: RotarySite, position_ids: torch.Tensor) -> Positions | None:
        """Return positions in a compiled step, or `None` if the forward turns out not to be one."""
        assert self.slot is not None and self.record is not None
        if position_ids.shape[-1] != 1 or position_ids.ndim != 2:
            self.past, self.slot = self.record.open(self.cache, self.remapping.plan), None
            return None
        position_ids = self._without_padding(position_ids)
        slots = torch.arange(self.cache.layers[0].max_cache_len, device=position_ids.device)
        keys = (position_ids + slots - self.slot.to(position_ids.device)).clamp(min=0)
        rotated = site.name in self.record.standing[0]
        return Positions(self, site, position_ids, keys, False, True, backward_task(), None, None, self.slot, rotated)

    def _positions(self, site: RotarySite, position_ids: torch.Tensor, tokens: int) -> Positions:
        past = self.past
        if past is not None and position_ids.shape[-1] == past.shape[-1] + tokens:
            position_ids = position_ids[..., -tokens:]  # without the positions of cached keys
        single, axes = position_ids.shape[-1] == 1, position_ids.shape[0] if position_ids.ndim == 3 else None
        if axes is not None:
            position_ids = self._flat(position_ids, single)
        waiting = None if self.record is None else self.record.waiting
        begins = past is None or waiting is not None  # some rows may begin in this forward
        counted = self._counted(position_ids) if begins or not single else None
        if begins and counted is not None:
            self.padding, self.waiting = leading_padding(position_ids, counted, waiting, self.padding)
        position_ids = self._without_padding(position_ids)
        keys = position_ids
        if past is not None:
            past = past.to(keys.device)
            if past.shape[:-1] != keys.shape[:-1]:
                rows = torch.broadcast_shapes(past.shape[:-1], keys.shape[:-1])  # type: ignore[no-untyped-call]
                past, keys = past.expand(*rows, -1), keys.expand(*rows, -1)
            keys = torch.cat([past, keys], -1)
        aligned, regular = self._order(first_axis(keys), single and not begins, counted)
        rotated = False
        if single and regular and keys.ndim == 2 and past is not None:
            assert self.record is not None
            names, count = self.record.standing
            rotated = site.name in names and count == past.shape[-1]
        return Positions(
            self, site, position_ids, keys, aligned, regular, backward_task(), axes, counted, None, rotated
        )

    def _flat(self, position_ids: torch.Tensor, single: bool) -> torch.Tensor:
        """Return positions (axes, batch, tokens) on one axis if all axes are equal, as they are in text."""
        if torch.compiler.is_compiling() or self.past is not None and self.past.ndim == 3:
            return position_ids
        alike = (position_ids == position_ids[:1]).all()
        if not single or seen_for_free(alike):
            return position_ids[0] if alike else position_ids
        torch._assert_async(alike, "a single token must be at one position, on all axes")
        return position_ids[0]

    def _counted(self, position_ids: torch.Tensor) -> torch.Tensor | None:
        """Return the mask (batch, tokens) of the tokens that are not padding, or `None` if all tokens count.

        Not called for a single token, unless its row may still begin with padding. A decoding step therefore does not
        read the mask.
        """
        if self.mask is None:
            return None
        first = 0 if self.past is None else self.past.shape[-1]
        count = position_ids.shape[-1]
        if self.mask.shape[-1] < first + count:  # the mask covers the new tokens only
            first = self.mask.shape[-1] - count
        if first < 0:
            return None
        counted = self.mask[:, first : first + count].to(position_ids.device)
        return counted.expand(max(position_ids.shape[-2], counted.shape[0]), -1)

    def _without_padding(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Return positions relative to the first token that is not padding."""
        if self.padding is None:
            return position_ids
        return (position_ids - self.padding.to(position_ids.device)).clamp(min=0)

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
        index = torch.arange(keys.shape[1], device=keys.device)
        shift = index[-1:] - keys[:, -1:]
        padding = (index < shift) & (keys <= 1) & (keys == keys[:, :1])
        regular = ((keys == index - shift) | padding).all()
        if counted is not None:  # the positions of keys that follow right padding do not increase by one
            regular = regular & counted[:, -1].all().to(keys.device)
        aligned, regular = torch.stack([(keys == index).all(), regular]).tolist()
        return aligned, regular


def first_axis(positions: torch.Tensor) -> torch.Tensor:
    """Return positions (batch, tokens) on the first axis. Only multimodal models have several axes."""
    return positions if positions.ndim == 2 else positions[0]


def leading_padding(
    positions: torch.Tensor, mask: torch.Tensor, waiting: torch.Tensor | None, before: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the position (..., batch, 1) of each row's first token under the mask, or 0 without left padding, and the
    rows (batch, 1) of padding alone.

    The first is subtracted from the positions of a first forward and of forwards that continue with its cache. Both
    are `None` if no row is known to be padded. Without `position_ids`, a model counts left padding like text. A common
    shift does not change RoPE, but it changes windows, chunks, sinks, and lengths. The mask (batch, tokens) is `True`
    for tokens that are not padding. In a later forward, `waiting` are the rows of padding alone so far. All other rows
    keep the offset that they had `before`.
    """
    first = mask.long().argmax(-1, keepdim=True)
    rows = positions.expand(*positions.shape[:-2], mask.shape[0], -1)
    starts = rows.gather(-1, first.expand(*rows.shape[:-1], 1))
    empty = ~mask.any(-1, keepdim=True)
    padding = torch.where(first > 0, starts, 0)
    if waiting is not None:
        empty = empty & waiting
        padding = torch.where(waiting, starts, 0 if before is None else before.to(starts.device))
    padding = torch.where(empty, rows[..., -1:] + 1, padding)  # the padding of such rows stays at position 0
    if torch.compiler.is_compiling():
        return padding, None
    return None if seen_for_free(padding) and not padding.any() else padding, empty if empty.any() else None


def document_lengths(positions: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """Return the length of each token's document, which is its highest position + 1.

    Several documents may be packed into a row of positions (batch or 1, tokens). A new document starts when positions
    decrease. Padding, `False` in `counted` (batch, tokens), does not count towards a length. It gets a length as well,
    so that its phases are finite.
    """
    if counted is not None:
        positions = positions.expand(counted.shape[0], -1)
    document = (positions.diff(prepend=positions[:, :1]) < 0).cumsum(-1)
    heights = positions if counted is None else torch.where(counted, positions, 0)
    highest = torch.zeros_like(positions).scatter_reduce(-1, document, heights, "amax")
    return highest.gather(-1, document) + 1


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
            f"Expected the attention implementation of the patch, got {implementation!r}. Undo the patch, set the "
            "attention, then patch again."
        )
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise UnsupportedModelError(
            f"torch.jit.trace records the positions of one text, and {remapping.plan.method} computes those of each. "
            "Use torch.compile, or torch.export for texts of one length."
        )
    inputs = {**dict(zip(module._posext_arguments, args, strict=False)), **kwargs}
    if not torch.compiler.is_dynamo_compiling():
        read = next((inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None), None)
        if read is not None and isinstance(read.shape[1], torch.SymInt):
            raise UnsupportedModelError(
                f"Expected a text of one length, because the bands of {remapping.plan.method} depend on it, got "
                "torch.export with a length that is open. Leave the tokens out of dynamic_shapes."
            )
    if remapping.bands.bands:
        causal = inputs.get("is_causal")
        if causal is False or (causal is None and getattr(config, "is_causal", True) is False):
            raise UnsupportedModelError(both_sides(remapping.plan.method, config.model_type, "is_causal=False"))
        state.weights = _weights_asked_for(config, inputs, remapping.base)
    state.paged = isinstance(kwargs.get("cache"), PagedAttentionCache)
    mask, by_layer = inputs.get("attention_mask"), False
    if isinstance(mask, Mapping):
        mask, by_layer = next((each for each in mask.values() if isinstance(each, torch.Tensor)), None), True
    # transformers makes a mask for each type of layer in every step of a static cache, where the host must not wait
    state.own_mask = isinstance(mask, torch.Tensor) and mask.ndim == 4 and not (by_layer and mask.shape[2] == 1)
    state.open(find_cache((*args, *kwargs.values())), _padding_mask(mask))


def _running(state: ForwardState | None, entered: nn.Module) -> ForwardState | None:
    """Return the innermost state whose forward still runs around that of `entered`, and release those above it.

    PyTorch calls no hook after an interrupt (`KeyboardInterrupt` is not an `Exception`). The state of that forward
    would keep its model and cache alive.
    """
    modules, traced = [], False
    frame: Any = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "_call_impl":
            modules.append(frame.f_locals.get("self"))
        traced |= "_dynamo" in frame.f_code.co_filename  # hides frames that run
        frame = frame.f_back
    if entered in modules:
        modules.remove(entered)  # its own frame, the innermost
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
    if output is not None:  # otherwise an error: the next forward detects keys that it has added to the cache
        cache = find_cache((*args, *kwargs.values()))
        if cache is not state.cache and state.slot is None:
            raise EvaluationError(
                "A forward pre-hook that was registered after the patch has changed the cache. Register it before the "
                "patch."
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
        values = (*args, *kwargs.values())
        phases = (one for value in values for one in (value if isinstance(value, tuple) else (value,)))
        carried: Iterator[Positions] = (one._posext_at for one in phases if hasattr(one, "_posext_at"))
        # The phases among the arguments keep the positions alive for as long as the layer runs.
        _calls.carried = weakref.WeakValueDictionary({place.site.name: place for place in carried})
    else:
        _calls.carried = None


def positions_at(module: nn.Module, remapping: Remapping, name: str) -> Positions:
    """Return the positions of a layer's tokens and keys.

    Positions that came with the layer's phases take precedence. If phases do not pass through its arguments (compiled
    graphs, and layers with a rotary module inside), the positions of the current forward are used.

    Raises:
        EvaluationError: neither is known.
    """
    compiling = torch.compiler.is_compiling()
    carried = None if compiling else getattr(_calls, "carried", None)
    place: Positions | None = carried.get(name) if carried else None
    if place is not None:
        return place
    state = current_state(remapping)
    place = None if state is None else state.positions.get(name)
    task = -1 if compiling else torch._C._current_graph_task_id()
    if place is None and task == -1:
        raise EvaluationError(
            f"{type(module).__name__} got phases that did not come from the model's rotary module in this forward, so "
            "that positions cannot be remapped. Call the model itself, or undo the patch."
        )
    if place is None or place.task != task:
        raise EvaluationError(
            "A gradient checkpoint runs a layer again whose phases came without their positions. "
            f"Turn it off for this model: model.{CHECKPOINTING}_disable()."
        )
    return place


def backward_task() -> int:
    """Return the id of the backward pass in this thread, or -1 outside of a backward pass."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def both_sides(method: str, kind: str, where: str) -> str:
    """Return the error message for a bidirectional model or call."""
    return (
        f"Expected causal attention for {method}, got {kind}, which attends to both sides ({where}). Pass a frequency "
        "method such as yarn."
    )


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
    seen = visible(mask).any(1)
    queries, keys = seen.shape[1:]
    ahead = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).triu(keys - queries + 1)
    # In transformers' masks, left padding attends to everything, because it would otherwise attend to nothing.
    padding = (seen & ahead).any(-1, keepdim=True)
    return (seen & ~padding).any(1)


def _weights_asked_for(config: Any, inputs: dict[str, Any], base: str) -> bool:
    """Return whether a forward has to return attention weights. Log a warning once if it cannot."""
    requested = inputs.get("output_attentions")
    if not (getattr(config, "output_attentions", False) if requested is None else requested):
        return False
    if base != "eager":
        logger.warning_once(
            "Attention weights are requested, but sdpa attention does not compute them. Undo the patch, call "
            "model.set_attn_implementation('eager'), then patch again."
        )
    return base == "eager"
