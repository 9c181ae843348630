"""Bands: which pairs are in one, the positions that it sees, and what is taken from its logits.

A fade counts the keys of a band, a decay their distance. Both are piecewise constant where kernels need them to be. A
fade is one number for each query, so it shifts the log-sum-exp of the whole band. A decay is constant within an octave
of distances, so it shifts that of each octave.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from ...plan import Band, PositionMap


def mapped(positions: torch.Tensor, rule: PositionMap, lengths: torch.Tensor | None = None) -> torch.Tensor:
    """Return the positions that a part sees.

    Args:
        positions (`torch.LongTensor`): of tokens, before any remapping.
        rule (`PositionMap`): what the part does to them.
        lengths (`torch.LongTensor` that broadcasts to the positions, *optional*): of the rows, for a map that follows
            them.

    Returns:
        `torch.Tensor` of the same shape, with another dimension for slots of frequencies where the map has positions
        for each. Floating-point where positions may be fractional.
    """
    if rule == PositionMap():
        return positions
    moved = positions if rule.modulo is None else positions % rule.modulo
    moved = _grouped(moved, rule, lengths)
    if rule.kept:
        moved = moved + (rule.kept - _grouped(positions.new_full((1,) * positions.ndim, rule.kept), rule, lengths))
        if rule.row_curve is not None:
            assert lengths is not None
            moved = moved - (lengths > rule.row_curve.beyond).to(moved.dtype)
    if rule.rate != 1 or rule.offset != int(rule.offset):
        moved = moved.float() * rule.rate
    moved = moved + (int(rule.offset) if rule.offset == int(rule.offset) else rule.offset)
    return moved if rule.limit is None else moved.clamp(max=rule.limit)


def _grouped(positions: torch.Tensor, rule: PositionMap, lengths: torch.Tensor | None) -> torch.Tensor:
    """Return `f(p)` of a [`PositionMap`]."""
    if not rule.follows_rows:
        if rule.pair_groups:
            groups = torch.tensor(rule.pair_groups, device=positions.device)
            return positions // groups if len(groups) == 1 else positions[..., None] // groups
        return positions if rule.group == 1 else positions // rule.group
    assert lengths is not None, "a map that follows rows needs their lengths"
    if rule.row_curve is not None:
        curve, count = rule.row_curve, lengths.double()
        rate = curve.limit / (1 + torch.exp(-(curve.slope * count + curve.shift))) / (count - 1).clamp(min=1)
        return torch.where(lengths > curve.beyond, (positions * rate).floor().to(positions.dtype), positions)
    assert rule.row_group is not None
    span, beyond = rule.row_group.span, rule.row_group.beyond
    if not rule.pair_shares:
        return positions // ((lengths - beyond + span - 1) // span).clamp(min=1)
    scale = ((lengths - beyond).double() / span).clamp(min=1)
    shares = torch.tensor(rule.pair_shares, dtype=torch.float64, device=positions.device)
    moved = positions[..., None] * (1 - shares * (1 - 1 / scale[..., None]))
    return moved if len(shares) > 1 else moved[..., 0]


def belongs(part: Band, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
    """Mask of the pairs in a band: positions (batch, queries) and (batch, keys) give bool (batch, queries, keys)."""
    distance = (query_positions // part.chunk)[..., :, None] - (key_positions // part.chunk)[..., None, :]
    inside = distance >= part.low if part.low > 0 else torch.ones_like(distance, dtype=torch.bool)
    if part.high is not None:
        inside &= distance < part.high
    if part.keys_below is not None:
        inside &= key_positions[..., None, :] < part.keys_below
    return inside


def fade(part: Band, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Return what a band's count fade adds to the logits of queries.

    Args:
        part (`Band`): the band.
        positions (`torch.LongTensor` of shape `(batch, queries)`): positions of the queries before any remapping.
        dtype (`torch.dtype`): floating-point dtype of the result.

    Returns:
        `torch.Tensor` of shape `(batch, queries)`, 0 or less; `None` for a band without a fade.
    """
    if part.fade is None:
        return None
    count = (positions // part.chunk - part.low + 1) * part.chunk
    return (count.to(dtype) / part.fade.reference).clamp(min=1).log() * -part.fade.strength


def decay(part: Band, distance: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Return what a band's decay adds to the logits of pairs at integer distances: 0 or less, of the same shape;
    `None` for a band without a decay. Distances below 0 get 0."""
    if part.decay is None:
        return None
    # the exponent of frexp is the bit length of a whole number below 2 ** 24
    octave = torch.frexp((distance // part.decay.start).clamp(min=0).to(torch.float32)).exponent
    return (octave.to(dtype) - 0.5).clamp(min=0) * (-part.decay.strength * math.log(2))


def octaves(part: Band, reach: int) -> Iterator[tuple[Band, float]]:
    """Yield the bands into which a decay cuts a band, nearest first, and what it adds to their logits.

    Args:
        part (`Band`): the band; one without a decay is yielded as it is.
        reach (`int`): distances from here on do not occur.
    """
    if part.decay is None:
        yield part, 0.0
        return
    low, last = part.low, reach if part.high is None else min(reach, part.high)
    while low < last:
        count = (low // part.decay.start).bit_length()
        edge = part.decay.start << count
        constant = -part.decay.strength * math.log(2) * max(count - 0.5, 0)
        yield replace(part, low=low, high=part.high if edge >= last else edge, decay=None), constant
        low = edge


def step_fading(parts: Sequence[Band], positions: torch.Tensor) -> torch.Tensor | None:
    """Return what a kernel of a step adds to logits, for queries at positions (batch, 1).

    Returns:
        `torch.FloatTensor` of shape `(batch, parts, 3)`: for each band its fade, what its decay adds in an octave, and
        where that starts; `None` where no band has either.
    """
    if all(part.fade is None and part.decay is None for part in parts):
        return None
    nothing = torch.zeros_like(positions, dtype=torch.float32)
    rows = []
    for part in parts:
        shift = fade(part, positions, torch.float32)
        rate, start = (0.0, 1) if part.decay is None else (-part.decay.strength * math.log(2), part.decay.start)
        rows.append([nothing if shift is None else shift, nothing + rate, nothing + min(start, 2**24)])
    return torch.stack([torch.cat(row, -1) for row in rows], 1)
