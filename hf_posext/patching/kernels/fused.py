"""Attention by PyTorch's flash kernel for CPUs, piece by piece, forward and backward.

The pieces of one softmax are merged by their log-sum-exp. Backward gives the kernel the output and the log-sum-exp of
all pieces: from these it finds the weights `exp(scores - total)` of the pairs of one piece again, and what a row's
gradients have in common. So the gradients of each piece are exact, and nothing of quadratic size is kept (Dao et al.,
*FlashAttention*, 2022, https://arxiv.org/abs/2205.14135, appendix B).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
"""Without a look at their overloads, which takes a sixth of a short call."""

NOTHING = -1e30
"""A log-sum-exp below it is that of a query which attends to nothing: its scores are lost in the least number."""


class Piece(NamedTuple):
    """A rectangle of scores: the queries of a block against the keys `low` to `high - 1` of a part.

    `bias` (batch or 1, key heads or 1, rows, keys) is added to the scores: 0, or the least number where a pair is not
    attended. It is `None` where all pairs are. `shift` is added as well: a number, or one for each row, of shape
    (batch or 1, 1, rows).
    """

    part: int
    low: int
    high: int
    bias: torch.Tensor | None
    shift: torch.Tensor | float | None = None


Edges = dict[tuple[int, ...], torch.Tensor]
"""Biases of a forward or a backward that are met again: by their part and their place in its blocks."""

Pieces = Callable[[int, int, Edges], list[Piece]]
"""The pieces of the queries `start` to `stop - 1`. It holds no states, which autograd and checkpoints are to keep."""


def grouped(states: torch.Tensor, key_heads: int) -> torch.Tensor:
    """Heads (batch, heads, rows, dim) that share a key head, behind each other: (batch, key heads, all rows, dim)."""
    return states.reshape(states.shape[0], key_heads, -1, states.shape[-1])


def grouped_sinks(sinks: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """The score (heads,) that is in each row of such queries: (batch, key heads, all rows, 1)."""
    batch, key_heads, rows, _ = query.shape
    return (
        sinks.reshape(key_heads, -1, 1)
        .expand(batch, -1, -1, rows * key_heads // len(sinks))
        .reshape(batch, key_heads, rows, 1)
    )


def has_fused_gradients(mask: torch.Tensor | None) -> bool:
    """Whether [`FusedAttention`] can be differentiated here: not for a bias, nor by what traces or transforms it."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return not (traced or (mask is not None and mask.requires_grad))


def fused_attention(
    pieces: Pieces,
    queries: Sequence[torch.Tensor],
    keys: Sequence[torch.Tensor],
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    scaling: float,
    rows: int,
    total: torch.Tensor | None = None,
) -> torch.Tensor:
    """Values (batch, queries, heads, dim); see [`banded_attention`]. Blocks have `rows` queries.

    The log-sum-exp of all pieces is written into `total` (batch, heads, queries), if given.
    """
    batch, heads, count, _ = queries[0].shape
    edges: Edges = {}

    def attend(start: int, stop: int) -> torch.Tensor:
        whole = stop - start == count
        here = [grouped(query if whole else query[:, :, start:stop], value.shape[1]) for query in queries]

        def attended(piece: Piece) -> tuple[torch.Tensor, torch.Tensor]:
            span = slice(piece.low, piece.high)
            states = here[piece.part], keys[piece.part][:, :, span], value[:, :, span]
            out, total = FORWARD(*states, attn_mask=piece.bias, scale=scaling)
            if piece.shift is not None:
                total = total + piece.shift
            return out if out.dtype == total.dtype else out.to(total.dtype), total

        first, *others = pieces(start, stop, edges)
        merged, *sums = attended(first)
        for piece in others:
            out, added = attended(piece)
            before = functools.reduce(torch.logaddexp, sums)
            # its share is the sigmoid of how far it is above the others
            merged = torch.lerp(merged, out, (added - before).sigmoid_().unsqueeze(-1))
            sums = [before, added]
        if sinks is not None:  # they have no value
            sink = grouped_sinks(sinks, here[0]).to(merged.dtype)
            merged = merged * torch.sigmoid(functools.reduce(torch.logaddexp, sums).unsqueeze(-1) - sink)
            sums.append(sink[..., 0])
        if total is not None:  # a step of decoding is over before this is
            total[:, :, start:stop] = functools.reduce(torch.logaddexp, sums).reshape(batch, heads, -1)
        merged = merged if merged.dtype == value.dtype else merged.to(value.dtype)
        return merged.reshape(batch, heads, stop - start, -1).transpose(1, 2)

    if rows >= count:
        return attend(0, count).contiguous()  # some models view it
    out = value.new_empty(batch, count, heads, value.shape[-1])
    for start in range(0, count, rows):
        out[:, start : start + rows] = attend(start, min(start + rows, count))
    return out


class FusedAttention(torch.autograd.Function):
    """`FusedAttention.apply(pieces, scaling, rows, sinks, value, *queries, *keys)`, with a query and a key for each
    part: [`fused_attention`] with gradients of all but biases, once."""

    @staticmethod
    def forward(
        ctx: Any,
        pieces: Pieces,
        scaling: float,
        rows: int,
        sinks: torch.Tensor | None,
        value: torch.Tensor,
        *states: torch.Tensor,
    ) -> torch.Tensor:
        parts = len(states) // 2
        dtype = torch.promote_types(value.dtype, torch.float32)
        total = value.new_empty(*states[0].shape[:3], dtype=dtype)
        out = fused_attention(pieces, states[:parts], states[parts:], value, sinks, scaling, rows, total)
        ctx.given = pieces, scaling, rows
        ctx.save_for_backward(out, total, sinks, value, *states)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        pieces, scaling, rows = ctx.given
        out, total, sinks, value, *states = ctx.saved_tensors
        queries, keys = states[: len(states) // 2], states[len(states) // 2 :]
        # sums over many blocks
        value_grad, *grads = (torch.zeros_like(one, dtype=total.dtype) for one in (value, *states))
        # their weights would not sum to 1
        total = total.masked_fill(total < NOTHING, torch.inf)
        edges: Edges = {}
        for start in range(0, out.shape[1], rows):
            block = slice(start, min(start + rows, out.shape[1]))
            given, merged = (grouped(one[:, block].transpose(1, 2), value.shape[1]) for one in (grad, out))
            sums = grouped(total[:, :, block, None], value.shape[1])[..., 0]
            for part, low, high, bias, shift in pieces(block.start, block.stop, edges):
                span = slice(low, high)
                query = grouped(queries[part][:, :, block], value.shape[1])
                pair = keys[part][:, :, span], value[:, :, span]
                # exp(scores + shift - sums) are the weights, and the kernel knows nothing of the shift
                level = sums if shift is None else sums - shift
                found = BACKWARD(given, query, *pair, merged, level, 0.0, False, attn_mask=bias, scale=scaling)
                of_query = grads[part][:, :, block]
                of_query += found[0].reshape(of_query.shape)
                grads[len(queries) + part][:, :, span] += found[1]
                value_grad[:, :, span] += found[2]
        sinks_grad = None
        if sinks is not None:
            weights = (sinks[:, None] - total).exp()
            sinks_grad = -(weights * (grad * out).sum(-1).transpose(1, 2)).sum((0, 2)).to(sinks.dtype)
        rounded = (one.to(like.dtype) for one, like in zip((value_grad, *grads), (value, *states), strict=True))
        return None, None, None, sinks_grad, *rounded
