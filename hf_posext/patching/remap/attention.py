"""Attention function of a patched model, which receives unrotated queries and keys, rotates them, and attends.

No model's forward is copied. Rotary modules return the identity (cosine 1, sine 0). A function in transformers'
`AttentionInterface` then rotates each pair to the positions of the plan. The model still rotates in two cases:

- In a decoding step with rotated keys in the cache, the model rotates for the nearest pairs, and the function applies
  only the remaining rotations (`rotated_keys.py`).
- If an indexer selects keys by their rotated states (DeepSeek's sparse attention), the model rotates as usual, and the
  function rotates by the difference.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from ...errors import EvaluationError, UnsupportedModelError
from ...plan import PositionMap, QueryScale
from ..kernels.banded import Rotated, attention_with_weights, banded_attention, whole
from ..kernels.bands import SAME, Geometry, mapped, visible
from ..modes import forget_attention, register_attention
from .cache import START_ANEW
from .forward import ATTENTION, Positions, both_sides, current_state, first_axis, positions_at
from .layout import Layer, Phases, Probing
from .paged import not_paged, requests_of
from .rotary import pair_phases, phases_at
from .rotated_keys import cached_keys, step_queries, whole_step

MASKS = {ATTENTION["sdpa"]: sdpa_mask, ATTENTION["eager"]: eager_mask}
"""Functions that build the model's attention masks, by the name of the attention function."""

Attended = tuple[torch.Tensor, torch.Tensor | None]
"""Return type of attention functions: attended values (batch, queries, heads, dim) and, if computed, weights."""

UNPROVEN_ON = "cuda"
"""Device on which several tokens attend outside of compiled graphs if bands are chunks.

On an H100 and an H200, torch 2.11 fused the biases of three bands and their softmax into one kernel with wrong
results, although each alone is right. Decoding steps compute no such biases, and their graphs are right
(`tests/patching/test_gpu.py`)."""

HONOURED = frozenset("dropout scaling is_causal softcap s_aux sliding_window output_attentions cache".split())
"""Arguments that attention over bands supports. `cache` is used in paged attention only."""


class Call(NamedTuple):
    """Call of the attention function in a layer that rotates, on one device. See [`Positions`] for the axes."""

    module: nn.Module
    layer: Layer
    place: Positions
    query_axes: torch.Tensor
    key_axes: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    options: dict[str, Any]


def late_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> Attended:
    """Rotate queries and keys to the positions of the plan, then attend.

    This is the function that is registered in `AttentionInterface`.
    """
    remapping: Any = getattr(module, "_posext_remapping", None)
    if isinstance(remapping, Probing):
        return remapping.capture(module._posext_path, query, key, value, attention_mask)  # type: ignore[arg-type]
    if remapping is None:
        raise EvaluationError(
            f"{type(module).__name__} has no patch, but its config names the attention of one. The module was created "
            "after the patch, or its model shares the config with a patched model. Undo the patch, then patch again."
        )
    layer: Layer | None = getattr(module, "_posext_layer", None)
    place = None if layer is None else positions_at(module, remapping, layer.rotary)
    state = current_state(remapping) if place is None else place.state
    if state is not None and state.paged:
        return _paged_attention(module, layer, place, query, key, value, kwargs), None
    return _attend(module, layer, place, query, key, value, attention_mask, kwargs)


