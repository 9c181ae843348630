"""Triton kernels: a rotation, a merge, and a whole decoding step.

A rotation and a merge take one pass over memory each. PyTorch's own operations take four and nine. Next to a fast
attention kernel, these passes are the remaining cost of a remapped layer.

In decoding, a GPU waits for the host, which takes as long to launch one call as the GPU takes to run many. One call
here replaces a dozen calls of PyTorch per layer. Keys and values are read once, in pieces that are spread over all
multiprocessors. The last program to finish merges the pieces (Dao et al., *Flash-Decoding*, 2023,
https://pytorch.org/blog/flash-decoding).

`__init__.py` decides when these kernels are used.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

ROWS = 16
"""Tokens per program. With 128 channels, each thread reads 16 bytes at a time, once or twice."""

TILE = 2**14
"""Bytes of keys that a program reads at a time, and as many bytes of values. A small GPU has room for three such pairs
per multiprocessor."""

PROGRAMS = 264
"""Programs that share the keys of a layer: two per multiprocessor of an H100."""

PIECES = 64
"""Pieces merged at a time."""

MAX_BANDS, MAX_ROWS = 3, 64
"""Maximum number of bands, and maximum number of queries of one key head over all bands, that a program can hold."""

COUNTS = ["keys", "share", "first", "second", "leaving"]
"""Arguments that change from step to step. Triton must not specialize the kernel for their values."""


@triton.jit  # type: ignore[untyped-decorator]
def _place(heads, COLUMNS: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    row, head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    return row, head, tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def _rotate(  # type: ignore[no-untyped-def]  # a kernel may read no globals, such as annotations
    out, states, cos, sin, heads, tokens,
    out_batch, out_head, out_token, batch_stride, head_stride, token_stride, phase_batch, phase_token,
    HALF: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, head, token, column = _place(heads, COLUMNS, ROWS)
    out += row * out_batch + head * out_head + token * out_token
    states += row * batch_stride + head * head_stride + token * token_stride
    phase = row * phase_batch + token * phase_token + column
    inside = (token < tokens) & (column < HALF)
    first = tl.load(states + column, mask=inside).to(tl.float32)
    second = tl.load(states + HALF + column, mask=inside).to(tl.float32)
    rotated = first * tl.load(cos + phase, mask=inside).to(tl.float32)
    rotated += second * tl.load(sin + phase, mask=inside).to(tl.float32)
    tl.store(out + column, rotated.to(out.dtype.element_ty), mask=inside)
    rotated = second * tl.load(cos + HALF + phase, mask=inside).to(tl.float32)
    rotated += first * tl.load(sin + HALF + phase, mask=inside).to(tl.float32)
    tl.store(out + HALF + column, rotated.to(out.dtype.element_ty), mask=inside)
    for start in tl.static_range(2 * HALF, WIDTH, COLUMNS):  # channels that do not rotate
        rest = (token < tokens) & (start + column < WIDTH)
        tl.store(out + start + column, tl.load(states + start + column, mask=rest), mask=rest)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, half: int) -> torch.Tensor:
    """Return each channel times its cosine plus its partner times its signed sine, computed in float32.

    States (batch, heads, tokens, dim) have adjacent channels. Cosines and signed sines have shape (batch or 1, 1,
    tokens, dim). Partners are `half` channels apart. Channels from `2 * half` on do not rotate.
    """
    batch, heads, tokens, width = states.shape
    out = torch.empty_like(states)
    strides = *out.stride()[:3], *states.stride()[:3], cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(2)
    sizes = {"HALF": half, "WIDTH": width, "COLUMNS": triton.next_power_of_2(half), "ROWS": ROWS}
    grid = batch * heads, triton.cdiv(tokens, ROWS)  # heads are adjacent programs, because they read the same phases
    _rotate[grid](out, states, cos, sin, heads, tokens, *strides, **sizes)
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _merge(  # type: ignore[no-untyped-def]
    held, held_sum, out, out_sum, heads, tokens,
    held_batch, held_head, held_token, held_sum_batch, held_sum_head, held_sum_token,
    batch_stride, head_stride, token_stride, sum_batch, sum_head, sum_token,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, head, token, column = _place(heads, COLUMNS, ROWS)
    inside = token < tokens
    valid = inside & (column < WIDTH)
    held += row * held_batch + head * held_head
    held_sum += row * held_sum_batch + head * held_sum_head
    out += row * batch_stride + head * head_stride
    out_sum += row * sum_batch + head * sum_head
    before = tl.load(held_sum + token * held_sum_token, mask=inside, other=0.0)
    new = tl.load(out_sum + token * sum_token, mask=inside, other=0.0)
    share = 1 / (1 + tl.exp(before - new))
    accumulated = tl.load(held + token * held_token + column, mask=valid).to(tl.float32)
    added = tl.load(out + token * token_stride + column, mask=valid).to(tl.float32)
    merged = accumulated + share * (added - accumulated)
    tl.store(held + token * held_token + column, merged.to(held.dtype.element_ty), mask=valid)
    total = tl.maximum(before, new) - tl.log(tl.maximum(share, 1 - share))
    tl.store(held_sum + token * held_sum_token, total, mask=inside)


def merge(held: torch.Tensor, held_sum: torch.Tensor, out: torch.Tensor, out_sum: torch.Tensor) -> None:
    """Merge a piece of a softmax into the values accumulated so far, in place, computed in float32.

    Values have shape (batch, heads, tokens, dim), and their float32 log-sum-exps (batch, heads, tokens). That of the
    accumulated values is `-inf` if nothing has been attended so far. That of the piece is finite.
    """
    batch, heads, tokens, width = out.shape
    strides = *held.stride()[:3], *held_sum.stride(), *out.stride()[:3], *out_sum.stride()
    sizes = {"WIDTH": width, "COLUMNS": triton.next_power_of_2(width), "ROWS": ROWS}
    _merge[batch * heads, triton.cdiv(tokens, ROWS)](held, held_sum, out, out_sum, heads, tokens, *strides, **sizes)


@triton.jit(do_not_specialize=COUNTS)  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]  # a kernel may read no globals, such as annotations
    out, pieces, finished, query, key, value, partners, phases, fading,
    scaling, keys, share, first, second, leaving, batch_stride, head_stride, phase_stride, fading_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, BANDS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    FADES: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(0) // HEADS).to(tl.int64), (tl.program_id(0) % HEADS).to(tl.int64)
    splits = tl.num_programs(1)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, keys)
    column = tl.arange(0, COLUMNS)
    inside = column < WIDTH
    key += batch * batch_stride + head * head_stride
    value += batch * batch_stride + head * head_stride
    phases += batch * phase_stride

    if (leaving >= begin) & (leaving < end):  # rotate the key that leaves the nearest band, in place
        place = key + leaving.to(tl.int64) * WIDTH
        partner = tl.load(partners + WIDTH + column, mask=inside, other=0)
        cos = tl.load(phases + BANDS * WIDTH + column, mask=inside)
        sin = tl.load(phases + (2 * BANDS + 1) * WIDTH + column, mask=inside)
        rotated = tl.load(place + column, mask=inside).to(tl.float32) * cos
        rotated += tl.load(place + partner, mask=inside).to(tl.float32) * sin
        tl.debug_barrier()  # every channel is read before any is written, and written before it is read below
        tl.store(place + column, rotated.to(key.dtype.element_ty), mask=inside)
        tl.debug_barrier()

    # rotate the queries of this key head for each band: one row per band and query head
    row = tl.arange(0, ROWS)
    band = row // GROUP
    row_valid = (band < BANDS)[:, None] & inside[None, :]
    place = query + ((batch * HEADS + head) * GROUP + row % GROUP)[:, None] * WIDTH
    partner = tl.load(partners + column, mask=inside, other=0)[None, :]
    phase = band[:, None] * WIDTH + column[None, :]
    cos = tl.load(phases + phase, mask=row_valid, other=0)
    sin = tl.load(phases + (BANDS + 1) * WIDTH + phase, mask=row_valid, other=0)
    rotated = tl.load(place + column[None, :], mask=row_valid, other=0).to(tl.float32) * cos
    rotated += tl.load(place + partner, mask=row_valid, other=0).to(tl.float32) * sin
    rotated_query = rotated.to(key.dtype.element_ty)

    low = tl.where(band == 0, first, tl.where(band == 1, second, 0))  # a row sees keys `low` to `high - 1`
    high = tl.where(band == 0, keys, tl.where(band == 1, first, second))
    if FADES:  # shift of all logits of a band, shift per octave of distances, and start of the octaves
        place = fading + batch * fading_stride + band * 3
        shift = tl.load(place, mask=band < BANDS, other=0)
        rate = tl.load(place + 1, mask=band < BANDS, other=0)
        nearest = tl.load(place + 2, mask=band < BANDS, other=1).to(tl.int32)
    # online softmax over the program's share of the keys
    highest = tl.full((ROWS,), -float("inf"), tl.float32)
    weight = tl.full((ROWS,), 0, tl.float32)
    weighted = tl.full((ROWS, COLUMNS), 0, tl.float32)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        valid = (token < end)[:, None] & inside[None, :]
        offset = token.to(tl.int64)[:, None] * WIDTH + column[None, :]
        states = tl.load(key + offset, mask=valid, other=0)
        scores = tl.dot(rotated_query, states.trans(), input_precision=PRECISION) * scaling
        if FADES:  # the exponent of a float is the octave of an integer below 2 ** 24
            octave = (keys - 1 - token)[None, :] // nearest[:, None]
            exponent = (octave.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
            scores += shift[:, None] + tl.where(octave > 0, rate[:, None] * (exponent + 0.5), 0.0)
        seen = (token[None, :] >= low[:, None]) & (token[None, :] < high[:, None]) & (token < end)[None, :]
        scores = tl.where(seen, scores, -float("inf"))
        above = tl.maximum(highest, tl.max(scores, 1))
        level = tl.where(above == -float("inf"), 0.0, above)  # 0 for a row that has seen no key so far
        chances = tl.exp(scores - level[:, None])
        before = tl.exp(highest - level)
        states = tl.load(value + offset, mask=valid, other=0)
        weighted = weighted * before[:, None] + tl.dot(chances.to(states.dtype), states, input_precision=PRECISION)
        weight = weight * before + tl.sum(chances, 1)
        highest = above
    # store the piece of this program: values and their log-sum-exp
    sums = pieces + tl.num_programs(0).to(tl.int64) * splits * ROWS * COLUMNS
    slots = (tl.program_id(0) * splits + tl.program_id(1)).to(tl.int64) * ROWS + row
    positive = tl.where(weight > 0, weight, 1.0)
    tl.store(sums + slots, tl.where(weight > 0, highest + tl.log(positive), -float("inf")))
    tl.store(pieces + slots[:, None] * COLUMNS + column[None, :], weighted / positive[:, None])

    tl.debug_barrier()
    # the last program of this key head merges all its pieces
    if tl.atomic_add(finished + tl.program_id(0), 1) == splits - 1:
        tl.store(finished + tl.program_id(0), 0)
        for number in range(GROUP):
            top, total = -float("inf"), 0.0
            merged = tl.full((COLUMNS,), 0, tl.float32)
            for start in range(0, splits * BANDS, PIECES):
                piece_index = start + tl.arange(0, PIECES)
                valid = piece_index < splits * BANDS
                piece = (
                    (tl.program_id(0) * splits + piece_index // BANDS).to(tl.int64) * ROWS
                    + piece_index % BANDS * GROUP
                    + number
                )
                added = tl.load(sums + piece, mask=valid, other=-float("inf"), cache_modifier=".cg")
                over = tl.maximum(top, tl.max(added, 0))
                base = tl.where(over == -float("inf"), 0.0, over)
                portions = tl.exp(added - base)
                rescaled = tl.exp(top - base)
                offset = piece[:, None] * COLUMNS + column[None, :]
                values = tl.load(pieces + offset, mask=valid[:, None], other=0, cache_modifier=".cg")
                merged = merged * rescaled + tl.sum(values * portions[:, None], 0)
                total = total * rescaled + tl.sum(portions, 0)
                top = over
            whole = out + ((batch * HEADS + head) * GROUP + number) * WIDTH + column
            tl.store(whole, (merged / total).to(out.dtype.element_ty), mask=inside)


class Step:
    """Attention of one query to the keys of all bands in one kernel, shared by all layers of a forward.

    Each band sees a range of the keys, and its own rotation of the query. The query (batch, heads, 1, dim) and keys
    (batch, key heads, keys, dim) are those of any layer.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        partners: torch.Tensor,  # partner of each channel, of queries and of keys (2, dim)
        # Cosines and signed sines (batch or 1, 2, bands + 1, dim) in float32. They rotate the query for each band, and
        # last, the key that leaves the nearest band.
        phases: torch.Tensor,
        # First key of each band, nearest band first. Each band ends where the one before it starts.
        starts: tuple[int, ...],
        scaling: float,
        # Shift of the logits of each band, shift per octave of distances (half of it in the first octave), and the
        # distance at which octaves start, an integer up to 2 ** 24: (batch or 1, bands, 3) in float32.
        fading: torch.Tensor | None = None,
    ) -> None:
        batch, heads, _, width = query.shape
        key_heads, keys = key.shape[1:3]
        group, bands = heads // key_heads, len(starts)
        columns, rows = max(_power_of_two(width), 16), max(_power_of_two(bands * group), 16)
        share = -(-keys // max(PROGRAMS // (batch * key_heads), 1))
        block = max(TILE // (columns * query.element_size()), 16)
        share = -(-share // block) * block
        splits = -(-keys // share)
        self.grid = batch * key_heads, splits
        self.shape = batch, 1, heads, width
        # shared by all layers, because they run one after the other and each reads only its own results
        self.pieces = query.new_empty(batch * key_heads * splits * rows * (columns + 1), dtype=torch.float32)
        self.finished = query.new_zeros(batch * key_heads, dtype=torch.int32)
        first, second = (*starts, 0, 0)[:2]
        self.rotations = partners, phases, phases if fading is None else fading
        self.numbers = scaling, keys, share, first, second
        rows_of = (phases, fading)
        self.phase_strides = [0 if rows is None or rows.shape[0] == 1 else rows.stride(0) for rows in rows_of]
        self.sizes: dict[str, Any] = {
            "HEADS": key_heads,
            "GROUP": group,
            "BANDS": bands,
            "WIDTH": width,
            "COLUMNS": columns,
            "ROWS": rows,
            "BLOCK": block,
            "PIECES": PIECES,
            "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",  # applies to float32 only
            "FADES": fading is not None,
        }

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, leaving: int) -> torch.Tensor:
        """Return attended values (batch, 1, heads, dim), contiguous, and rotate the key at `leaving` in place.

        The query is not yet rotated for each band. Its heads are adjacent. Keys are rotated for their bands, and
        adjacent in each head. Values have the same shape and strides. `leaving` is -1 if no key leaves.
        """
        out = query.new_empty(self.shape)
        states = out, self.pieces, self.finished, query, key, value
        strides = key.stride(0), key.stride(1), *self.phase_strides
        _attend[self.grid](*states, *self.rotations, *self.numbers, leaving, *strides, **self.sizes)
        return out


def _power_of_two(number: int) -> int:
    """Return the next power of two. Triton's own function takes as long as a PyTorch call."""
    return 1 << (number - 1).bit_length()
