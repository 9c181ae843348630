"""Attention over parts in a few large calls: a band, a causal triangle and rectangles, merged by log-sum-exp."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..plan import Part
from .attention_kernels import Kernel


class Region(NamedTuple):
    """Queries `rows` against `columns` of keys: all of them, or with `causal` up to the own one (a square), or with
    `window` the latest of those (the last query sees the last key)."""

    rows: slice
    columns: slice
    causal: bool = False
    window: int | None = None


def regions(part: Part, queries: int, keys: int) -> list[Region] | None:
    """The pairs of a part, whose positions are their indices, for the last `queries` of some keys; `None` where they
    are no such regions."""
    if part.keys_below is not None or (part.chunk == 1 and part.high is not None and part.low > 0):
        return None
    if part.chunk > 1:
        return list(_chunks(part, queries, keys))
    first = keys - queries
    if part.high is not None and part.high < keys:
        start = max(first - part.high + 1, 0)
        return [Region(slice(0, queries), slice(start, keys), window=part.high)]
    return list(_triangle(slice(max(part.low - first, 0), queries), 0, keys - part.low))


def _triangle(rows: slice, low: int, high: int) -> Iterator[Region]:
    """Keys `low` to `high - 1` for queries of which the last sees all and each one before it one less."""
    if rows.start >= rows.stop:
        return
    square = high - (rows.stop - rows.start)
    if square > low:
        yield Region(rows, slice(low, square))
    yield Region(rows, slice(square, high), causal=True)


def _chunks(part: Part, queries: int, keys: int) -> Iterator[Region]:
    first, size = keys - queries, part.chunk
    for chunk in range(first // size, (keys - 1) // size + 1):
        begin, end = max(chunk * size, first), min((chunk + 1) * size, keys)
        rows = slice(begin - first, end - first)
        low = 0 if part.high is None else max((chunk - part.high + 1) * size, 0)
        if part.low == 0:
            yield from _triangle(rows, low, end)
        elif (high := (chunk - part.low + 1) * size) > low:
            yield Region(rows, slice(low, high))


class Merged:
    """One softmax from pieces of it: values (batch, heads, queries, dim) and their log-sum-exp in float32."""

    def __init__(self, query: torch.Tensor, value: torch.Tensor) -> None:
        dtype = torch.promote_types(query.dtype, torch.float32)
        self.out = value.new_zeros(*query.shape[:3], value.shape[-1])
        self.total = torch.full(query.shape[:3], -torch.inf, dtype=dtype, device=query.device)

    def add(self, rows: slice, out: torch.Tensor, total: torch.Tensor) -> None:
        """A piece for some of the queries."""
        before, held = self.total[:, :, rows], self.out[:, :, rows]
        both = torch.logaddexp(before, total.to(before.dtype))
        # 0 - 0 where nothing has been attended so far, nor is here
        kept, new = ((one - both).exp().nan_to_num(0)[..., None] for one in (before, total))
        held.copy_((held * kept).addcmul_(out.to(kept.dtype), new))
        before.copy_(both)

    def add_sinks(self, sinks: torch.Tensor) -> None:
        """Scores (heads,) of attending to nothing."""
        sinks = sinks.to(self.total.dtype)[:, None]
        self.out.mul_((self.total - torch.logaddexp(self.total, sinks)).exp()[..., None])


def attend_regions(
    states: list[tuple[list[Region], torch.Tensor, torch.Tensor]],
    value: torch.Tensor,
    kernel: Kernel,
    scaling: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention over the regions of some parts, each with the queries and keys that are rotated for it.

    Returns:
        `torch.Tensor` of shape `(batch, queries, heads, dim)`.
    """
    merged = Merged(states[0][1], value)
    for places, query, key in states:
        for rows, columns, causal, window in places:
            pair = key[:, :, columns], value[:, :, columns]
            merged.add(rows, *kernel(query[:, :, rows], *pair, scaling=scaling, causal=causal, window=window))
    if sinks is not None:
        merged.add_sinks(sinks)
    return merged.out.transpose(1, 2).contiguous()
