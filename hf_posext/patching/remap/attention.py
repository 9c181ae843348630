"""The attention function of a patched model: queries and keys reach it unrotated, it rotates them, then attends.

Rotary modules return the identity (cosine 1, sine 0). A function in transformers' `AttentionInterface` rotates with
the positions that the plan wants for each pair. No model's forward is copied. In a step of decoding whose cached keys
stand rotated, the model rotates for the nearest pairs, and the function only what differs (`decoding_step.py`). Where
an indexer selects keys by their rotated states (DeepSeek's sparse attention), the model rotates as ever, and the
function rotates by the difference.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from ...errors import EvaluationError, UnsupportedModelError
from ...plan import Band, PositionMap, QueryScale
from ..kernels import Branch, banded_attention, belongs, mapped
from ..kernels.bands import decay, fade
from ..switching import forget_attention, register_attention
from .decoding_step import step_queries, whole_step
from .forward import ATTENTION, both_sides, positions_at
from .layout import LayerLayout, Layout, Phases, Probing
from .paged import not_paged, requests_of
from .positions import Positions
from .remapping import Remapping
from .rotary import pair_phases, phases_at
from .rotated_keys import cached_keys

MASKS = {ATTENTION["sdpa"]: sdpa_mask, ATTENTION["eager"]: eager_mask}
"""Masks that the model shall build, by the name of the attention function."""

SAME = PositionMap()

Attended = tuple[torch.Tensor, torch.Tensor | None]
"""Return type of attention functions: values (batch, queries, heads, dim) and, if computed, weights."""

UNPROVEN_ON = "cuda"
"""Where a text attends outside of compiled graphs, if bands are chunks: on an H100 and an H200, torch 2.11 fused the
biases of three bands and their softmax into one kernel that was wrong, though each alone is right. Steps of decoding
compute no such thing, and their graphs are right there (`tests/patching/test_gpu.py`)."""

HONOURED = frozenset("dropout scaling is_causal softcap s_aux sliding_window output_attentions cache".split())
"""Arguments of attention functions that bands honour. A `cache` counts in paged attention alone."""


def late_attention(module: nn.Module, *args: Any, **kwargs: Any) -> Attended:
    """The function in `AttentionInterface`: rotate as the plan says, then attend."""
    remapping: Remapping | Probing | None = getattr(module, "_posext_remapping", None)
    if isinstance(remapping, Probing):
        return remapping.capture(module._posext_path, *args)  # type: ignore[arg-type]
    if remapping is None:
        raise EvaluationError(
            f"{type(module).__name__} has no patch, but its config asks for one: the module was made after the patch, "
            "or its model shares the config with a patched model. Undo the patch, then patch again"
        )
    text = torch.compiler.is_compiling() and args[0].shape[2] > 1
    if text and args[0].device.type == UNPROVEN_ON and any(part.chunk > 1 for part in remapping.bands.parts):
        attended: Attended = _outside_of_graphs(remapping, module, *args, **kwargs)
        return attended
    return _late_attention(remapping, module, *args, **kwargs)


def _late_attention(
    remapping: Remapping,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> Attended:
    """A layer does not rotate, or it sees only the nearest band, or it sees several."""
    selected = kwargs.pop("indices", None)
    if selected is not None:
        assert attention_mask is not None  # the indexer has read it
        attention_mask = _only(attention_mask, selected)
    layout = remapping.layer(module._posext_path, query.device)  # type: ignore[arg-type]
    at = None if layout is None else positions_at(module, remapping, layout.rotary)
    if isinstance(kwargs.get("cache"), PagedAttentionCache):
        return _paged_attention(remapping, module, layout, at, query, key, value, kwargs), None
    if at is not None and at.state.paged:
        raise UnsupportedModelError(not_paged(module, "does not hand the pages of keys to its attention function"))
    return _attention_at(remapping, module, layout, at, query, key, value, attention_mask, **kwargs)


def _attention_at(
    remapping: Remapping,
    module: nn.Module,
    layout: LayerLayout | None,
    at: Positions | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> Attended:
    """Attention of the rows of a forward, or of one request of a batch."""
    if layout is None or at is None:
        return _base_attention(remapping.base, module, query, key, value, attention_mask, **kwargs)
    axes = at.once(("there", query.device), lambda: (at.query_axes.to(query.device), at.key_axes.to(query.device)))
    if axes[1].shape[-1] != key.shape[2]:
        key, value, attention_mask, axes = _known_keys(module, at, key, value, attention_mask, axes)
    parts, window = remapping.bands.parts, kwargs.get("sliding_window")
    if not parts or (window is not None and sees_one_band(parts[0], window)):
        return _near_attention(module, layout, at, axes, query, key, value, attention_mask, **kwargs)
    return _far_attention(module, layout, at, axes, query, key, value, attention_mask, **kwargs)


@torch.compiler.disable
def _paged_attention(
    remapping: Remapping,
    module: nn.Module,
    layout: LayerLayout | None,
    at: Positions | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Attention of a step of continuous batching (1, tokens, heads, dim), 0 for tokens that pad it."""
    if at is not None and at.memo.setdefault(("paged", module), kwargs) is not kwargs:
        raise UnsupportedModelError(not_paged(module, "attends twice, and a page keeps the keys of one call"))
    key, value = kwargs.pop("cache").update(key, value, module.layer_idx, kwargs)
    split = functools.partial(requests_of, module, remapping.base, at, query, kwargs)
    # Layers with as many keys have the same requests: a window does nothing but drop keys.
    requests = split() if at is None else at.once(("requests", key.shape[2], kwargs.get("sliding_window")), split)
    out = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1])
    for request in requests:
        keys, values = key[:, :, request.keys], value[:, :, request.keys]
        queries = query[:, :, request.queries]
        attended = _attention_at(remapping, module, layout, request.at, queries, keys, values, request.mask, **kwargs)
        out[:, request.queries] = attended[0]
    return out


