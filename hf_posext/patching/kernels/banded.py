"""Attention in which near and far pairs see different positions.

The bands of a plan are disjoint. Each block of queries scores the keys of each band once, and one softmax runs over
all bands. The result is exact. Memory is linear in length, forward and backward.

On a CPU, PyTorch's flash kernel attends piece by piece, and the pieces of one softmax are merged by their log-sum-exp.
The backward kernel receives the output and the log-sum-exp of all pieces. From these it recomputes the weights
`exp(scores - total)` of one piece and the term that all gradients of a row share. The gradients of each piece are
therefore exact, and nothing of quadratic size is stored (Dao et al., *FlashAttention*, 2022,
https://arxiv.org/abs/2205.14135, appendix B).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import dropout as drop
from torch.utils.checkpoint import checkpoint

from .. import kernels
from . import Kernel, choose, one_pass
from .bands import Geometry, Piece, Region, grouped, regions

SCORE_BYTES = 16 * 2**20
"""Bytes of float32 scores that are held at a time."""

FUSED_ROWS = 192
"""Queries per block for fused kernels, which hold no scores. Shorter blocks waste less at their edges but need more
calls. 192 divides chunks of three quarters of a power of two, so no block spans two chunks."""

WIDE = hasattr(torch.ops.aten.bmm, "dtype") and torch.version.hip is None
"""`True` if PyTorch can multiply half precision into float32 on CUDA, without gradients: from 2.8 on, but not on
ROCm."""

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
"""Operators with a fixed overload. Resolving the overload would take a sixth of a short call."""

NOTHING = -1e30
"""Log-sum-exp below which a query attends to nothing. Its scores vanish next to the minimum of the dtype."""


class Rotated(NamedTuple):
    """Queries that are rotated block by block when they are used, to avoid holding all rotated states.

    `rotate(states[:, :, start:stop], start, stop)` returns a rotated block of the states (batch, heads, queries, dim).
    """

    states: torch.Tensor
    rotate: Callable[[torch.Tensor, int, int], torch.Tensor]


def unrotated(query: torch.Tensor | Rotated) -> torch.Tensor:
    return query.states if isinstance(query, Rotated) else query


def block(query: torch.Tensor | Rotated, start: int, stop: int) -> torch.Tensor:
    """Return the queries `start` to `stop - 1`, rotated."""
    if isinstance(query, Rotated):
        return query.rotate(query.states[:, :, start:stop], start, stop)
    return query if stop - start == query.shape[2] else query[:, :, start:stop]


def whole(states: torch.Tensor | Rotated) -> torch.Tensor:
    """Return all queries, rotated."""
    return block(states, 0, unrotated(states).shape[2])


def grouped_sinks(sinks: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Expand sink scores (heads,) to the rows of grouped queries: (batch, key heads, all rows, 1)."""
    batch, key_heads, rows, _ = query.shape
    return (
        sinks.reshape(key_heads, -1, 1)
        .expand(batch, -1, -1, rows * key_heads // len(sinks))
        .reshape(batch, key_heads, rows, 1)
    )


def fused_attention(
    geometry: Geometry,
    queries: Sequence[torch.Tensor | Rotated],
    keys: Sequence[torch.Tensor],
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    scaling: float,
    total: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return attended values (batch, queries, heads, dim), computed by the CPU flash kernel.

    Queries are attended in blocks of [`FUSED_ROWS`]. If `total` (batch, heads, queries) is given, it receives the
    log-sum-exp of all pieces. See [`banded_attention`] for the other arguments.
    """
    batch, heads, count, _ = unrotated(queries[0]).shape
    key_heads, dtype, compiling = value.shape[1], value.dtype, torch.compiler.is_compiling()

    def attend(start: int, stop: int) -> torch.Tensor:
        rotated: dict[int, torch.Tensor] = {}

        def attended(piece: Piece) -> tuple[torch.Tensor, torch.Tensor]:
            band, low, high, bias, shift = piece
            query = rotated.get(band)
            if query is None:
                query = block(queries[band], start, stop)
                query = rotated[band] = grouped(query if query.dtype == dtype else query.to(dtype), key_heads)
            key = keys[band]
            span = key[:, :, low:high], value[:, :, low:high]
            out_piece, sums = FORWARD(query, *span, attn_mask=bias, scale=scaling)
            sums = sums if shift is None else sums + shift
            return out_piece if out_piece.dtype == sums.dtype else out_piece.to(sums.dtype), sums

        # merge the pieces one after the other; `sums` contains log-sum-exps that still have to be added up
        first, *rest = geometry.pieces(start, stop, heads // key_heads, dtype)
        merged, *sums = attended(first)
        for piece in rest:
            values, added = attended(piece)
            before = functools.reduce(torch.logaddexp, sums)
            share = (added - before).sigmoid_().unsqueeze(-1)  # weight of the new piece in the softmax so far
            # In a compiled graph, an in-place write would keep the old strides, which differ from the result's.
            merged = merged.lerp(values, share) if compiling else merged.lerp_(values, share)
            sums = [before, added]
        if sinks is not None:  # sinks take part in the softmax but have no value
            sink = grouped_sinks(sinks, rotated[first.band]).to(merged.dtype)
            merged = merged * torch.sigmoid(functools.reduce(torch.logaddexp, sums).unsqueeze(-1) - sink)
            sums.append(sink[..., 0])
        if total is not None:  # only if requested: it takes longer than the rest of a decoding step
            total[:, :, start:stop] = functools.reduce(torch.logaddexp, sums).reshape(batch, heads, -1)
        merged = merged if merged.dtype == dtype else merged.to(dtype)
        return merged.reshape(batch, heads, stop - start, -1).transpose(1, 2)

    if count <= FUSED_ROWS:
        return attend(0, count).contiguous()  # some models call `view` on it
    out = value.new_empty(batch, count, heads, value.shape[-1])
    for start in range(0, count, FUSED_ROWS):
        out[:, start : start + FUSED_ROWS] = attend(start, min(start + FUSED_ROWS, count))
    return out


class FusedAttention(torch.autograd.Function):
    """Autograd function of [`fused_attention`], with gradients of everything except biases.

    Call `FusedAttention.apply(geometry, scaling, sinks, value, *queries, *keys)` with one query and one key tensor per
    band. A second derivative is that of [`plain_attention`].
    """

    @staticmethod
    def forward(
        ctx: Any,
        geometry: Geometry,
        scaling: float,
        sinks: torch.Tensor | None,
        value: torch.Tensor,
        *states: torch.Tensor,
    ) -> torch.Tensor:
        bands = len(states) // 2
        dtype = torch.promote_types(value.dtype, torch.float32)
        total = value.new_empty(*states[0].shape[:3], dtype=dtype)
        out = fused_attention(geometry, states[:bands], states[bands:], value, sinks, scaling, total)
        ctx.geometry, ctx.scaling = geometry, scaling
        ctx.save_for_backward(out, total, sinks, value, *states)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        geometry, scaling = ctx.geometry, ctx.scaling
        out, total, sinks, value, *states = ctx.saved_tensors
        queries, keys = states[: len(states) // 2], states[len(states) // 2 :]
        if torch.is_grad_enabled():  # create_graph=True: the kernel's gradients have no derivative
            # bands may share a tensor, whose gradient by each band is that of a view of its own
            value, *states = (each.view_as(each) for each in (value, *states))
            queries, keys = states[: len(queries)], states[len(queries) :]
            out = plain_attention(geometry, queries, keys, value, scaling, sinks=sinks)
            needed = [each for each in (sinks, value, *states) if each is not None and each.requires_grad]
            by_id = dict(zip(map(id, needed), torch.autograd.grad(out, needed, grad, create_graph=True), strict=True))
            return None, None, *(by_id.get(id(each)) for each in (sinks, value, *states))
        # gradients are summed over many blocks, so they are accumulated in float32 or wider
        value_grad, *grads = (torch.zeros_like(tensor, dtype=total.dtype) for tensor in (value, *states))
        # queries that attend to nothing get weights of 0, because theirs would not sum to 1
        total = total.masked_fill(total < NOTHING, torch.inf)
        sizes = out.shape[2] // value.shape[1], value.dtype
        for start in range(0, out.shape[1], FUSED_ROWS):
            block_rows = slice(start, min(start + FUSED_ROWS, out.shape[1]))
            out_grad, merged = (
                grouped(tensor[:, block_rows].transpose(1, 2), value.shape[1]) for tensor in (grad, out)
            )
            sums = grouped(total[:, :, block_rows, None], value.shape[1])[..., 0]
            for band, low, high, bias, shift in geometry.pieces(block_rows.start, block_rows.stop, *sizes):
                span = slice(low, high)
                query = grouped(queries[band][:, :, block_rows], value.shape[1])
                pair = keys[band][:, :, span], value[:, :, span]
                # the weights are exp(scores + shift - sums), and the kernel takes no shift: subtract it from the sums
                level = sums if shift is None else sums - shift
                grad_parts = BACKWARD(out_grad, query, *pair, merged, level, 0.0, False, attn_mask=bias, scale=scaling)
                query_grad = grads[band][:, :, block_rows]
                query_grad += grad_parts[0].reshape(query_grad.shape)
                grads[len(queries) + band][:, :, span] += grad_parts[1]
                value_grad[:, :, span] += grad_parts[2]
        sinks_grad = None
        if sinks is not None:  # a higher sink score shrinks the output in proportion to the sink's weight
            weights = (sinks[:, None] - total).exp()
            sinks_grad = -(weights * (grad * out).sum(-1).transpose(1, 2)).sum((0, 2)).to(sinks.dtype)
        rounded = (tensor.to(like.dtype) for tensor, like in zip((value_grad, *grads), (value, *states), strict=True))
        return None, None, sinks_grad, *rounded


def banded_attention(
    geometry: Geometry,
    queries: Sequence[torch.Tensor | Rotated],
    keys: Sequence[torch.Tensor],
    value: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Compute causal attention over disjoint bands.

    Args:
        geometry (`Geometry`): bands, positions, and mask.
        queries (`Sequence[torch.Tensor | Rotated]`): `(batch, heads, queries, dim)`, rotated for each band.
        keys (`Sequence[torch.Tensor]`): `(batch, key heads, keys, dim)`, rotated for each band.
        value (`torch.Tensor` of shape `(batch, key heads, keys, dim)`): values.
        scaling (`float`): factor of the scores.
        softcap (`float`, *optional*): bound of the scores, which become `softcap * tanh(scores / softcap)`.
        sinks (`torch.Tensor` of shape `(heads,)`, *optional*): learned score of attending to nothing, per head.
        dropout (`float`, *optional*, defaults to 0): dropout probability of attention weights.

    Returns:
        `torch.Tensor` of shape `(batch, queries, heads, dim)`: contiguous.
    """
    # Kernels that are called directly require adjacent channels and do not check for them. Under autocast, rotation
    # produces float32 next to bfloat16. Like SDPA, use the narrower dtype.
    dtype, mask = value.dtype, geometry.mask
    value, *keys = _ready([value, *keys], dtype)
    queries = _ready(queries, dtype)
    learning = _learning(sinks, value, *map(unrotated, queries), *keys)
    *_, count, width = unrotated(queries[0]).shape
    # CPU without gradients: the flash kernel, with queries rotated block by block
    fused = value.device.type == "cpu" and value.shape[-1] == width and not (softcap or dropout)
    if fused and not learning and kernels.FORCED in (None, "cpu"):
        return fused_attention(geometry, queries, keys, value, sinks, scaling)
    # CUDA without mask and gradients: one kernel call per region of a band
    states = _ready([whole(query) for query in queries], dtype)
    kernel = choose(states[0], value) if geometry.aligned and mask is None else None
    if kernel is not None and not (learning or softcap or dropout):
        places = [regions(band, count, keys[0].shape[2]) for band in geometry.bands]
        if None not in places:
            return attend_regions(geometry, places, states, keys, value, kernel, scaling, sinks)  # type: ignore[arg-type]
    # CPU with gradients, except those of the mask, and those that a graph or a functorch transform derives
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if fused and kernels.FORCED in (None, "cpu") and not traced and (mask is None or not mask.requires_grad):
        arguments = geometry, scaling, sinks, value, *states, *keys
        return FusedAttention.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]

    return plain_attention(geometry, states, keys, value, scaling, softcap, sinks, dropout)


def plain_attention(
    geometry: Geometry,
    queries: Sequence[torch.Tensor],
    keys: Sequence[torch.Tensor],
    value: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Return [`banded_attention`] in plain PyTorch, in blocks of queries whose scores fit in [`SCORE_BYTES`]."""
    batch, heads, count, _ = queries[0].shape

    def attend(start: int, stop: int) -> torch.Tensor:
        attended, _ = attend_block(geometry, start, stop, queries, keys, value, scaling, softcap, sinks, dropout)
        return attended.view(batch, heads, stop - start, -1).transpose(1, 2)

    rows = max(16, SCORE_BYTES // (4 * batch * heads * keys[0].shape[2]))
    if rows >= count:
        return attend(0, count).contiguous()  # some models call `view` on it
    spans = [(start, min(start + rows, count)) for start in range(0, count, rows)]
    if _learning(sinks, value, *queries, *keys):  # backward recomputes the weights, which are of quadratic size
        return torch.cat([checkpoint(attend, *span, use_reentrant=False) for span in spans], 1)
    out = value.new_empty(batch, count, heads, value.shape[-1])
    for start, stop in spans:
        out[:, start:stop] = attend(start, stop)
    return out


def attention_with_weights(
    geometry: Geometry,
    queries: Sequence[torch.Tensor | Rotated],
    keys: Sequence[torch.Tensor],
    value: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output of [`banded_attention`] and its weights (batch, heads, queries, keys).

    All weights are held in memory, like in eager attention.
    """
    states = [whole(query) for query in queries]
    batch, heads, count, _ = states[0].shape
    out, shares = attend_block(geometry, 0, count, states, keys, value, **options, spread=True)
    weights = torch.stack(list(shares)).sum(0).view(batch, heads, count, -1)
    return out.view(batch, heads, count, -1).transpose(1, 2).contiguous(), weights


def _learning(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _ready(states: Sequence[torch.Tensor | Rotated], dtype: torch.dtype) -> list[Any]:
    return [
        each
        if isinstance(each, Rotated) or (each.dtype == dtype and each.stride(-1) == 1)
        else each.to(dtype).contiguous()
        for each in states
    ]


def attend_block(
    geometry: Geometry,
    start: int,
    stop: int,
    queries: Sequence[torch.Tensor],
    keys: Sequence[torch.Tensor],
    value: torch.Tensor,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    dropout: float,
    spread: bool = False,
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """Return the attended values of a block of queries, and the weights of each piece, from one softmax.

    Runs in plain PyTorch, with gradients. Each piece contains all keys if `spread`.
    """
    key_heads = value.shape[1]
    # decoding: if the bands share their keys, one product reads each key once for all bands
    shared = geometry.queries.shape[1] == 1 and all(key is keys[0] for key in keys)
    heads, dtype = queries[0].shape[1], value.dtype
    pieces = geometry.pieces(start, stop, heads // key_heads, dtype, spread or shared)
    blocks = [grouped(query[:, :, start:stop], key_heads) for query in queries]
    if shared:
        stacked, key = torch.cat(blocks, 2), keys[0].mT
        learning = torch.is_grad_enabled() and (stacked.requires_grad or key.requires_grad)
        if WIDE and key.device.type == "cuda" and key.dtype in (torch.float16, torch.bfloat16) and not learning:
            flat = torch.bmm(stacked.flatten(0, 1), key.flatten(0, 1), out_dtype=torch.float32)
            product = flat.view(*stacked.shape[:-1], key.shape[-1])
        else:
            product = stacked @ key
        products: Sequence[torch.Tensor] = product.chunk(len(blocks), 2)
    else:
        products = [blocks[piece.band] @ keys[piece.band][:, :, piece.low : piece.high].mT for piece in pieces]
    scores = []
    for score, (_, _, _, bias, shift) in zip(products, pieces, strict=True):
        score = score.to(torch.promote_types(score.dtype, torch.float32)) * scaling
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if shift is not None:
            score = score + (shift[..., None] if isinstance(shift, torch.Tensor) else shift)
        scores.append(score if bias is None else score + bias)
    if shared:  # a key is in at most one band, and has the lowest score in all others
        scores, pieces = [functools.reduce(torch.maximum, scores)], pieces[:1]
    if sinks is not None:
        scores.append(grouped_sinks(sinks, blocks[0]).to(scores[0].dtype))
    weights = torch.cat(scores, -1).softmax(-1).to(dtype)
    if dropout:
        weights = drop(weights, dropout)
    shares = torch.split(weights, [score.shape[-1] for score in scores], -1)  # the sink's weight has no value
    values = [value[:, :, piece.low : piece.high] for piece in pieces]
    out = sum(share @ span for share, span in zip(shares, values, strict=False))
    return out, shares[: len(pieces)]  # type: ignore[return-value]


def merge(values: torch.Tensor, sums: torch.Tensor, out: torch.Tensor, total: torch.Tensor) -> None:
    """Merge a piece of a softmax into the values and the log-sum-exp of the pieces before it, in place.

    Values have shape (batch, heads, queries, dim). Each query must attend to at least one key of the piece.
    """
    fused = one_pass(values)
    if fused is not None:
        fused.merge(values, sums, out, total)
        return
    share = torch.sigmoid(total - sums)[..., None]
    values.copy_(torch.lerp(values.to(share.dtype), out.to(share.dtype), share))
    sums.copy_(torch.logaddexp(sums, total))


def attend_regions(
    geometry: Geometry,
    places: Sequence[list[Region]],
    queries: Sequence[torch.Tensor],
    keys: Sequence[torch.Tensor],
    value: torch.Tensor,
    kernel: Kernel,
    scaling: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Return attended values (batch, queries, heads, dim), by one call of a kernel for each region of each band."""
    batch, heads, count, _ = queries[0].shape
    shifts = geometry.fades(torch.promote_types(value.dtype, torch.float32))
    merged: tuple[torch.Tensor, torch.Tensor] | None = None
    for regions_of_band, query, key, shift in zip(places, queries, keys, shifts, strict=True):
        for rows, columns, causal, window, constant in regions_of_band:
            pair = key[:, :, columns], value[:, :, columns]
            out, total = kernel(query[:, :, rows], *pair, scaling=scaling, causal=causal, window=window)
            # a shift of all logits of a query shifts its log-sum-exp by the same amount
            if constant:
                total = total + constant
            if shift is not None:
                total = total + shift[:, None, rows]
            if merged is None and out.shape[2] == count:  # a first piece for all queries becomes the result
                merged = out, total
                continue
            if merged is None:  # otherwise start from zero weight
                empty = value.new_zeros(batch, count, heads, value.shape[-1]).transpose(1, 2)
                merged = empty, total.new_full((batch, heads, count), -torch.inf)
            merge(merged[0][:, :, rows], merged[1][:, :, rows], out, total)
    assert merged is not None  # every query sees its own key
    out, total = merged
    if sinks is not None:  # they take part in the softmax but have no value
        out.mul_((total - torch.logaddexp(total, sinks.to(total.dtype)[:, None])).exp()[..., None])
    return out.transpose(1, 2).contiguous()
