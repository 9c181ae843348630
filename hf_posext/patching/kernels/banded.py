"""Attention in which near and far pairs see different positions.

The parts of a plan are disjoint. Each block of queries scores the keys of each part once, and one softmax runs over
all of them: exact, and of memory linear in length, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from ...plan import Band
from .bands import belongs, decay, fade, octaves
from .choice import choose, forced
from .fused import Edges, FusedAttention, Piece, fused_attention, has_fused_gradients
from .plain import attend_pieces, attend_single
from .regions import attend_regions, regions

SCORE_BYTES = 16 * 2**20
"""Float32 scores that are held at a time."""

FUSED_ROWS = 192
"""Queries in a block where a fused kernel holds no scores: shorter blocks have less at their edges, but more calls.
This divides chunks of three quarters of a power of two, so that no block lies in two of them."""


class Branch(NamedTuple):
    """One part with its rotated queries (batch, heads, queries, dim) and keys (batch, key heads, keys, dim)."""

    part: Band
    query: torch.Tensor
    key: torch.Tensor


def banded_attention(
    branches: list[Branch],
    value: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    aligned: bool,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Causal attention over disjoint parts.

    Args:
        branches (`list[Branch]`): the parts, with queries and keys rotated for each.
        value (`torch.Tensor` of shape `(batch, key heads, keys, dim)`): values.
        query_positions (`torch.Tensor` of shape `(batch, queries)`): positions before any remapping.
        key_positions (`torch.Tensor` of shape `(batch, keys)`): the same of the keys.
        mask (`torch.Tensor` broadcastable to `(batch, heads, queries, keys)`, *optional*): bool (attend) or additive;
            without it, the last query sees all keys and each one before it one key less.
        aligned (`bool`): positions are the indices of the keys, so that parts are bands of the score matrix.
        scaling (`float`): scores are multiplied by it.
        softcap (`float`, *optional*): scores become `softcap * tanh(scores / softcap)`.
        sinks (`torch.Tensor` of shape `(heads,)`, *optional*): a learned score of attending to nothing.
        dropout (`float`, *optional*, defaults to 0): of attention weights.

    Returns:
        `torch.Tensor` of shape `(batch, queries, heads, dim)`: contiguous.
    """
    if any(states.dtype != value.dtype for branch in branches for states in (branch.query, branch.key)):
        # under autocast, rotation leaves float32 beside bfloat16; as SDPA does, the narrower is taken
        branches = [Branch(part, *(one.to(value.dtype) for one in states)) for part, *states in branches]
    # kernels that are called directly take channels to lie one behind the other, and do not look
    value = _adjacent(value)
    branches = [Branch(part, *map(_adjacent, states)) for part, *states in branches]
    batch, heads, queries, width = branches[0].query.shape
    key_heads, keys = value.shape[1:3]
    learning = torch.is_grad_enabled() and any(
        states is not None and states.requires_grad
        for states in (sinks, value, *(states for branch in branches for states in (branch.query, branch.key)))
    )
    wide = torch.promote_types(value.dtype, torch.float32)
    fades = [fade(branch.part, query_positions, wide) for branch in branches]
    kernel = choose(branches[0].query, value) if aligned and mask is None else None
    if kernel is not None and not (learning or softcap or dropout):
        places = [regions(branch.part, queries, keys) for branch in branches]
        if all(place is not None for place in places):
            each = [
                (place or [], one.query, one.key, shift)
                for place, one, shift in zip(places, branches, fades, strict=True)
            ]
            return attend_regions(each, value, kernel, scaling, sinks)
    parts = [branch.part for branch in branches]
    dtype = value.dtype

    def pieces(start: int, stop: int, edges: Edges) -> list[Piece]:
        first, last = keys - queries + start, keys - queries + stop
        here = mask if mask is None or mask.shape[2] == 1 else mask[:, :, start:stop]
        found = []
        for number, (part, faded) in enumerate(zip(parts, fades, strict=True)):
            # a row of them for each head behind the same key head
            shift = None if faded is None else faded[:, None, start:stop].repeat(1, 1, heads // key_heads)
            for low, high, constant in _rectangles(part, first, last, keys, aligned, causal=mask is None):
                if constant is not None:
                    found.append(Piece(number, low, high, None, shift if not constant else _summed(shift, constant)))
                    continue
                alike = (number, first % part.chunk, last - first, low - first, high - first)
                bias = edges.get(alike)
                if bias is None:
                    places = query_positions[:, start:stop], key_positions[:, low:high]
                    bias = _bias(part, *places, dtype, here, (first, last), (low, high))
                    # a row of scores for each head behind the same key head
                    shape = (bias.shape[0], key_heads, -1, high - low)
                    bias = bias.repeat(1, 1, heads // key_heads, 1) if bias.shape[1] == 1 else bias.reshape(shape)
                    if aligned and mask is None:  # all blocks have the same edges, but for where chunks begin
                        edges[alike] = bias
                found.append(Piece(number, low, high, bias, shift))
        return found

    states = [branch.query for branch in branches], [branch.key for branch in branches]
    fused = value.device.type == "cpu" and value.shape[-1] == width and not (softcap or dropout)
    if fused and forced() in (None, "cpu"):
        if not learning:
            return fused_attention(pieces, *states, value, sinks, scaling, FUSED_ROWS)
        if has_fused_gradients(mask):
            given = pieces, scaling, FUSED_ROWS, sinks, value
            learned: torch.Tensor = FusedAttention.apply(*given, *states[0], *states[1])  # type: ignore[no-untyped-call]
            return learned

    key = states[1][0]
    if queries == 1 and all(one is key for one in states[1]):
        seen = [belongs(part, query_positions, key_positions) for part in parts]
        shifts = [
            _summed(None if faded is None else faded[..., None], _decay(part, query_positions, key_positions, wide))
            for part, faded in zip(parts, fades, strict=True)
        ]
        return attend_single(states[0], key, value, seen, shifts, mask, scaling, sinks, softcap, dropout)

    def attend(start: int, stop: int) -> torch.Tensor:
        query = [one[:, :, start:stop] for one in states[0]]
        block = attend_pieces(pieces(start, stop, edges), query, states[1], value, scaling, sinks, softcap, dropout)
        return block.view(batch, heads, stop - start, -1).transpose(1, 2)

    edges: Edges = {}
    rows = max(16, SCORE_BYTES // (4 * batch * heads * keys))
    if rows >= queries:
        return attend(0, queries).contiguous()  # some models view it
    spans = [(start, min(start + rows, queries)) for start in range(0, queries, rows)]
    if learning:  # the weights of all blocks are of quadratic size: they are computed again in backward
        return torch.cat([checkpoint(attend, *span, use_reentrant=False) for span in spans], 1)
    out = value.new_empty(batch, queries, heads, value.shape[-1])
    for start, stop in spans:
        out[:, start:stop] = attend(start, stop)
    return out


def _adjacent(states: torch.Tensor) -> torch.Tensor:
    return states if states.stride(-1) == 1 else states.contiguous()


def _rectangles(
    part: Band, first: int, last: int, keys: int, aligned: bool, causal: bool
) -> Iterator[tuple[int, int, float | None]]:
    """The keys of a part for queries `first` to `last - 1`: from, to, and what its decay adds to all of these logits;
    `None` where that is not the same for all, or where some of the queries do not see some of the keys.

    Where parts are bands, keys that no query of the block sees are left out, and those that all of them see need no
    bias: on a long input nearly all scores are there.
    """
    low, high = _band(part, first, last, keys) if aligned else (0, min(last, keys) if causal else keys)
    # from the farthest octave of a decay to the nearest, which is from the first key to the last
    for octave, constant in reversed(list(octaves(part, last)) if aligned and causal else []):
        start, stop = _inner(octave, first, last, low, high)
        if stop - start <= 4 * (last - first):  # not worth a rectangle of its own
            continue
        if low < start:
            yield low, start, None
        yield start, stop, constant
        low = stop
    if low < high:
        yield low, high, None


def _band(part: Band, first: int, last: int, keys: int) -> tuple[int, int]:
    """The range of keys that some of the queries `first` to `last - 1` see in a part."""
    oldest = 0 if part.high is None else (first // part.chunk - part.high + 1) * part.chunk
    newest = ((last - 1) // part.chunk - part.low + 1) * part.chunk
    return max(oldest, 0), min(newest, last, keys, keys if part.keys_below is None else part.keys_below)


def _inner(part: Band, first: int, last: int, low: int, high: int) -> tuple[int, int]:
    """The range of keys, within `low` to `high - 1`, that all of the queries `first` to `last - 1` see in a part."""
    oldest = low if part.high is None else ((last - 1) // part.chunk - part.high + 1) * part.chunk
    newest = min((first // part.chunk - part.low + 1) * part.chunk, first + 1)
    return max(oldest, low), min(newest, high)


def _decay(
    part: Band, query_positions: torch.Tensor, key_positions: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | None:
    """Return the bias of a band's decay on logits (batch, queries, keys); `None` if it has none."""
    if part.decay is None:
        return None
    return decay(part, query_positions[..., :, None] - key_positions[..., None, :], dtype)


def _summed(one: Any, other: Any) -> Any:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _bias(
    part: Band,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    dtype: torch.dtype,
    mask: torch.Tensor | None,
    rows: tuple[int, int],
    columns: tuple[int, int],
) -> torch.Tensor:
    """The decay and the mask's own number where a pair is attended, the least number of a dtype elsewhere; float32 or
    float64.

    That number is finite, so that a query that attends to nothing (padding, which no one reads) gets no NaN.
    """
    allowed = belongs(part, query_positions, key_positions)[:, None]
    least = torch.finfo(dtype).min
    bias = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=allowed.device)
    if mask is None:
        index = torch.arange(*columns, device=allowed.device)
        allowed = allowed & (index <= torch.arange(*rows, device=allowed.device)[:, None])
    elif mask.dtype == torch.bool:
        allowed = allowed & mask[..., slice(*columns)]
    else:
        bias = mask[..., slice(*columns)].to(bias.dtype).clamp(min=least)
    decayed = _decay(part, query_positions, key_positions, bias.dtype)
    if decayed is not None:
        bias = bias + decayed[:, None]
    return torch.where(allowed, bias, least)