def _near_attention(
    module: nn.Module,
    layout: LayerLayout,
    at: Positions,
    axes: tuple[torch.Tensor, torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **kwargs: Any,
) -> Attended:
    """All pairs are at the positions of the model: rotate, then attend as the unpatched model does."""
    remapping = at.state.remapping
    key, rotated, _ = cached_keys(module, layout, at, key, query.shape[2])
    if not at.rotated:
        query = _rotations(layout.query, at, query, "same", (SAME,), axes[0])[0]
    query = _scaled(query, at, axes[0], _scale(module, remapping))
    if not rotated:
        key = _rotations(layout.key, at, key, "same", (SAME,), axes[1])[0]
    return _base_attention(remapping.base, module, query, key, value, mask, **kwargs)


def _far_attention(
    module: nn.Module,
    layout: LayerLayout,
    at: Positions,
    axes: tuple[torch.Tensor, torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **kwargs: Any,
) -> Attended:
    """Pairs in several bands: rotate queries and keys for each, then attend to all of them by one softmax."""
    remapping = at.state.remapping
    bands = remapping.bands
    unknown = [name for name, given in kwargs.items() if given is not None and name in remapping.refused]
    if unknown:
        raise UnsupportedModelError(
            f"{type(module).__name__} asks its attention for {', '.join(unknown)}, which remapping cannot honour"
        )
    if remapping.base == "sdpa":
        kwargs.pop("softcap", None)  # SDPA has none: transformers 5.10.1 leaves it out, later ones use eager attention
    if mask is None and query.shape[2] > 1 and not _is_causal(remapping.base, module, kwargs):
        raise UnsupportedModelError(both_sides(remapping, type(module).__name__, "no mask, and not causal"))
    places = axes if axes[0].ndim == 2 else (axes[0][0], axes[1] if axes[1].ndim == 2 else axes[1][0])
    # not where a sliding cache has dropped keys; chunks are bands where rows begin at position 0, windows anywhere
    aligned = (
        at.slot is None
        and places[1].shape[1] == at.keys.shape[1]
        and (at.aligned or at.regular and all(map(_slides, bands.parts)))
    )
    scaling = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
    plain = not any(kwargs.get(name) is not None for name in ("softcap", "s_aux")) and not kwargs.get("dropout")
    whole = at.rotated and aligned and mask is None and plain and not at.state.weights
    step = whole_step(layout, at, query, key, value, scaling) if whole else None
    key, rotated, last = cached_keys(module, layout, at, key, query.shape[2], leave=step is not None)
    if step is not None:
        return step(
            _scaled(query, at, axes[0], _scale(module, remapping)), key, value, -1 if last is None else last
        ), None
    if at.rotated:
        queries = step_queries(layout.query, at, query)
    else:
        queries = _rotations(layout.query, at, query, "query", bands.query_maps, axes[0])
    scale = _scale(module, remapping)
    queries = [_scaled(one, at, axes[0], scale) for one in queries]
    keys = [key] if rotated else _rotations(layout.key, at, key, "key", bands.key_maps, axes[1])
    branches = [
        Branch(part, queries[i], key if rotated else keys[j])
        for part, i, j in zip(bands.parts, bands.query_choice, bands.key_choice, strict=True)
    ]
    options = {
        "scaling": scaling,
        "softcap": kwargs.get("softcap"),
        "sinks": kwargs.get("s_aux"),
        "dropout": kwargs.get("dropout") or 0.0,
    }
    if at.state.weights:
        return _attention_with_weights(branches, value, *places, mask, **options)
    out = banded_attention(branches, value, *places, mask=mask, aligned=aligned, **options)
    if mask is not None and mask.dtype == torch.bool and at.slot is None:
        # as SDPA: 0 where a query attends to nothing. Recurrent Gemma's convolutions read such padding
        out = out.masked_fill(~mask.any(-1).transpose(1, 2)[..., None], 0)
    return out, None


_outside_of_graphs: Any = torch.compiler.disable(_late_attention)  # type: ignore[no-untyped-call]


def _known_keys(
    module: nn.Module,
    at: Positions,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    axes: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, torch.Tensor]]:
    """Keys, values, mask and positions of as many keys: a cache has free slots, or has dropped keys behind a window.

    Raises:
        EvaluationError: neither is so; other code has added keys, or taken some away.
    """
    layers: list[Any] = getattr(at.state.cache, "layers", [])
    index: Any = getattr(module, "layer_idx", None)
    if index is not None and 0 <= index < len(layers):  # a layer may be shared, or share the keys of another
        layers = [layers[index]]
    known, count = axes[1].shape[-1], key.shape[2]
    if known < count and any(getattr(layer, "max_cache_len", 0) >= count for layer in layers):
        if query_is_single(at) and torch.compiler.is_compiling():
            # a graph keeps the free slots, which are masked
            return key, value, mask, (axes[0], nn.functional.pad(axes[1], (0, count - known)))
        return key[:, :, :known], value[:, :, :known], None if mask is None else mask[..., :known], axes
    if known > count and any(getattr(layer, "is_sliding", False) for layer in layers):
        return key, value, mask, (axes[0], axes[1][..., -count:])  # the latest are left
    raise EvaluationError(
        f"{type(module).__name__} got {count} keys, and the positions of {known} are known. Layers that are called "
        "one by one, and caches that drop keys on their own, do not tell where their keys are: call the model itself, "
        "with a cache that keeps all keys, or undo the patch"
    )


def query_is_single(at: Positions) -> bool:
    """Return whether a forward is of one token."""
    return at.query_axes.shape[-1] == 1


def _only(mask: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """A mask (batch, 1, queries, keys) less the keys that an indexer did not select (batch, queries, selected).

    Its own attention does so by itself only if that is called eager or sdpa.
    """
    batch, queries, _ = selected.shape
    chosen = torch.zeros(batch, 1, queries, mask.shape[-1], dtype=torch.bool, device=mask.device)
    chosen = chosen.scatter(-1, selected[:, None].long(), True)
    return mask & chosen if mask.dtype == torch.bool else mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)


def sees_one_band(part: Band, window: int) -> bool:
    """Return whether a sliding window holds only pairs of a band that leaves positions as they are."""
    unmoved = part.query == part.key == SAME
    return unmoved and part.chunk == 1 and (part.high is None or window <= part.high)


def _slides(part: Band) -> bool:
    """Return whether a band is a window that moves with each query."""
    return part.chunk == 1 and part.keys_below is None


def _rotations(
    layout: Layout,
    at: Positions,
    states: torch.Tensor,
    what: str,
    rules: tuple[PositionMap, ...],
    positions: torch.Tensor,
) -> list[torch.Tensor]:
    """Queries or keys rotated to their positions under each of the maps. Phases are the same wherever `what` is."""

    def phases(some: tuple[PositionMap, ...]) -> Phases:
        lengths = at.lengths(positions) if any(rule.follows_rows for rule in some) else None
        moved = [mapped(positions, rule, lengths) for rule in some]
        slots = next((one.shape[-1] for one in moved if one.ndim > positions.ndim), 0)
        if slots:
            if positions.ndim == 3:
                raise UnsupportedModelError("Positions on several axes cannot be mapped by rotary pairs.")
            moved = [one if one.ndim == 3 else one[..., None].expand(*one.shape, slots) for one in moved]
            return layout.phases(*pair_phases(at, torch.cat(moved, -2), states), states.dtype)
        wanted = torch.cat(moved, -1)
        if not at.state.remapping.delta:
            return layout.phases(*phases_at(at, wanted, states), states.dtype)
        # the model has rotated by its own positions, and factor, already
        cos, sin = phases_at(at, wanted - torch.cat([positions] * len(some), -1), states)
        factor = getattr(at.site.module, f"{at.site.prefix}attention_scaling", 1.0)
        return layout.phases(cos / factor, sin / factor, states.dtype)

    step = positions.shape[-1] == 1  # it has many small operations: all maps at once
    rotated = []
    for number, some in enumerate([rules] if step else [(rule,) for rule in rules]):
        kind = what, number, layout.kind, positions.shape, states.dtype, states.device
        rotated.append(layout.rotate(states, at.once(kind, functools.partial(phases, some))))
    return list(rotated[0].chunk(len(rules), 2)) if step else rotated


def _scale(module: nn.Module, remapping: Remapping) -> QueryScale | None:
    """Query scale of a layer. Layers are numbered if the first ones have none: see `probe.py`."""
    scale, index = remapping.query_scale, getattr(module, "layer_idx", 0)
    return None if scale is None or scale.first_layer > index else scale


def _scaled(query: torch.Tensor, at: Positions, positions: torch.Tensor, scale: QueryScale | None) -> torch.Tensor:
    """Queries (batch, heads, tokens, dim) that grow with their positions (batch, tokens), on the first axis."""
    if scale is None:
        return query

    def make() -> torch.Tensor:
        first = positions if positions.ndim == 2 else positions[0]
        past = (first.float() + 1) / scale.length
        if scale.row is not None:
            past = (at.lengths(first).float() - scale.row.beyond) / scale.row.span
            factor = (1 + scale.temperature * past.clamp(min=1).log()) * scale.constant
        elif scale.step is None:
            factor = (1 + scale.temperature * past.clamp(min=1).log()).square() * scale.constant
        else:
            factor = (1 + scale.temperature * ((first + 1) // scale.step + 1).float().log()) * scale.constant
        if scale.log:
            factor = factor * ((first.float() + 1).log() / math.log(scale.length)).clamp(min=1)
        return factor.to(query.dtype)[:, None, :, None]

    return query * at.once(("scale", query.dtype, query.device), make)


def _attention_with_weights(
    branches: list[Branch],
    value: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    dropout: float,
) -> Attended:
    """Attention over bands with its weights (batch, heads, queries, keys), all of which are held, as in eager."""
    repeats = branches[0].query.shape[1] // value.shape[1]
    scores: torch.Tensor | None = None
    for part, query, key in branches:
        score = (query @ key.repeat_interleave(repeats, 1).mT).float() * scaling
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        faded = fade(part, query_positions, score.dtype)
        decayed = decay(part, query_positions[..., None] - key_positions[:, None], score.dtype)
        score = score if faded is None else score + faded[:, None, :, None]
        score = score if decayed is None else score + decayed[:, None]
        inside = belongs(part, query_positions, key_positions)[:, None]
        scores = torch.where(inside, score, torch.finfo(value.dtype).min if scores is None else scores)
    assert scores is not None
    least = torch.finfo(value.dtype).min
    if mask is None:
        queries, keys = scores.shape[-2:]
        causal = torch.ones(queries, keys, dtype=torch.bool, device=value.device).tril(keys - queries)
        scores = scores.masked_fill(~causal, least)
    else:
        scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask.clamp(min=least)
    if sinks is not None:
        extra = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, extra], -1)
    weights = scores.softmax(-1)[..., : value.shape[2]].to(value.dtype)
    weights = nn.functional.dropout(weights, dropout)
    return (weights @ value.repeat_interleave(repeats, 1)).transpose(1, 2).contiguous(), weights


def base_function(base: str, module: nn.Module) -> Callable[..., Attended]:
    """Return the attention function that an unpatched module would call."""
    if base == "sdpa":
        plain: Callable[..., Attended] = sdpa_attention_forward
        return plain
    homes = [sys.modules[cls.__module__] for cls in type(module).__mro__]
    eager: Any = next(home for home in homes if hasattr(home, "eager_attention_forward"))
    function: Callable[..., Attended] = eager.eager_attention_forward
    return function


def _base_attention(
    base: str, module: nn.Module, query: Any, key: Any, value: Any, mask: torch.Tensor | None, **kwargs: Any
) -> Attended:
    return base_function(base, module)(module, query, key, value, mask, **kwargs)


def _is_causal(base: str, module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether the attention of the unpatched model, without a mask, sees the past alone: eager attention never does,
    sdpa asks the call and then the module."""
    if base == "eager":
        return False
    said = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if said is None else said)


def arguments_read(function: Callable[..., Any]) -> frozenset[str]:
    """
    Return the names of arguments that an attention function reads: its parameters, and what it looks up by name.

    Trainers and collators hand all kinds of names down to the attention (`seq_idx`, `shift_labels`, the lengths of
    packed documents for FlashAttention). Which of them count is asked from the code of the unpatched function. A
    function in its place has to honour these, and no others.
    """
    plain = inspect.unwrap(function)
    code = getattr(plain, "__code__", None)
    texts = () if code is None else (value for value in code.co_consts if isinstance(value, str))
    return frozenset((*inspect.signature(plain).parameters, *texts))


class Lease:
    """Keeps the attention function in transformers' registries as long as a patched model needs it.

    Copies and pickles have a lease of their own.
    """

    def __init__(self) -> None:
        for name, mask in MASKS.items():
            register_attention(name, late_attention, mask)
        self.end = weakref.finalize(self, _end_lease)

    def __reduce__(self) -> tuple[type[Lease], tuple[()]]:
        return Lease, ()


def _end_lease() -> None:
    for name in MASKS:
        forget_attention(name)