def _attend(
    module: nn.Module,
    layer: Layer | None,
    place: Positions | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    options: dict[str, Any],
) -> Attended:
    """Attend in the rows of a forward, or in one request of continuous batching."""
    if layer is None or place is None:  # the layer does not rotate
        remapping: Any = module._posext_remapping
        return base_function(remapping.base, module)(module, query, key, value, mask, **options)  # type: ignore[no-any-return]
    selected = options.pop("indices", None)
    if selected is not None:
        assert mask is not None  # an indexer always receives a mask
        mask = _only(mask, selected)
    device, known = query.device, place
    axes = place.once(("there", device), lambda: (known.query_axes.to(device), known.key_axes.to(device)))
    call = Call(module, layer.on(device), place, *axes, query, key, value, mask, options)
    if axes[1].shape[-1] != key.shape[2]:
        call = _known_keys(call)
    if layer.near and not _sees_farther(call):
        return _near_attention(call)
    text = query.shape[2] > 1 and torch.compiler.is_compiling()
    unproven = text and place.state.remapping.bands.chunked and device.type == UNPROVEN_ON
    attend: Callable[[Call], Attended] = _outside_of_graphs if unproven else _banded_attention
    return attend(call)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _paged_attention(
    module: nn.Module,
    layer: Layer | None,
    place: Positions | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: dict[str, Any],
) -> torch.Tensor:
    """Return the attention of a step of continuous batching (1, tokens, heads, dim), with 0 for padding tokens."""
    pages = options.pop("cache", None)  # written here up to transformers 5.23; in later versions, by the layer
    if pages is None and not isinstance(options.get("cu_seq_lens_k"), torch.Tensor):
        raise UnsupportedModelError(not_paged(module, "does not hand the pages of keys to its attention function"))
    before = None if place is None else place.memo.get(("paged", module))
    if before is not None and (pages is not None or before is not query):
        raise UnsupportedModelError(not_paged(module, "attends twice, and a page keeps the keys of one call"))
    if place is not None:
        place.memo["paged", module] = query
    if pages is not None:
        key, value = pages.update(key, value, module.layer_idx, options)
    remapping: Any = module._posext_remapping
    split = functools.partial(requests_of, module, remapping.base, place, query, options)
    # Layers with the same number of keys have the same requests, because a window only drops keys.
    kind = "requests", key.shape[2], options.get("sliding_window")
    requests = split() if place is None else place.once(kind, split)
    out = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1])
    for request in requests:
        keys, values = key[:, :, request.keys], value[:, :, request.keys]
        states = query[:, :, request.queries], keys, values
        out[:, request.queries] = _attend(module, layer, request.place, *states, request.mask, dict(options))[0]
    return out


def _sees_farther(call: Call) -> bool:
    """Return whether a 4D mask passed by the caller lets a layer attend beyond its sliding window."""
    window, mask = call.layer.window, call.mask
    if window is None or mask is None or not call.place.state.own_mask or torch.compiler.is_compiling():
        return False

    def farther() -> tuple[torch.Tensor, bool]:
        behind = visible(mask).tril(mask.shape[-1] - mask.shape[-2] - window)
        return mask, bool(behind.any())  # the mask keeps its id

    return call.place.once(("farther", id(mask), window), farther)[1]


def _near_attention(call: Call) -> Attended:
    """Rotate to the positions of the model, then attend like the unpatched model.

    Used if a layer sees all pairs at these positions.
    """
    layer, place, query = call.layer, call.place, _scaled(call)
    key, rotated, _ = cached_keys(layer, place, call.key, query.shape[2])
    if not place.rotated:
        query = whole(_rotations(call, "query", query, (SAME,))[0])
    if not rotated:
        key = whole(_rotations(call, "key", key, (SAME,))[0])
    return layer.base(call.module, query, key, call.value, call.mask, **call.options)  # type: ignore[no-any-return]


def _banded_attention(call: Call) -> Attended:
    """Rotate queries and keys for each band, then attend to all bands in one softmax."""
    layer, place, value, mask, options = call.layer, call.place, call.value, call.mask, call.options
    remapping, count = place.state.remapping, call.query.shape[2]
    bands = remapping.bands
    unread = remapping.refused.intersection(options)
    if unread and (unknown := [name for name in options if name in unread and options[name] is not None]):
        raise UnsupportedModelError(
            f"{type(call.module).__name__} passes {', '.join(unknown)} to its attention, which remapping does not "
            "support."
        )
    if mask is None and count > 1:
        # Eager attention is never causal without a mask. SDPA reads `is_causal` from the call, then from the module.
        causal = options.get("is_causal")
        causal = getattr(call.module, "is_causal", True) if causal is None else causal
        if remapping.base == "eager" or not causal:
            raise UnsupportedModelError(
                both_sides(remapping.plan.method, type(call.module).__name__, "no mask, and not causal")
            )
    if mask is not None and (mask.shape[2] not in (1, count) or mask.shape[3] != call.key.shape[2]):
        raise EvaluationError(
            f"{type(call.module).__name__} got a mask of {mask.shape[2]} queries and {mask.shape[3]} keys for {count} "
            f"queries and {call.key.shape[2]} keys. {START_ANEW}"
        )
    known = call.key_axes.shape[-1]
    # Bands are stripes of the score matrix unless a sliding cache has dropped keys. Chunks also require rows that
    # begin at position 0. Windows may begin anywhere.
    stripes = place.aligned or place.regular and bands.slide
    aligned = stripes and place.slot is None and known == place.keys.shape[1]
    # SDPA has no softcap: transformers 5.10.1 ignores it, later versions use eager attention
    softcap = None if remapping.base == "sdpa" else options.get("softcap")
    scaling, sinks = options.get("scaling"), options.get("s_aux")
    scaling, dropout = call.query.shape[-1] ** -0.5 if scaling is None else scaling, options.get("dropout") or 0.0
    # a decoding step with rotated cached keys may run in a single kernel
    query, key, step = _scaled(call), call.key, None
    if place.rotated and aligned and mask is softcap is sinks is None and not (dropout or place.state.weights):
        step = whole_step(layer, place, query, key, value, scaling)
    key, rotated, last = cached_keys(layer, place, key, count, leave=step is not None)
    if step is not None:
        return step(query, key, value, -1 if last is None else last), None
    # otherwise, rotate the queries and keys that the model and the cache have not rotated yet
    if place.rotated:
        band_queries: Any = step_queries(layer.query, place, query)
    else:
        band_queries = _rotations(call, "query", query, bands.query_maps)
    band_keys = [key] * len(bands.key_maps)
    if not rotated:
        band_keys = [whole(states) for states in _rotations(call, "key", key, bands.key_maps)]
    states = [band_queries[i] for i in bands.query_choice], [band_keys[i] for i in bands.key_choice], value

    def make() -> Geometry:
        return Geometry(bands.bands, first_axis(call.query_axes), first_axis(call.key_axes), mask, aligned)

    # The geometry holds the mask, so that no other mask gets the same id while the geometry is remembered.
    kind = "geometry", aligned, known, key.device, id(mask)
    geometry = make() if torch.compiler.is_compiling() else place.once(kind, make)
    settings = {"scaling": scaling, "softcap": softcap, "sinks": sinks, "dropout": dropout}
    if place.state.weights:
        return attention_with_weights(geometry, *states, **settings)
    out = banded_attention(geometry, *states, **settings)
    if mask is not None and mask.dtype == torch.bool and place.slot is None:
        # Like SDPA, return 0 if a query attends to nothing: Recurrent Gemma's convolutions read such padding.
        out = out.masked_fill(~mask.any(-1).transpose(1, 2)[..., None], 0)
    return out, None


