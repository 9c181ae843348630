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

from .bands import Geometry, Piece

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
"""Without a look at their overloads, which takes a sixth of a short call."""

NOTHING = -1e30
"""A log-sum-exp below it is that of a query which attends to nothing: its scores are lost in the least number."""


class Rotated(NamedTuple):
    """Queries that are rotated block by block, as they are used, so that the rotated ones are never held.

    Args:
        states (`torch.Tensor` of shape `(batch, heads, queries, dim)`): not rotated.
        rotate (`Callable`): `rotate(states[:, :, start:stop], start, stop)` returns a block of them rotated.
    """

    states: torch.Tensor
    rotate: Callable[[torch.Tensor, int, int], torch.Tensor]

    def block(self, start: int, stop: int) -> torch.Tensor:
        """Return the queries `start` to `stop - 1`."""
        return self.rotate(self.states[:, :, start:stop], start, stop)


def block(query: torch.Tensor | Rotated, start: int, stop: int) -> torch.Tensor:
    """Return the queries `start` to `stop - 1`, rotated."""
    if isinstance(query, Rotated):
        return query.block(start, stop)
    return query if stop - start == query.shape[2] else query[:, :, start:stop]


def whole(states: torch.Tensor | Rotated) -> torch.Tensor:
    """Return all queries, rotated."""
    return states.block(0, states.states.shape[2]) if isinstance(states, Rotated) else states


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
    """Return whether [`FusedAttention`] can be differentiated: not by a bias, nor under a trace or a transform."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return not (traced or (mask is not None and mask.requires_grad))


def fused_attention(
    geometry: Geometry,
    queries: Sequence[torch.Tensor | Rotated],
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
    first = queries[0]
    batch, heads, count, _ = (first.states if isinstance(first, Rotated) else first).shape
    key_heads, dtype = value.shape[1], value.dtype

    def attend(start: int, stop: int) -> torch.Tensor:
        here: dict[int, torch.Tensor] = {}

        def attended(piece: Piece) -> tuple[torch.Tensor, torch.Tensor]:
            band, low, high, bias, shift = piece
            query = here.get(band)
            if query is None:
                query = block(queries[band], start, stop)
                query = here[band] = grouped(query if query.dtype == dtype else query.to(dtype), key_heads)
            key = keys[band]
            span = key[:, :, low:high], value[:, :, low:high]
            found, sums = FORWARD(query, *span, attn_mask=bias, scale=scaling)
            sums = sums if shift is None else sums + shift
            return found if found.dtype == sums.dtype else found.to(sums.dtype), sums

        first, *others = geometry.pieces(start, stop, heads, key_heads, dtype)
        merged, *sums = attended(first)
        for piece in others:
            more, added = attended(piece)
            before = functools.reduce(torch.logaddexp, sums)
            share = (added - before).sigmoid_().unsqueeze(-1)  # the sigmoid of how far it is above the others
            # A graph that writes in place keeps the former strides, which are not those of the result.
            merged = merged.lerp(more, share) if torch.compiler.is_compiling() else merged.lerp_(more, share)
            sums = [before, added]
        if sinks is not None:  # they have no value
            sink = grouped_sinks(sinks, here[first.band]).to(merged.dtype)
            merged = merged * torch.sigmoid(functools.reduce(torch.logaddexp, sums).unsqueeze(-1) - sink)
            sums.append(sink[..., 0])
        if total is not None:  # a step of decoding is over before this is
            total[:, :, start:stop] = functools.reduce(torch.logaddexp, sums).reshape(batch, heads, -1)
        merged = merged if merged.dtype == dtype else merged.to(dtype)
        return merged.reshape(batch, heads, stop - start, -1).transpose(1, 2)

    if rows >= count:
        return attend(0, count).contiguous()  # some models view it
    out = value.new_empty(batch, count, heads, value.shape[-1])
    for start in range(0, count, rows):
        out[:, start : start + rows] = attend(start, min(start + rows, count))
    return out


class FusedAttention(torch.autograd.Function):
    """`FusedAttention.apply(geometry, scaling, rows, sinks, value, *queries, *keys)`, with a query and a key for
    each band: [`fused_attention`] with gradients of all but biases, once."""

    @staticmethod
    def forward(
        ctx: Any,
        geometry: Geometry,
        scaling: float,
        rows: int,
        sinks: torch.Tensor | None,
        value: torch.Tensor,
        *states: torch.Tensor,
    ) -> torch.Tensor:
        bands = len(states) // 2
        dtype = torch.promote_types(value.dtype, torch.float32)
        total = value.new_empty(*states[0].shape[:3], dtype=dtype)
        out = fused_attention(geometry, states[:bands], states[bands:], value, sinks, scaling, rows, total)
        ctx.given = geometry, scaling, rows
        ctx.save_for_backward(out, total, sinks, value, *states)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        geometry, scaling, rows = ctx.given
        out, total, sinks, value, *states = ctx.saved_tensors
        queries, keys = states[: len(states) // 2], states[len(states) // 2 :]
        # sums over many blocks
        value_grad, *grads = (torch.zeros_like(one, dtype=total.dtype) for one in (value, *states))
        # their weights would not sum to 1
        total = total.masked_fill(total < NOTHING, torch.inf)
        sizes = out.shape[2], value.shape[1], value.dtype
        for start in range(0, out.shape[1], rows):
            here = slice(start, min(start + rows, out.shape[1]))
            given, merged = (grouped(one[:, here].transpose(1, 2), value.shape[1]) for one in (grad, out))
            sums = grouped(total[:, :, here, None], value.shape[1])[..., 0]
            for band, low, high, bias, shift in geometry.pieces(here.start, here.stop, *sizes):
                span = slice(low, high)
                query = grouped(queries[band][:, :, here], value.shape[1])
                pair = keys[band][:, :, span], value[:, :, span]
                # exp(scores + shift - sums) are the weights, and the kernel knows nothing of the shift
                level = sums if shift is None else sums - shift
                found = BACKWARD(given, query, *pair, merged, level, 0.0, False, attn_mask=bias, scale=scaling)
                of_query = grads[band][:, :, here]
                of_query += found[0].reshape(of_query.shape)
                grads[len(queries) + band][:, :, span] += found[1]
                value_grad[:, :, span] += found[2]
        sinks_grad = None
        if sinks is not None:
            weights = (sinks[:, None] - total).exp()
            sinks_grad = -(weights * (grad * out).sum(-1).transpose(1, 2)).sum((0, 2)).to(sinks.dtype)
        rounded = (one.to(like.dtype) for one, like in zip((value_grad, *grads), (value, *states), strict=True))
        return None, None, None, sinks_grad, *rounded
