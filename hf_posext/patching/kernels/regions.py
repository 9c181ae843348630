"""Attention over parts in a few large calls: a band, a causal triangle and rectangles, merged by log-sum-exp."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ...plan import Band
from .bands import octaves
from .choice import one_pass
from .cuda import Kernel


class Region(NamedTuple):
    """Queries `rows` against `columns` of keys: all of them, or with `causal` up to the own one (a square), or with
    `window` the latest of those (the last query sees the last key). `constant` is added to all logits."""

    rows: slice
    columns: slice
    causal: bool = False
    window: int | None = None
    constant: float = 0.0


def regions(part: Band, queries: int, keys: int) -> list[Region] | None:
    """The pairs of a part, whose positions are their indices, for the last `queries` of some keys; `None` where they
    are no such regions."""
    if part.keys_below is not None:
        return None
    if part.chunk > 1:
        return list(_chunks(part, queries, keys))
    return [
        region._replace(constant=constant)
        for octave, constant in octaves(part, keys)
        for region in _distances(octave, queries, keys)
    ]


def _distances(part: Band, queries: int, keys: int) -> Iterator[Region]:
    """The pairs of a part that is bounded by distances."""
    first, newest = keys - queries, keys - part.low  # the last query sees keys up to but not `newest`
    rows = slice(max(part.low - first, 0), queries)
    if part.high is None or part.high >= keys:
        yield from _triangle(rows, 0, newest)
    elif rows.start < rows.stop:
        start = max(first + rows.start - part.high + 1, 0)
        yield Region(rows, slice(start, newest), window=part.high - part.low if rows.stop - rows.start > 1 else None)


def starts(parts: Sequence[Band], keys: int) -> tuple[int, ...] | None:
    """The first key that the newest token sees in each part, where each ends at the start of the one before it."""
    found, stop = [], keys
    for part in parts:
        for one in regions(replace(part, decay=None), 1, keys) or [Region(slice(0, 1), slice(0, 0))]:
            if one.columns.stop != stop:
                return None
            stop = one.columns.start
        found.append(stop)
    return tuple(found) if stop == 0 else None


def _triangle(rows: slice, low: int, high: int) -> Iterator[Region]:
    """Keys `low` to `high - 1` for queries of which the last sees all and each one before it one less."""
    if rows.start >= rows.stop:
        return
    if rows.stop - rows.start == 1:
        yield Region(rows, slice(low, high))
        return
    square = high - (rows.stop - rows.start)
    if square > low:
        yield Region(rows, slice(low, square))
    yield Region(rows, slice(square, high), causal=True)


def _chunks(part: Band, queries: int, keys: int) -> Iterator[Region]:
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
        self.query, self.value = query, value
        self.empty = True

    def add(self, rows: slice, out: torch.Tensor, total: torch.Tensor) -> None:
        """A piece for some of the queries, all of which attend to some of its keys; its tensors are not used again."""
        if self.empty:
            self.empty = False
            if out.shape[2] == self.query.shape[2]:
                self.out, self.total = out, total
                return
            self.out, self.total = self._nothing(total.dtype)
        held, held_sum = self.out[:, :, rows], self.total[:, :, rows]
        fused = one_pass(held)
        if fused is not None:
            fused.merge(held, held_sum, out, total)
            return
        share = torch.sigmoid(total - held_sum)[..., None]
        held.copy_(torch.lerp(held.to(share.dtype), out.to(share.dtype), share))
        held_sum.copy_(torch.logaddexp(held_sum, total))

    def _nothing(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        batch, heads, queries, _ = self.query.shape
        out = self.value.new_zeros(batch, queries, heads, self.value.shape[-1]).transpose(1, 2)
        return out, torch.full((batch, heads, queries), -torch.inf, dtype=dtype, device=self.query.device)

    def add_sinks(self, sinks: torch.Tensor) -> None:
        """Scores (heads,) of attending to nothing."""
        sinks = sinks.to(self.total.dtype)[:, None]
        self.out.mul_((self.total - torch.logaddexp(self.total, sinks)).exp()[..., None])


def attend_regions(
    states: list[tuple[list[Region], torch.Tensor, torch.Tensor, torch.Tensor | None]],
    value: torch.Tensor,
    kernel: Kernel,
    scaling: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention over the regions of some parts, each with the queries and keys that are rotated for it, and with what
    is added to the logits of each query (batch or 1, queries), if anything is.

    Returns:
        `torch.Tensor` of shape `(batch, queries, heads, dim)`.
    """
    merged = Merged(states[0][1], value)
    for places, query, key, shift in states:
        for rows, columns, causal, window, constant in places:
            pair = key[:, :, columns], value[:, :, columns]
            out, total = kernel(query[:, :, rows], *pair, scaling=scaling, causal=causal, window=window)
            if constant:
                total = total + constant
            if shift is not None:
                total = total + shift[:, None, rows]
            merged.add(rows, out, total)
    if sinks is not None:
        merged.add_sinks(sinks)
    return merged.out.transpose(1, 2).contiguous()