_outside_of_graphs: Any = torch.compiler.disable(_banded_attention)  # type: ignore[no-untyped-call]


def _known_keys(call: Call) -> Call:
    """Return a call with as many positions as keys.

    The numbers differ if a static cache has free slots, or if a sliding cache has dropped keys behind its window.

    Raises:
        EvaluationError: the numbers differ for another reason, because other code has added or removed keys.
    """
    layers: list[Any] = getattr(call.place.state.cache, "layers", [])
    index, key, positions = call.layer.index, call.key, call.key_axes
    own = layers[index : index + 1] if index is not None and index >= 0 else []
    if own and own[0].keys is not None:  # otherwise the layer is shared, or uses the keys of another
        layers = own
    known, count = positions.shape[-1], key.shape[2]
    if known < count and any(getattr(layer, "max_cache_len", 0) >= count for layer in layers):
        if call.place.query_axes.shape[-1] == 1 and torch.compiler.is_compiling():
            # in a compiled graph, free slots stay and are masked
            return call._replace(key_axes=nn.functional.pad(positions, (0, count - known)))
        mask = None if call.mask is None else call.mask[..., :known]
        return call._replace(key=key[:, :, :known], value=call.value[:, :, :known], mask=mask)
    if known > count and any(getattr(layer, "is_sliding", False) for layer in layers):
        return call._replace(key_axes=positions[..., -count:])  # a sliding cache keeps the latest keys
    raise EvaluationError(
        f"Expected {known} keys in {type(call.module).__name__}, got {count}. Positions of keys are not known if "
        "layers are called one by one, or if a cache drops keys on its own. Call the model itself, with a cache that "
        "keeps all keys, or undo the patch."
    )


def _only(mask: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """Return a mask (batch, 1, queries, keys) without the keys that an indexer did not select.

    `selected` (batch, queries, selected) contains the indices of the selected keys. The model applies them to the mask
    itself only if its attention is named eager or sdpa.
    """
    batch, queries, _ = selected.shape
    chosen = torch.zeros(batch, 1, queries, mask.shape[-1], dtype=torch.bool, device=mask.device)
    chosen = chosen.scatter(-1, selected[:, None].long(), True)
    return mask & chosen if mask.dtype == torch.bool else mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)


