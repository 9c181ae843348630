"""A step of decoding in one kernel of Triton: the turns of a layer, its attention, and the merge of its pieces.

Step by step a GPU waits for the host, which takes as long for each call as the GPU does for many: what PyTorch needs a
dozen calls for in each layer is one here. Keys and values are read once, in pieces that all multiprocessors share, and
the last to finish merges them (Dao et al., *Flash-Decoding*, 2023, https://pytorch.org/blog/flash-decoding).
[`choice.one_step`] tells where it is used.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

TILE = 2**14
"""Bytes of keys that a program reads at a time, and of values: three such pairs have room on a small GPU."""

PROGRAMS = 264
"""Programs that share the keys of a layer: two for each multiprocessor of an H100."""

PIECES = 64
"""Pieces that are merged at a time."""

MAX_PARTS, MAX_ROWS = 3, 64
"""Parts of a plan, and queries of one key head under all of them, that a program holds."""

COUNTS = ["keys", "share", "first", "second", "leaving"]
"""Numbers that grow from step to step, of which a kernel shall know nothing beforehand."""


@triton.jit(do_not_specialize=COUNTS)  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]  # a kernel may read no globals, such as annotations
    out,
    pieces,
    finished,
    query,
    key,
    value,
    partners,
    phases,
    fading,
    scaling,
    keys,
    share,
    first,
    second,
    leaving,
    batch_stride,
    head_stride,
    phase_stride,
    fading_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
    PRECISION: tl.constexpr,
    FADES: tl.constexpr,
):
    batch, head = (tl.program_id(0) // HEADS).to(tl.int64), (tl.program_id(0) % HEADS).to(tl.int64)
    splits = tl.num_programs(1)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, keys)
    column = tl.arange(0, COLUMNS)
    inside = column < WIDTH
    key += batch * batch_stride + head * head_stride
    value += batch * batch_stride + head * head_stride
    phases += batch * phase_stride

    if (leaving >= begin) & (leaving < end):  # the key that leaves the nearest part is turned in its place
        place = key + leaving.to(tl.int64) * WIDTH
        partner = tl.load(partners + WIDTH + column, mask=inside, other=0)
        cos = tl.load(phases + PARTS * WIDTH + column, mask=inside)
        sin = tl.load(phases + (2 * PARTS + 1) * WIDTH + column, mask=inside)
        turned = tl.load(place + column, mask=inside).to(tl.float32) * cos
        turned += tl.load(place + partner, mask=inside).to(tl.float32) * sin
        tl.debug_barrier()  # all of it is read before some of it is written, and written before it is read below
        tl.store(place + column, turned.to(key.dtype.element_ty), mask=inside)
        tl.debug_barrier()

    row = tl.arange(0, ROWS)
    part = row // GROUP
    there = (part < PARTS)[:, None] & inside[None, :]
    place = query + ((batch * HEADS + head) * GROUP + row % GROUP)[:, None] * WIDTH
    partner = tl.load(partners + column, mask=inside, other=0)[None, :]
    phase = part[:, None] * WIDTH + column[None, :]
    cos = tl.load(phases + phase, mask=there, other=0)
    sin = tl.load(phases + (PARTS + 1) * WIDTH + phase, mask=there, other=0)
    turned = tl.load(place + column[None, :], mask=there, other=0).to(tl.float32) * cos
    turned += tl.load(place + partner, mask=there, other=0).to(tl.float32) * sin
    asked = turned.to(key.dtype.element_ty)

    low = tl.where(part == 0, first, tl.where(part == 1, second, 0))  # keys that a row sees, up to but not `high`
    high = tl.where(part == 0, keys, tl.where(part == 1, first, second))
    if FADES:  # what a part adds to all of its logits, and by which octave of distances
        place = fading + batch * fading_stride + part * 3
        shift = tl.load(place, mask=part < PARTS, other=0)
        rate = tl.load(place + 1, mask=part < PARTS, other=0)
        nearest = tl.load(place + 2, mask=part < PARTS, other=1).to(tl.int32)
    highest = tl.full((ROWS,), -float("inf"), tl.float32)
    weight = tl.full((ROWS,), 0, tl.float32)
    held = tl.full((ROWS, COLUMNS), 0, tl.float32)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        here = (token < end)[:, None] & inside[None, :]
        offset = token.to(tl.int64)[:, None] * WIDTH + column[None, :]
        states = tl.load(key + offset, mask=here, other=0)
        scores = tl.dot(asked, states.trans(), input_precision=PRECISION) * scaling
        if FADES:  # the exponent of a float is the octave of a whole number below 2 ** 24
            octave = (keys - 1 - token)[None, :] // nearest[:, None]
            exponent = (octave.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
            scores += shift[:, None] + tl.where(octave > 0, rate[:, None] * (exponent + 0.5), 0.0)
        seen = (token[None, :] >= low[:, None]) & (token[None, :] < high[:, None]) & (token < end)[None, :]
        scores = tl.where(seen, scores, -float("inf"))
        above = tl.maximum(highest, tl.max(scores, 1))
        level = tl.where(above == -float("inf"), 0.0, above)  # of a row that has seen nothing so far
        chances = tl.exp(scores - level[:, None])
        before = tl.exp(highest - level)
        states = tl.load(value + offset, mask=here, other=0)
        held = held * before[:, None] + tl.dot(chances.to(states.dtype), states, input_precision=PRECISION)
        weight = weight * before + tl.sum(chances, 1)
        highest = above
    sums = pieces + tl.num_programs(0).to(tl.int64) * splits * ROWS * COLUMNS
    own = (tl.program_id(0) * splits + tl.program_id(1)).to(tl.int64) * ROWS + row
    some = tl.where(weight > 0, weight, 1.0)
    tl.store(sums + own, tl.where(weight > 0, highest + tl.log(some), -float("inf")))
    tl.store(pieces + own[:, None] * COLUMNS + column[None, :], held / some[:, None])

    tl.debug_barrier()
    if tl.atomic_add(finished + tl.program_id(0), 1) == splits - 1:  # all pieces of this key head are there
        tl.store(finished + tl.program_id(0), 0)
        for number in range(GROUP):
            top, total = -float("inf"), 0.0
            merged = tl.full((COLUMNS,), 0, tl.float32)
            for start in range(0, splits * PARTS, PIECES):
                one = start + tl.arange(0, PIECES)
                here = one < splits * PARTS
                piece = (tl.program_id(0) * splits + one // PARTS).to(tl.int64) * ROWS + one % PARTS * GROUP + number
                added = tl.load(sums + piece, mask=here, other=-float("inf"), cache_modifier=".cg")
                over = tl.maximum(top, tl.max(added, 0))
                base = tl.where(over == -float("inf"), 0.0, over)
                portions = tl.exp(added - base)
                kept = tl.exp(top - base)
                offset = piece[:, None] * COLUMNS + column[None, :]
                found = tl.load(pieces + offset, mask=here[:, None], other=0, cache_modifier=".cg")
                merged = merged * kept + tl.sum(found * portions[:, None], 0)
                total = total * kept + tl.sum(portions, 0)
                top = over
            whole = out + ((batch * HEADS + head) * GROUP + number) * WIDTH + column
            tl.store(whole, (merged / total).to(out.dtype.element_ty), mask=inside)


class Step:
    """
    Attention of one query to keys of which each part sees a range, and sees the query turned in its own way; the same
    for all layers of a forward.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, 1, dim)`): of one of the layers.
        key (`torch.Tensor` of shape `(batch, key heads, keys, dim)`): of one of the layers.
        partners (`torch.LongTensor` of shape `(2, dim)`): of all channels of queries, and of keys.
        phases (`torch.FloatTensor` of shape `(batch or 1, 2, parts + 1, dim)`): cosines and signed sines by which
            queries are turned for each part, and last, the key that leaves.
        starts (`tuple[int, ...]`): the first key of each part, the nearest first; it ends where the one before begins.
        scaling (`float`): scores are multiplied by it.
        fading (`torch.FloatTensor` of shape `(batch or 1, parts, 3)`, *optional*): what is added to the logits of each
            part, what is added for each octave of distances, half of it for the first, and the distance from which
            octaves count, a whole number up to 2 ** 24.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        partners: torch.Tensor,
        phases: torch.Tensor,
        starts: tuple[int, ...],
        scaling: float,
        fading: torch.Tensor | None = None,
    ) -> None:
        batch, heads, _, width = query.shape
        key_heads, keys = key.shape[1:3]
        group, parts = heads // key_heads, len(starts)
        columns, rows = max(_power_of_two(width), 16), max(_power_of_two(parts * group), 16)
        share = -(-keys // max(PROGRAMS // (batch * key_heads), 1))
        block = max(TILE // (columns * query.element_size()), 16)
        share = -(-share // block) * block
        splits = -(-keys // share)
        self.grid = batch * key_heads, splits
        self.shape = batch, 1, heads, width
        # layers follow each other: what one has left there is read no more
        self.pieces = query.new_empty(batch * key_heads * splits * rows * (columns + 1), dtype=torch.float32)
        self.finished = query.new_zeros(batch * key_heads, dtype=torch.int32)
        first, second = (*starts, 0, 0)[:2]
        self.turns = partners, phases, phases if fading is None else fading
        self.numbers = scaling, keys, share, first, second
        self.phase_strides = [one.stride(0) if one is not None and one.shape[0] > 1 else 0 for one in (phases, fading)]
        self.sizes: dict[str, Any] = {
            "HEADS": key_heads,
            "GROUP": group,
            "PARTS": parts,
            "WIDTH": width,
            "COLUMNS": columns,
            "ROWS": rows,
            "BLOCK": block,
            "PIECES": PIECES,
            "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",  # of float32 alone
            "FADES": fading is not None,
        }

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, leaving: int) -> torch.Tensor:
        """
        Args:
            query (`torch.Tensor` of shape `(batch, heads, 1, dim)`): as it is turned for no part yet; its heads lie
                one behind the other.
            key (`torch.Tensor` of shape `(batch, key heads, keys, dim)`): as they are turned for all parts, one behind
                the other in each head.
            value (`torch.Tensor` of the same shape and strides): values.
            leaving (`int`): which key is turned, in its place; -1 for none.

        Returns:
            `torch.Tensor` of shape `(batch, 1, heads, dim)`: contiguous.
        """
        out = query.new_empty(self.shape)
        states = out, self.pieces, self.finished, query, key, value
        strides = key.stride(0), key.stride(1), *self.phase_strides
        _attend[self.grid](*states, *self.turns, *self.numbers, leaving, *strides, **self.sizes)
        return out


def _power_of_two(number: int) -> int:
    """The next one; Triton's own takes as long as a call of PyTorch."""
    return 1 << (number - 1).bit_length()
