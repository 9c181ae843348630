"""Bands of query-key pairs: membership, mapped positions, logit shifts, and regions of the score matrix.

A fade depends on the number of keys in a band, a decay on the distance of a pair. Both are piecewise constant where
kernels need them to be. A fade is one number per query, so it shifts the log-sum-exp of the whole band. A decay is
constant within an octave of distances, so it shifts the log-sum-exp of each octave.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from ...plan import Band, PositionMap

SAME = PositionMap()
"""Map that leaves positions unchanged."""

STEP = 16
"""Divisor of the widths of rectangles of scores. Matrix products of other widths take up to a fifth longer."""


def mapped(positions: torch.Tensor, rule: PositionMap, lengths: torch.Tensor | None = None) -> torch.Tensor:
    """Return positions under a map of a band's queries or keys.

    `lengths` of the rows broadcast to the positions, and are required if the map follows rows. The result has a
    trailing dimension of frequency slots if the map has positions for each slot. It is floating-point if positions may
    be fractional.
    """
    if rule == SAME:
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
    wide = torch.float32 if positions.device.type == "mps" else torch.float64  # MPS has no float64
    if rule.row_curve is not None:
        curve, count = rule.row_curve, lengths.to(wide)
        rate = curve.limit / (1 + torch.exp(-(curve.slope * count + curve.shift))) / (count - 1).clamp(min=1)
        return torch.where(lengths > curve.beyond, (positions * rate).floor().to(positions.dtype), positions)
    assert rule.row_group is not None
    span, beyond = rule.row_group.span, rule.row_group.beyond
    if not rule.pair_shares:
        return positions // ((lengths - beyond + span - 1) // span).clamp(min=1)
    scale = ((lengths - beyond).to(wide) / span).clamp(min=1)
    shares = torch.tensor(rule.pair_shares, dtype=wide, device=positions.device)
    moved = positions[..., None] * (1 - shares * (1 - 1 / scale[..., None]))
    return moved if len(shares) > 1 else moved[..., 0]


def belongs(band: Band, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
    """Return the mask (batch, queries, keys) of the pairs in a band, given positions (batch, queries or keys)."""
    distance = (query_positions // band.chunk)[..., :, None] - (key_positions // band.chunk)[..., None, :]
    inside = distance >= band.low if band.low > 0 else torch.ones_like(distance, dtype=torch.bool)
    if band.high is not None:
        inside &= distance < band.high
    if band.keys_below is not None:
        inside &= key_positions[..., None, :] < band.keys_below
    return inside


def visible(mask: torch.Tensor) -> torch.Tensor:
    """Return an attention mask, bool or additive, as bool: `True` attends."""
    return mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask.bool()


def fade(band: Band, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Return the shift, 0 or less, that a band's fade adds to the logits of queries at positions (batch, queries)."""
    if band.fade is None:
        return None
    count = (positions // band.chunk - band.low + 1) * band.chunk
    return (count.to(dtype) / band.fade.reference).clamp(min=1).log() * -band.fade.strength


def decay(band: Band, distance: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Return the shift, 0 or less, that a band's decay adds to the logits of pairs at integer distances.

    It is 0 at distances below 0.
    """
    if band.decay is None:
        return None
    # the exponent of frexp is the bit length of an integer below 2 ** 24
    octave = torch.frexp((distance // band.decay.start).clamp(min=0).to(torch.float32)).exponent
    return (octave.to(dtype) - 0.5).clamp(min=0) * (-band.decay.strength * math.log(2))


def octaves(band: Band, reach: int) -> Iterator[tuple[Band, float]]:
    """Yield the bands into which a decay splits a band, up to distance `reach`, nearest first, and their shifts."""
    if band.decay is None:
        yield band, 0.0
        return
    low, last = band.low, reach if band.high is None else min(reach, band.high)
    while low < last:
        count = (low // band.decay.start).bit_length()
        edge = band.decay.start << count
        constant = -band.decay.strength * math.log(2) * max(count - 0.5, 0)
        yield replace(band, low=low, high=band.high if edge >= last else edge, decay=None), constant
        low = edge


def step_fading(bands: Sequence[Band], positions: torch.Tensor) -> torch.Tensor | None:
    """Return the logit shifts for the kernel of a decoding step, with queries at positions (batch, 1).

    They are in float32, of shape (batch, bands, 3): the fade of each band, the shift of its decay per octave, and the
    distance at which the decay starts. `None` if no band has a fade or a decay.
    """
    if all(band.fade is None and band.decay is None for band in bands):
        return None
    nothing = torch.zeros_like(positions, dtype=torch.float32)
    rows = []
    for band in bands:
        shift = fade(band, positions, torch.float32)
        rate, start = (0.0, 1) if band.decay is None else (-band.decay.strength * math.log(2), band.decay.start)
        rows.append([nothing if shift is None else shift, nothing + rate, nothing + min(start, 2**24)])
    return torch.stack([torch.cat(row, -1) for row in rows], 1)


class Bands:
    """Disjoint bands of a plan, and values that follow from them alone."""

    def __init__(self, bands: tuple[Band, ...]) -> None:
        self.bands = bands
        # distinct maps of queries and of keys, and for each band the indices of its maps among them
        self.query_maps, self.query_choice = _distinct(band.query for band in bands)
        self.key_maps, self.key_choice = _distinct(band.key for band in bands)
        self.edge = self._edge()
        self.nearest = self._key_map(0)  # map of a key at the newest token
        # maps of a key that leaves the window: in its last step inside, and from then on
        self.leaves = [self._key_map(self.edge - 1), self._key_map(self.edge)] if self.edge else []
        self.stays = self.query_maps.index(self.nearest) if self.nearest in self.query_maps else None
        self.onward = tuple(rule for rule in self.query_maps if rule != self.nearest)  # maps beyond the nearest
        self.chunked = any(band.chunk > 1 for band in bands)
        self.slide = not self.chunked and all(band.keys_below is None for band in bands)  # windows of each query

    def _key_map(self, distance: int) -> PositionMap:
        """Return the map of a key at a distance from the newest token, for bands that slide or share a key map."""
        inside = (band for band in self.bands if band.low <= distance and (band.high is None or distance < band.high))
        return next(inside, self.bands[0]).key if self.bands else SAME

    def _edge(self) -> int | None:
        """Return the window edge, the distance at which a key is rotated again. 0 if no key is rotated again.

        `None` if keys cannot stay rotated: with several edges, chunks, bands limited by `keys_below`, or maps by
        rotary pair.
        """
        if any(band.key.by_pair or band.query.by_pair for band in self.bands):
            return None
        if len(self.key_maps) <= 1:
            return 0
        if any(band.chunk > 1 or band.keys_below is not None for band in self.bands):
            return None
        edges = {edge for band in self.bands for edge in (band.low, band.high) if edge}
        return edges.pop() if len(edges) == 1 else None

    def sees_one(self, window: int | None) -> bool:
        """Return whether a layer with a sliding window sees all pairs at the positions of the model.

        It does without bands, or if the window contains only pairs of a band that leaves positions unchanged.
        """
        if not self.bands:
            return True
        near = self.bands[0]
        unmoved = near.query == near.key == SAME and near.chunk == 1
        return window is not None and unmoved and (near.high is None or window <= near.high)

    def rotated_positions(self, newest: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return the positions to which keys (rows, keys) are rotated for a query at `newest` (rows, 1)."""
        targets = mapped(keys, self.bands[0].key) if self.bands else keys
        for band in self.bands[1:] if len(self.key_maps) > 1 else ():
            targets = torch.where(belongs(band, newest, keys)[:, 0], mapped(keys, band.key), targets)
        return targets

    def step_positions(self, newest: torch.Tensor) -> torch.Tensor:
        """Return all positions that a decoding step at `newest` (batch or 1, 1) requests from its rotary module.

        These are the position for the model's own rotation, then the positions from which further rotations start,
        then the positions at which these end. The query is rotated further for each other band, and a key when it
        leaves the window. These rotations are computed from the phases of both positions. The phases of their
        difference would be another rotation at far positions, because a module rounds angles to float32.
        """
        nearest, *further = (mapped(newest, rule) for rule in (self.nearest, *self.onward))
        leaving = self.crossing(newest)
        return torch.cat([nearest, *[nearest] * len(further), *leaving[:1], *further, *leaving[1:]], -1)

    def crossing(self, newest: torch.Tensor) -> list[torch.Tensor]:
        """Return the positions, inside and outside of the window, of the key that the token at `newest` pushes out.

        Empty if no key is rotated again.
        """
        if not self.edge:
            return []
        position = (newest - self.edge).clamp(min=0)
        return [mapped(position, rule) for rule in self.leaves]

    def leaving(self, count: int) -> int | None:
        """Return the index, among `count` keys, of the key that the newest one pushes out of the window, or `None`."""
        return count - 1 - self.edge if self.edge and count > self.edge else None


def _distinct(maps: Iterable[PositionMap]) -> tuple[tuple[PositionMap, ...], tuple[int, ...]]:
    maps = tuple(maps)
    distinct = tuple(dict.fromkeys(maps))
    return distinct, tuple(distinct.index(rule) for rule in maps)


class Region(NamedTuple):
    """Region of the score matrix: queries `rows` against keys `columns`.

    By default, a query sees all of these keys. With `causal` (as many queries as keys), it sees the keys up to its
    own. With `window`, it sees the latest `window` keys up to its own, and the last query is aligned with the last
    key. `constant` is added to all logits.
    """

    rows: slice
    columns: slice
    causal: bool = False
    window: int | None = None
    constant: float = 0.0


def regions(band: Band, queries: int, keys: int) -> list[Region] | None:
    """Return the regions of a band for the last `queries` of `keys` tokens, whose positions equal their indices.

    `None` if the band cannot be divided into regions.
    """
    if band.keys_below is not None:
        return None
    if band.chunk > 1:
        return list(_chunks(band, queries, keys))
    first, places = keys - queries, []
    for octave, constant in octaves(band, keys):
        rows, newest = slice(max(octave.low - first, 0), queries), keys - octave.low
        if octave.high is None or octave.high >= keys:
            stripe = list(_triangle(rows, 0, newest))
        else:
            start = max(first + rows.start - octave.high + 1, 0)
            window = octave.high - octave.low if rows.stop - rows.start > 1 else None
            stripe = [Region(rows, slice(start, newest), window=window)] if rows.start < rows.stop else []
        places += [region._replace(constant=constant) for region in stripe]
    return places


def starts(bands: Sequence[Band], keys: int) -> tuple[int, ...] | None:
    """Return the index of the first key that the newest token sees in each band.

    `None` unless the bands adjoin: each must end where the one before it starts, and the last must start at key 0.
    """
    firsts, stop = [], keys
    for band in bands:
        low, high = _span(band, keys - 1, keys - 1, keys)
        if max(high, 0) != stop:
            return None
        stop = min(low, stop)
        firsts.append(stop)
    return tuple(firsts) if stop == 0 else None


def _triangle(rows: slice, low: int, high: int) -> Iterator[Region]:
    # keys `low` to `high - 1`: the last query sees all of them, each earlier query one key less
    if rows.start >= rows.stop:
        return
    if rows.stop - rows.start == 1:
        yield Region(rows, slice(low, high))
        return
    square = high - (rows.stop - rows.start)
    if square > low:
        yield Region(rows, slice(low, square))
    yield Region(rows, slice(square, high), causal=True)


def _chunks(band: Band, queries: int, keys: int) -> Iterator[Region]:
    first, size = keys - queries, band.chunk
    for chunk in range(first // size, (keys - 1) // size + 1):
        begin, end = max(chunk * size, first), min((chunk + 1) * size, keys)
        rows = slice(begin - first, end - first)
        low = 0 if band.high is None else max((chunk - band.high + 1) * size, 0)
        if band.low == 0:
            yield from _triangle(rows, low, end)
        elif (high := (chunk - band.low + 1) * size) > low:
            yield Region(rows, slice(low, high))


def grouped(states: torch.Tensor, key_heads: int) -> torch.Tensor:
    """Concatenate the rows of heads that share a key head, into (batch, key heads, all rows, dim)."""
    return states.reshape(states.shape[0], key_heads, -1, states.shape[-1])


class Piece(NamedTuple):
    """Rectangle of scores: the queries of a block against the keys `low` to `high - 1` of a band.

    `bias` (batch or 1, key heads or 1, rows, keys) is added to the scores. It contains the decay and additive mask of
    attended pairs, and the minimum of the dtype for all others. It is `None` if all pairs are attended. `shift` is
    added as well: a number, or one per row, of shape (batch or 1, 1, rows). Each query head of a key head has its own
    rows.
    """

    band: int
    low: int
    high: int
    bias: torch.Tensor | None
    shift: torch.Tensor | float | None = None


@dataclass(eq=False)
class Geometry:
    """Positions in one forward, before any remapping, divided into bands. Shared by layers that see the same keys."""

    bands: Sequence[Band]  # disjoint
    queries: torch.Tensor  # positions (batch, queries)
    keys: torch.Tensor  # positions (batch, keys)
    # Bool (`True` attends) or additive, broadcastable to (batch, heads, queries, keys). Without a mask, the last query
    # sees all keys and each earlier query one key less.
    mask: torch.Tensor | None
    aligned: bool  # whether positions equal key indices; bands are then stripes of the score matrix
    _shifts: dict[torch.dtype, list[torch.Tensor | None]] = field(default_factory=dict, init=False)
    _strips: dict[tuple[int, torch.dtype], torch.Tensor] = field(default_factory=dict, init=False)
    _biases: dict[Any, torch.Tensor] = field(default_factory=dict, init=False)
    _ends: dict[tuple[int, int], int] = field(default_factory=dict, init=False)
    _pieces: dict[Any, list[Piece]] = field(default_factory=dict, init=False)

    def fades(self, dtype: torch.dtype) -> list[torch.Tensor | None]:
        """Return the logit shift (batch, queries) of each band's fade, or `None` for a band without a fade."""
        if dtype not in self._shifts:
            self._shifts[dtype] = [fade(band, self.queries, dtype) for band in self.bands]
        return self._shifts[dtype]

    def pieces(self, start: int, stop: int, group: int, dtype: torch.dtype, whole: bool = False) -> list[Piece]:
        """Return the rectangles of the queries `start` to `stop - 1`: one over all keys per band if `whole`.

        `group` query heads share a key head.

        Rectangles hold no states, because those belong to autograd and gradient checkpoints. They are cached if bands
        are stripes without a mask, or for a single query. Otherwise their biases are as large as a mask.
        """
        stays = self.mask is None and self.aligned and not whole or self.queries.shape[1] == 1
        kind = start, stop, group, dtype, whole
        pieces = self._pieces.get(kind) if stays else None
        if pieces is None:
            pieces = list(self._cut(start, stop, group, dtype, self.aligned and not whole))
            if stays:
                self._pieces[kind] = pieces
        return pieces

    def _cut(self, start: int, stop: int, group: int, dtype: torch.dtype, aligned: bool) -> Iterator[Piece]:
        first, last = (self.keys.shape[1] - self.queries.shape[1] + row for row in (start, stop))
        mask, wide = self.mask, torch.promote_types(dtype, torch.float32)
        block_mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, start:stop]
        end = self._end(start, stop, block_mask, aligned)
        for number, (band, faded) in enumerate(zip(self.bands, self.fades(wide), strict=True)):
            shift = None if faded is None else faded[:, None, start:stop].repeat(1, 1, group)
            for low, high, constant in _rectangles(band, first, last, end, aligned, causal=mask is None):
                if constant is not None:
                    total = constant if shift is None else shift + constant
                    yield Piece(number, low, high, None, total if constant else shift)
                    continue
                # blocks have the same edges, except for the offset within a chunk, so they share their biases
                place = first % band.chunk if band.keys_below is None else first
                edges = number, place, last - first, low - first, high - first, group, dtype
                bias = self._biases.get(edges)
                if bias is None:
                    if aligned and mask is None and band.chunk == 1 and band.keys_below is None:
                        bias = self._diagonals(number, dtype, (first, last), (low, high), group)
                    else:
                        positions = self.queries[:, start:stop], self.keys[:, low:high]
                        bias = _bias(band, *positions, dtype, block_mask, (first, last), (low, high))
                        heads = bias.shape[1]
                        bias = bias.repeat(1, 1, group, 1) if heads == 1 else grouped(bias, heads // group)
                    if aligned and mask is None:
                        self._biases[edges] = bias
                yield Piece(number, low, high, bias, shift)

    def _diagonals(
        self, number: int, dtype: torch.dtype, rows: tuple[int, int], columns: tuple[int, int], group: int
    ) -> torch.Tensor:
        """Return [`_bias`] of a band whose bias depends on the distance only, for `group` query heads.

        Each row is a piece of one strip: the row of a query behind all keys, and before as many as there are queries.
        """
        strip, keys = self._strips.get((number, dtype)), self.keys.shape[1]
        if strip is None:
            length = keys + self.queries.shape[1]
            places = torch.arange(length, device=self.keys.device)[None]
            strip = _bias(
                self.bands[number], places[:, keys : keys + 1], places, dtype, None, (keys, keys + 1), (0, length)
            )
            self._strips[number, dtype] = strip = strip.flatten()
        width, start = columns[1] - columns[0], keys + 1 - rows[1] + columns[0]
        last_first = strip[start : start + width + rows[1] - rows[0] - 1].unfold(0, width, 1)
        return last_first.flip(0).repeat(1, 1, group, 1)

    def _end(self, start: int, stop: int, mask: torch.Tensor | None, aligned: bool) -> int:
        """Return the end of the keys that the queries `start` to `stop - 1` may see, given their rows of the mask.

        A mask may let queries see later keys, for example those of the same picture.
        """
        keys = self.keys.shape[1]
        last = min(keys - self.queries.shape[1] + stop, keys)
        if mask is None or last == keys:
            return last
        if not aligned:
            return keys
        if (start, stop) not in self._ends:
            self._ends[start, stop] = keys if bool(visible(mask[..., last:]).any()) else last
        return self._ends[start, stop]


def _rectangles(
    band: Band, first: int, last: int, end: int, aligned: bool, causal: bool
) -> Iterator[tuple[int, int, float | None]]:
    """Yield the key ranges of a band for the queries `first` to `last - 1`: start, stop, and the shift of its decay.

    Keys from `end` on are left out, because none of these queries sees them. The shift is `None` if it varies within
    the range, or if some of the queries do not see some of the keys. Such a range needs a bias. If bands are stripes,
    keys that no query of the block sees are left out, and keys that all of them see need no bias. On a long input,
    nearly all scores are of the latter kind.
    """
    rows = last - first
    low, high = _span(band, first, last - 1, end) if aligned else (0, end)
    step = STEP if rows >= STEP else 1

    def before(key: int) -> int:
        return max(last + (key - last) // step * step, 0)

    def behind(key: int) -> int:
        return min(last - (last - key) // step * step, end)

    # Go from the farthest octave of a decay to the nearest, that is, from the first key to the last. For a single
    # query, one bias over all octaves costs less than one call per octave.
    constants = aligned and causal and (band.decay is None or rows > 1)
    for octave, constant in reversed(list(octaves(band, last)) if constants else []):
        start, stop = _span(octave, last - 1, first, first + 1)  # what all of these queries see
        start = low if start <= low else behind(start)
        stop = high if stop >= high else before(stop)
        if stop - start < rows:  # too few keys to be worth a separate call
            continue
        if low < start:
            yield before(low), start, None
        yield start, stop, constant
        low = stop
    if low < high:
        yield before(low), behind(high), None


def _span(band: Band, first: int, last: int, end: int) -> tuple[int, int]:
    """Return the range from the first key of a band for query `first` to the last one, before `end`, for `last`."""
    oldest = 0 if band.high is None else max((first // band.chunk - band.high + 1) * band.chunk, 0)
    newest = (last // band.chunk - band.low + 1) * band.chunk if band.low else end
    return oldest, min(newest, end if band.keys_below is None else min(end, band.keys_below))


def _bias(
    band: Band,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    dtype: torch.dtype,
    mask: torch.Tensor | None,
    rows: tuple[int, int],
    columns: tuple[int, int],
) -> torch.Tensor:
    """Return the bias of a rectangle, in float32 or float64.

    Attended pairs have their decay plus the value of an additive mask. All others have the minimum of `dtype`. The
    minimum is finite, so that a query that attends to nothing (padding, whose output is never read) does not become
    NaN.
    """
    allowed = belongs(band, query_positions, key_positions)[:, None]
    least = torch.finfo(dtype).min
    bias = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=allowed.device)
    if mask is None:
        index = torch.arange(*columns, device=allowed.device)
        allowed = allowed & (index <= torch.arange(*rows, device=allowed.device)[:, None])
    elif mask.dtype == torch.bool:
        allowed = allowed & mask[..., slice(*columns)]
    else:
        bias = mask[..., slice(*columns)].to(bias.dtype).clamp(min=least)
    decayed = decay(band, query_positions[..., :, None] - key_positions[..., None, :], bias.dtype)
    if decayed is not None:
        bias = bias + decayed[:, None]
    return torch.where(allowed, bias, least)