def _rotations(
    call: Call, side: str, states: torch.Tensor, rules: tuple[PositionMap, ...]
) -> list[torch.Tensor] | list[Rotated]:
    """Return queries or keys rotated to their positions under each of the maps.

    Several tokens are rotated later, block by block. Phases are shared by all layers, and by queries and keys at the
    same positions.
    """
    place, layout = call.place, getattr(call.layer, side)
    positions = call.query_axes if side == "query" else call.key_axes
    kind = layout.kind, positions.shape, states.dtype, states.device

    def phases(*maps: PositionMap) -> Phases:
        lengths = place.lengths(positions) if any(rule.follows_rows for rule in maps) else None
        moved = [mapped(positions, rule, lengths) for rule in maps]
        slots = next((targets.shape[-1] for targets in moved if targets.ndim > positions.ndim), 0)
        if slots:
            if positions.ndim == 3:
                raise UnsupportedModelError("Positions on several axes cannot be mapped by rotary pairs.")
            moved = [each if each.ndim == 3 else each[..., None].expand(*each.shape, slots) for each in moved]
            cos, sin = pair_phases(place, torch.cat(moved, -2), states)
        elif place.state.remapping.delta:
            # the model has already rotated by its own positions and attention factor
            cos, sin = phases_at(place, torch.cat(moved, -1) - torch.cat([positions] * len(maps), -1), states)
            factor = getattr(place.site.module, f"{place.site.prefix}attention_scaling", 1.0)
            cos, sin = cos / factor, sin / factor
        else:
            cos, sin = phases_at(place, torch.cat(moved, -1), states)
        return layout.phases(cos, sin, states.dtype)  # type: ignore[no-any-return]

    if positions.shape[-1] == 1:  # a step consists of many small operations, so rotate for all maps at once
        rotated = layout.rotate(states, place.once((side, rules, *kind), lambda: phases(*rules)))
        return list(rotated.chunk(len(rules), 2))

    def lazily(cos: torch.Tensor, sin: torch.Tensor) -> Rotated:
        return Rotated(
            states,
            lambda block, start, stop: layout.rotate(block, (cos[:, :, start:stop], sin[:, :, start:stop])),
        )

    side = "both" if call.query_axes is call.key_axes else side
    return [lazily(*place.once((side, rule, *kind), functools.partial(phases, rule))) for rule in rules]


def _scaled(call: Call) -> torch.Tensor:
    """Return queries (batch, heads, tokens, dim) times the plan's factor for their positions on the first axis."""
    scale, query = call.layer.scale, call.query
    if scale is None:
        return query

    def make() -> torch.Tensor:
        return query_factor(scale, first_axis(call.query_axes), call.place.lengths).to(query.dtype)[:, None, :, None]

    return query * call.place.once(("scale", query.dtype, query.device), make)


def query_factor(
    scale: QueryScale, positions: torch.Tensor, lengths: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return the factor of queries at positions, in float32. `lengths` returns the lengths of rows for positions."""
    past = (positions.float() + 1) / scale.length
    if scale.row is not None:
        past = (lengths(positions).float() - scale.row.beyond) / scale.row.span
        factor = (1 + scale.temperature * past.clamp(min=1).log()) * scale.constant
    elif scale.step is None:
        factor = (1 + scale.temperature * past.clamp(min=1).log()).square() * scale.constant
    else:
        factor = (1 + scale.temperature * ((positions + 1) // scale.step + 1).float().log()) * scale.constant
    if scale.log:
        factor = factor * ((positions.float() + 1).log() / math.log(scale.length)).clamp(min=1)
    return factor


def base_function(base: str, module: nn.Module) -> Any:
    """Return the attention function that an unpatched module would call."""
    if base == "sdpa":
        return sdpa_attention_forward
    homes = [sys.modules[cls.__module__] for cls in type(module).__mro__]
    return next(home.eager_attention_forward for home in homes if hasattr(home, "eager_attention_forward"))


def arguments_read(function: Callable[..., Any]) -> frozenset[str]:
    """Return the names of arguments that an attention function reads: its parameters, and the strings in its code.

    A replacement has to support these. It may ignore the many others that trainers and collators pass down (`seq_idx`,
    `shift_labels`, the lengths of packed documents for FlashAttention).
    """
    plain = inspect.unwrap(function)
    code = getattr(plain, "__code__", None)
    texts = () if code is None else (value for value in code.co_consts if isinstance(value, str))
    return frozenset((*inspect.signature(plain).parameters, *texts))


class Lease:
    """Registration of the attention function in transformers, which lasts while a patched model holds this object.

    Copies and pickles of the model get their own lease.
    """

    def __init__(self) -> None:
        for name, mask in MASKS.items():
            register_attention(name, late_attention, mask)
        self._end = weakref.finalize(self, _end_lease)

    def close(self) -> None:
        """End the registration. A second call does nothing."""
        self._end()

    def __reduce__(self) -> tuple[type[Lease], tuple[()]]:
        return Lease, ()


def _end_lease() -> None:
    for name in MASKS:
        forget_attention(name)
