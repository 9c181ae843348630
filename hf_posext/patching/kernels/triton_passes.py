"""Rotation and merge in one pass over memory each, by Triton; PyTorch's own operations take four and nine.

Next to a kernel for attention as fast as a GPU has them, these passes are what is left of the cost of a remapped
layer. [`choice.one_pass`] tells where they are used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS = 16
"""Tokens in a program. With 128 channels each thread reads 16 bytes at a time, once or twice."""


@triton.jit  # type: ignore[untyped-decorator]
def _rotate(  # type: ignore[no-untyped-def]  # a kernel may read no globals, such as annotations
    out,
    states,
    cos,
    sin,
    heads,
    tokens,
    out_batch,
    out_head,
    out_token,
    batch_stride,
    head_stride,
    token_stride,
    phase_batch,
    phase_token,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    out += row * out_batch + head * out_head + token * out_token
    states += row * batch_stride + head * head_stride + token * token_stride
    phase = row * phase_batch + token * phase_token + column
    here = (token < tokens) & (column < HALF)
    first = tl.load(states + column, mask=here).to(tl.float32)
    second = tl.load(states + HALF + column, mask=here).to(tl.float32)
    turned = first * tl.load(cos + phase, mask=here).to(tl.float32)
    turned += second * tl.load(sin + phase, mask=here).to(tl.float32)
    tl.store(out + column, turned.to(out.dtype.element_ty), mask=here)
    turned = second * tl.load(cos + HALF + phase, mask=here).to(tl.float32)
    turned += first * tl.load(sin + HALF + phase, mask=here).to(tl.float32)
    tl.store(out + HALF + column, turned.to(out.dtype.element_ty), mask=here)
    for start in tl.static_range(2 * HALF, WIDTH, COLUMNS):  # channels that do not turn
        rest = (token < tokens) & (start + column < WIDTH)
        tl.store(out + start + column, tl.load(states + start + column, mask=rest), mask=rest)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, half: int) -> torch.Tensor:
    """Each channel times its cosine, plus its partner times its signed sine, in float32.

    Args:
        states (`torch.Tensor` of shape `(batch, heads, tokens, dim)`): channels one behind the other.
        cos (`torch.Tensor` of shape `(batch or 1, 1, tokens, dim)`): of each channel; `sin` the same.
        half (`int`): channels that have their partners as many channels further on; the others past those do not turn.
    """
    batch, heads, tokens, width = states.shape
    out = torch.empty_like(states)
    _rotate[batch * heads, triton.cdiv(tokens, ROWS)](  # heads next to each other: they read the same phases
        out,
        states,
        cos,
        sin,
        heads,
        tokens,
        *out.stride()[:3],
        *states.stride()[:3],
        cos.stride(0) if cos.shape[0] > 1 else 0,
        cos.stride(2),
        HALF=half,
        WIDTH=width,
        COLUMNS=triton.next_power_of_2(half),
        ROWS=ROWS,
    )
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _merge(  # type: ignore[no-untyped-def]
    held,
    held_sum,
    out,
    out_sum,
    heads,
    tokens,
    held_batch,
    held_head,
    held_token,
    held_sum_batch,
    held_sum_head,
    held_sum_token,
    batch_stride,
    head_stride,
    token_stride,
    sum_batch,
    sum_head,
    sum_token,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = token < tokens
    here = inside & (column < WIDTH)
    held += row * held_batch + head * held_head
    held_sum += row * held_sum_batch + head * held_sum_head
    out += row * batch_stride + head * head_stride
    out_sum += row * sum_batch + head * sum_head
    before = tl.load(held_sum + token * held_sum_token, mask=inside, other=0.0)
    new = tl.load(out_sum + token * sum_token, mask=inside, other=0.0)
    share = 1 / (1 + tl.exp(before - new))
    kept = tl.load(held + token * held_token + column, mask=here).to(tl.float32)
    added = tl.load(out + token * token_stride + column, mask=here).to(tl.float32)
    merged = kept + share * (added - kept)
    tl.store(held + token * held_token + column, merged.to(held.dtype.element_ty), mask=here)
    total = tl.maximum(before, new) - tl.log(tl.maximum(share, 1 - share))
    tl.store(held_sum + token * held_sum_token, total, mask=inside)


def merge(held: torch.Tensor, held_sum: torch.Tensor, out: torch.Tensor, out_sum: torch.Tensor) -> None:
    """A piece of a softmax into what is held of it, in place, in float32.

    Args:
        held (`torch.Tensor` of shape `(batch, heads, tokens, dim)`): values; `out` the same of the piece.
        held_sum (`torch.FloatTensor` of shape `(batch, heads, tokens)`): their log-sum-exp, `-inf` where nothing has
            been attended so far; `out_sum` the same of the piece, finite.
    """
    batch, heads, tokens, width = out.shape
    _merge[batch * heads, triton.cdiv(tokens, ROWS)](
        held,
        held_sum,
        out,
        out_sum,
        heads,
        tokens,
        *held.stride()[:3],
        *held_sum.stride(),
        *out.stride()[:3],
        *out_sum.stride(),
        WIDTH=width,
        COLUMNS=triton.next_power_of_2(width),
        ROWS=ROWS,
    )
