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
from torch.autograd.function import once_differentiable
from torch.nn.functional import dropout as drop
from torch.utils.checkpoint import checkpoint

from . import choice
from .bands import Geometry, Piece, Region, regions, summed
from .choice import Kernel, choose, one_pass

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

    Args:
        states (`torch.Tensor` of shape `(batch, heads, queries, dim)`): unrotated queries.
        rotate (`Callable`): `rotate(states[:, :, start:stop], start, stop)` returns a rotated block.
    """

    states: torch.Tensor
    rotate: Callable[[torch.Tensor, int, int], torch.Tensor]

    def block(self, start: int, stop: int) -> torch.Tensor:
        """Return the queries `start` to `stop - 1`, rotated."""
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
    """Concatenate the rows of heads that share a key head.

    Turns (batch, heads, rows, dim) into (batch, key heads, all rows, dim).
    """
    return states.reshape(states.shape[0], key_heads, -1, states.shape[-1])


def grouped_sinks(sinks: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Expand sink scores (heads,) to the rows of grouped queries: (batch, key heads, all rows, 1)."""
    batch, key_heads, rows, _ = query.shape
    return (
        sinks.reshape(key_heads, -1, 1)
        .expand(batch, -1, -1, rows * key_heads // len(sinks))
        .reshape(batch, key_heads, rows, 1)
    )


def has_fused_gradients(mask: torch.Tensor | None) -> bool:
    """Return whether [`FusedAttention`] can be differentiated.

    It has no gradient of the mask, and none while a graph is compiled or under a functorch transform.
    """
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
    """Return attended values (batch, queries, heads, dim), computed by the CPU flash kernel.

    Each block has `rows` queries. If `total` (batch, heads, queries) is given, it receives the log-sum-exp of all
    pieces. See [`banded_attention`] for the other arguments.
    """
    first = queries[0]
    batch, heads, count, _ = (first.states if isinstance(first, Rotated) else first).shape
    key_heads, dtype = value.shape[1], value.dtype

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
        first, *rest = geometry.pieces(start, stop, heads, key_heads, dtype)
        merged, *sums = attended(first)
        for piece in rest:
            values, added = attended(piece)
            before = functools.reduce(torch.logaddexp, sums)
            share = (added - before).sigmoid_().unsqueeze(-1)  # weight of the new piece in the softmax so far
            # In a compiled graph, an in-place write would keep the old strides, which differ from the result's.
            merged = merged.lerp(values, share) if torch.compiler.is_compiling() else merged.lerp_(values, share)
            sums = [before, added]
        if sinks is not None:  # sinks take part in the softmax but have no value
            sink = grouped_sinks(sinks, rotated[first.band]).to(merged.dtype)
            merged = merged * torch.sigmoid(functools.reduce(torch.logaddexp, sums).unsqueeze(-1) - sink)
            sums.append(sink[..., 0])
        if total is not None:  # only if requested: it takes longer than the rest of a decoding step
            total[:, :, start:stop] = functools.reduce(torch.logaddexp, sums).reshape(batch, heads, -1)
        merged = merged if merged.dtype == dtype else merged.to(dtype)
        return merged.reshape(batch, heads, stop - start, -1).transpose(1, 2)

    if rows >= count:
        return attend(0, count).contiguous()  # some models call `view` on it
    out = value.new_empty(batch, count, heads, value.shape[-1])
    for start in range(0, count, rows):
        out[:, start : start + rows] = attend(start, min(start + rows, count))
    return out


class FusedAttention(torch.autograd.Function):
    """Autograd function of [`fused_attention`], with gradients of everything except biases.

    Call `FusedAttention.apply(geometry, scaling, rows, sinks, value, *queries, *keys)` with one query and one key
    tensor per band. It can be differentiated once.
    """

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
        # gradients are summed over many blocks, so they are accumulated in float32 or wider
        value_grad, *grads = (torch.zeros_like(tensor, dtype=total.dtype) for tensor in (value, *states))
        # queries that attend to nothing get weights of 0, because theirs would not sum to 1
        total = total.masked_fill(total < NOTHING, torch.inf)
        sizes = out.shape[2], value.shape[1], value.dtype
        for start in range(0, out.shape[1], rows):
            block_rows = slice(start, min(start + rows, out.shape[1]))
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
        return None, None, None, sinks_grad, *rounded


class Branch(NamedTuple):
    """Queries (batch, heads, queries, dim) and keys (batch, key heads, keys, dim), rotated for one band."""

    query: torch.Tensor | Rotated
    key: torch.Tensor


def banded_attention(
    geometry: Geometry,
    branches: Sequence[Branch],
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
        branches (`Sequence[Branch]`): queries and keys, rotated for each band.
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
    value, keys = _ready(value, dtype), [_ready(key, dtype) for _, key in branches]
    queries: list[torch.Tensor | Rotated] = [
        query if isinstance(query, Rotated) else _ready(query, dtype) for query, _ in branches
    ]
    states = [query.states if isinstance(query, Rotated) else query for query in queries]
    learning = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (sinks, value, *states, *keys)
    )
    batch, heads, count, width = states[0].shape
    # CPU without gradients: the flash kernel, with queries rotated block by block
    fused = value.device.type == "cpu" and value.shape[-1] == width and not (softcap or dropout)
    if fused and not learning and choice.FORCED in (None, "cpu"):
        return fused_attention(geometry, queries, keys, value, sinks, scaling, FUSED_ROWS)
    # CUDA without mask and gradients: one kernel call per region of a band
    states = [_ready(whole(query), dtype) for query in queries]
    kernel = choose(states[0], value) if geometry.aligned and mask is None else None
    if kernel is not None and not (learning or softcap or dropout):
        places = [regions(band, count, keys[0].shape[2]) for band in geometry.bands]
        if all(place is not None for place in places):
            shifts = geometry.fades(torch.promote_types(dtype, torch.float32))
            together = zip(places, states, keys, shifts, strict=True)
            band_states = [(place or [], query, key, shift) for place, query, key, shift in together]
            return attend_regions(band_states, value, kernel, scaling, sinks)
    # CPU with gradients
    if fused and choice.FORCED in (None, "cpu") and has_fused_gradients(mask):
        learned: torch.Tensor = FusedAttention.apply(  # type: ignore[no-untyped-call]
            geometry, scaling, FUSED_ROWS, sinks, value, *states, *keys
        )
        return learned
    # decoding with the same keys for all bands: read each key once
    if count == 1 and all(key is keys[0] for key in keys):
        return attend_single(geometry, states, keys[0], value, scaling, sinks, softcap, dropout)

    # everything else: plain PyTorch, in blocks of queries whose scores fit in `SCORE_BYTES`
    def attend(start: int, stop: int) -> torch.Tensor:
        query = [tensor[:, :, start:stop] for tensor in states]
        pieces = geometry.pieces(start, stop, heads, value.shape[1], dtype)
        attended, _ = attend_pieces(pieces, query, keys, value, scaling, sinks, softcap, dropout)
        return attended.view(batch, heads, stop - start, -1).transpose(1, 2)

    rows = max(16, SCORE_BYTES // (4 * batch * heads * keys[0].shape[2]))
    if rows >= count:
        return attend(0, count).contiguous()  # some models call `view` on it
    spans = [(start, min(start + rows, count)) for start in range(0, count, rows)]
    if learning:  # the weights of all blocks are of quadratic size, so backward recomputes them
        return torch.cat([checkpoint(attend, *span, use_reentrant=False) for span in spans], 1)
    out = value.new_empty(batch, count, heads, value.shape[-1])
    for start, stop in spans:
        out[:, start:stop] = attend(start, stop)
    return out


def attention_with_weights(
    geometry: Geometry, branches: Sequence[Branch], value: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output of [`banded_attention`] and its weights (batch, heads, queries, keys).

    All weights are held in memory, like in eager attention.
    """
    queries, keys = [whole(query) for query, _ in branches], [key for _, key in branches]
    batch, heads, count, _ = queries[0].shape
    # not treated as aligned, so that each band is one rectangle over all keys
    places = Geometry(geometry.bands, geometry.queries, geometry.keys, geometry.mask, aligned=False)
    pieces = places.pieces(0, count, heads, value.shape[1], value.dtype)
    out, shares = attend_pieces(pieces, queries, keys, value, **options)
    weights = torch.stack(list(shares)).sum(0).view(batch, heads, count, -1)
    return out.view(batch, heads, count, -1).transpose(1, 2).contiguous(), weights


def _ready(states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    states = states if states.dtype == dtype else states.to(dtype)
    return states if states.stride(-1) == 1 else states.contiguous()


def attend_pieces(
    pieces: list[Piece],
    queries: list[torch.Tensor],
    keys: list[torch.Tensor],
    value: torch.Tensor,
    scaling: float,
    sinks: torch.Tensor | None,
    softcap: float | None,
    dropout: float,
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """Return the attended values of a block and the weights of each piece, from one softmax over all pieces.

    Runs in plain PyTorch, with gradients.
    """
    queries = [grouped(query, value.shape[1]) for query in queries]
    scores = []
    for band, low, high, bias, shift in pieces:
        score = queries[band] @ keys[band][:, :, low:high].transpose(-1, -2)
        score = score.to(torch.promote_types(score.dtype, torch.float32)) * scaling
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if shift is not None:
            score = score + (shift[..., None] if isinstance(shift, torch.Tensor) else shift)
        scores.append(score if bias is None else score + bias)
    if sinks is not None:
        scores.append(grouped_sinks(sinks, queries[0]).to(scores[0].dtype))
    weights = torch.cat(scores, -1).softmax(-1).to(value.dtype)
    if dropout:
        weights = drop(weights, dropout)
    shares = torch.split(weights, [score.shape[-1] for score in scores], -1)  # the sink's weight has no value
    out = shares[0] @ value[:, :, pieces[0].low : pieces[0].high]
    for weight, piece in zip(shares[1:], pieces[1:], strict=False):
        out = out + weight @ value[:, :, piece.low : piece.high]
    return out, shares[: len(pieces)]


def attend_single(
    geometry: Geometry,
    queries: list[torch.Tensor],
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    sinks: torch.Tensor | None,
    softcap: float | None,
    dropout: float,
) -> torch.Tensor:
    """Attend from a single query (batch, heads, 1, dim), rotated for each band, to the same keys for all bands.

    Each key is scored by the queries of all bands at once, so that it is read only once. The band of the key then
    selects one of the scores.

    Returns:
        `torch.Tensor` of shape `(batch, 1, heads, dim)`.
    """
    batch, heads = queries[0].shape[:2]
    stacked = torch.cat([grouped(query, value.shape[1]) for query in queries], 2)
    scores = _products(stacked, key.transpose(-1, -2)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    least = torch.finfo(value.dtype).min  # finite, so that a query that attends to nothing does not become NaN
    band_scores = scores.chunk(len(queries), 2)
    chosen = torch.full((), least, dtype=scores.dtype, device=scores.device)
    shifts, mask = geometry.fades(scores.dtype), geometry.mask
    for band, faded, score in zip(geometry.bands, shifts, band_scores, strict=True):
        shift = summed(None if faded is None else faded[..., None], geometry.decay(band, scores.dtype))
        inside = geometry.belongs(band)[:, None]
        chosen = torch.where(inside, score if shift is None else score + shift[:, None], chosen)
    if mask is not None:
        mask = mask if mask.shape[1] == 1 else mask.reshape(batch, value.shape[1], -1, mask.shape[-1])
        is_bool = mask.dtype == torch.bool
        chosen = torch.where(mask, chosen, least) if is_bool else chosen + mask.to(scores.dtype).clamp(min=least)
    if sinks is not None:
        chosen = torch.cat([chosen, grouped_sinks(sinks, band_scores[0]).to(scores.dtype)], -1)
    weights = chosen.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    if dropout:
        weights = drop(weights, dropout)
    return (weights @ value).view(batch, 1, heads, -1)


def _products(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return products (batch, heads, rows, keys) in float32 or wider."""
    learning = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    if WIDE and query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16) and not learning:
        flat: torch.Tensor = torch.bmm(query.flatten(0, 1), key.flatten(0, 1), out_dtype=torch.float32)
        return flat.view(*query.shape[:-1], key.shape[-1])
    products = query @ key
    return products.to(torch.promote_types(products.dtype, torch.float32))


class Merged:
    """Softmax merged from pieces: values (batch, heads, queries, dim) and their log-sum-exp in float32."""

    def __init__(self, query: torch.Tensor, value: torch.Tensor) -> None:
        self.query, self.value = query, value
        self.empty = True

    def add(self, rows: slice, out: torch.Tensor, total: torch.Tensor) -> None:
        """Merge a piece for some of the queries.

        Each of these queries must attend to at least one key of the piece. `out` and `total` may be modified later.
        """
        if self.empty:  # a first piece for all queries becomes the result; otherwise start from zero weight
            self.empty = False
            if out.shape[2] == self.query.shape[2]:
                self.out, self.total = out, total
                return
            batch, heads, queries, _ = self.query.shape
            self.out = self.value.new_zeros(batch, queries, heads, self.value.shape[-1]).transpose(1, 2)
            self.total = torch.full((batch, heads, queries), -torch.inf, dtype=total.dtype, device=total.device)
        held, held_sum = self.out[:, :, rows], self.total[:, :, rows]
        fused = one_pass(held)
        if fused is not None:
            fused.merge(held, held_sum, out, total)
            return
        share = torch.sigmoid(total - held_sum)[..., None]
        held.copy_(torch.lerp(held.to(share.dtype), out.to(share.dtype), share))
        held_sum.copy_(torch.logaddexp(held_sum, total))

    def add_sinks(self, sinks: torch.Tensor) -> None:
        """Add sink scores (heads,) to the softmax, which scales the values down."""
        sinks = sinks.to(self.total.dtype)[:, None]
        self.out.mul_((self.total - torch.logaddexp(self.total, sinks)).exp()[..., None])


def attend_regions(
    states: list[tuple[list[Region], torch.Tensor, torch.Tensor, torch.Tensor | None]],
    value: torch.Tensor,
    kernel: Kernel,
    scaling: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attend to the regions of each band, and merge them into one softmax.

    Args:
        states (`list[tuple]`): for each band, its regions, the queries and keys that are rotated for it, and the shift
            (batch or 1, queries) of each query's logits or `None`.
        value (`torch.Tensor` of shape `(batch, key heads, keys, dim)`): values.
        kernel (`Kernel`): attends to one region.
        scaling (`float`): factor of the scores.
        sinks (`torch.Tensor` of shape `(heads,)`, *optional*): score of attending to nothing, per head.

    Returns:
        `torch.Tensor` of shape `(batch, queries, heads, dim)`.
    """
    merged = Merged(states[0][1], value)
    for places, query, key, shift in states:
        for rows, columns, causal, window, constant in places:
            pair = key[:, :, columns], value[:, :, columns]
            out, total = kernel(query[:, :, rows], *pair, scaling=scaling, causal=causal, window=window)
            # a shift of all logits of a query shifts its log-sum-exp by the same amount
            if constant:
                total = total + constant
            if shift is not None:
                total = total + shift[:, None, rows]
            merged.add(rows, out, total)
    if sinks is not None:
        merged.add_sinks(sinks)
    return merged.out.transpose(1, 2).contiguous()
