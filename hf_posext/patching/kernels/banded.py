"""Attention in which near and far pairs see different positions.

The bands of a plan are disjoint. Each block of queries scores the keys of each band once, and one softmax runs over
all of them: exact, and of memory linear in length, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import dropout as drop
from torch.utils.checkpoint import checkpoint

from .bands import Geometry, Piece, Region, regions, summed
from .choice import Kernel, choose, forced, one_pass
from .fused import FusedAttention, Rotated, fused_attention, grouped, grouped_sinks, has_fused_gradients, whole

SCORE_BYTES = 16 * 2**20
"""Float32 scores that are held at a time."""

FUSED_ROWS = 192
"""Queries in a block where a fused kernel holds no scores: shorter blocks have less at their edges, but more calls.
This divides chunks of three quarters of a power of two, so that no block lies in two of them."""

WIDE = hasattr(torch.ops.aten.bmm, "dtype") and torch.version.hip is None
"""`True` where PyTorch multiplies half precision into float32, on CUDA and without gradients: from 2.8 on, not by
ROCm."""


class Branch(NamedTuple):
    """Queries (batch, heads, queries, dim) and keys (batch, key heads, keys, dim) as one band sees them."""

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
    """
    Causal attention over disjoint bands.

    Args:
        geometry (`Geometry`): bands, positions and mask.
        branches (`Sequence[Branch]`): queries and keys, rotated for each band.
        value (`torch.Tensor` of shape `(batch, key heads, keys, dim)`): values.
        scaling (`float`): factor of scores.
        softcap (`float`, *optional*): scores become `softcap * tanh(scores / softcap)`.
        sinks (`torch.Tensor` of shape `(heads,)`, *optional*): a learned score of attending to nothing.
        dropout (`float`, *optional*, defaults to 0): of attention weights.

    Returns:
        `torch.Tensor` of shape `(batch, queries, heads, dim)`: contiguous.
    """
    # kernels that are called directly expect adjacent channels, and do not check. Under autocast, rotation leaves
    # float32 beside bfloat16; as SDPA does, the narrower is taken
    dtype, mask = value.dtype, geometry.mask
    value, keys = _ready(value, dtype), [_ready(key, dtype) for _, key in branches]
    queries: list[torch.Tensor | Rotated] = [
        query if isinstance(query, Rotated) else _ready(query, dtype) for query, _ in branches
    ]
    states = [query.states if isinstance(query, Rotated) else query for query in queries]
    learning = torch.is_grad_enabled() and any(
        one is not None and one.requires_grad for one in (sinks, value, *states, *keys)
    )
    batch, heads, count, width = states[0].shape
    fused = value.device.type == "cpu" and value.shape[-1] == width and not (softcap or dropout)
    if fused and not learning and forced() in (None, "cpu"):
        return fused_attention(geometry, queries, keys, value, sinks, scaling, FUSED_ROWS)
    states = [_ready(whole(query), dtype) for query in queries]
    kernel = choose(states[0], value) if geometry.aligned and mask is None else None
    if kernel is not None and not (learning or softcap or dropout):
        places = [regions(band, count, keys[0].shape[2]) for band in geometry.bands]
        if all(place is not None for place in places):
            shifts = geometry.fades(torch.promote_types(dtype, torch.float32))
            together = zip(places, states, keys, shifts, strict=True)
            each = [(place or [], query, key, shift) for place, query, key, shift in together]
            return attend_regions(each, value, kernel, scaling, sinks)
    if fused and forced() in (None, "cpu") and has_fused_gradients(mask):
        learned: torch.Tensor = FusedAttention.apply(  # type: ignore[no-untyped-call]
            geometry, scaling, FUSED_ROWS, sinks, value, *states, *keys
        )
        return learned
    if count == 1 and all(key is keys[0] for key in keys):
        return attend_single(geometry, states, keys[0], value, scaling, sinks, softcap, dropout)

    def attend(start: int, stop: int) -> torch.Tensor:
        query = [one[:, :, start:stop] for one in states]
        pieces = geometry.pieces(start, stop, heads, value.shape[1], dtype)
        attended, _ = attend_pieces(pieces, query, keys, value, scaling, sinks, softcap, dropout)
        return attended.view(batch, heads, stop - start, -1).transpose(1, 2)

    rows = max(16, SCORE_BYTES // (4 * batch * heads * keys[0].shape[2]))
    if rows >= count:
        return attend(0, count).contiguous()  # some models view it
    spans = [(start, min(start + rows, count)) for start in range(0, count, rows)]
    if learning:  # the weights of all blocks are of quadratic size: they are computed again in backward
        return torch.cat([checkpoint(attend, *span, use_reentrant=False) for span in spans], 1)
    out = value.new_empty(batch, count, heads, value.shape[-1])
    for start, stop in spans:
        out[:, start:stop] = attend(start, stop)
    return out


def attention_with_weights(
    geometry: Geometry, branches: Sequence[Branch], value: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what [`banded_attention`] does, and its weights (batch, heads, queries, keys), all held, as in eager."""
    queries, keys = [whole(query) for query, _ in branches], [key for _, key in branches]
    batch, heads, count, _ = queries[0].shape
    # not by stripes, so that each band has one rectangle of all keys
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
    """One softmax over the pieces of a block, in plain PyTorch, with gradients: what is attended, and the weights."""
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
    shares = torch.split(weights, [score.shape[-1] for score in scores], -1)  # that of the sink has no value
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
    """Attend from a single query (batch, heads, 1, dim), rotated for each band, to keys that all bands see alike.

    Each key is scored by the queries of all bands at once, so that it is read once. Its band tells which of the scores
    counts.

    Returns:
        `torch.Tensor` of shape `(batch, 1, heads, dim)`.
    """
    batch, heads = queries[0].shape[:2]
    asked = torch.cat([grouped(query, value.shape[1]) for query in queries], 2)
    scores = _products(asked, key.transpose(-1, -2)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    least = torch.finfo(value.dtype).min  # finite, so that a query that attends to nothing gets no NaN
    each = scores.chunk(len(queries), 2)
    chosen = torch.full((), least, dtype=scores.dtype, device=scores.device)
    shifts, mask = geometry.fades(scores.dtype), geometry.mask
    for band, faded, score in zip(geometry.bands, shifts, each, strict=True):
        shift = summed(None if faded is None else faded[..., None], geometry.decay(band, scores.dtype))
        inside = geometry.belongs(band)[:, None]
        chosen = torch.where(inside, score if shift is None else score + shift[:, None], chosen)
    if mask is not None:
        mask = mask if mask.shape[1] == 1 else mask.reshape(batch, value.shape[1], -1, mask.shape[-1])
        is_bool = mask.dtype == torch.bool
        chosen = torch.where(mask, chosen, least) if is_bool else chosen + mask.to(scores.dtype).clamp(min=least)
    if sinks is not None:
        chosen = torch.cat([chosen, grouped_sinks(sinks, each[0]).to(scores.dtype)], -1)
    weights = chosen.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    if dropout:
        weights = drop(weights, dropout)
    return (weights @ value).view(batch, 1, heads, -1)


def _products(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Products (batch, heads, rows, keys) in float32 or above."""
    learning = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    if WIDE and query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16) and not learning:
        flat: torch.Tensor = torch.bmm(query.flatten(0, 1), key.flatten(0, 1), out_dtype=torch.float32)
        return flat.view(*query.shape[:-1], key.shape[-1])
    products = query @ key
    return products.to(torch.promote_types(products.dtype, torch.float32))


class Merged:
    """One softmax from pieces of it: values (batch, heads, queries, dim) and their log-sum-exp in float32."""

    def __init__(self, query: torch.Tensor, value: torch.Tensor) -> None:
        self.query, self.value = query, value
        self.empty = True

    def add(self, rows: slice, out: torch.Tensor, total: torch.Tensor) -> None:
        """Add a piece for some of the queries, all of which attend to some of its keys. Its tensors become its own."""
        if self.empty:
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
        """Add scores (heads,) of attending to nothing."""
        sinks = sinks.to(self.total.dtype)[:, None]
        self.out.mul_((self.total - torch.logaddexp(self.total, sinks)).exp()[..., None])


def attend_regions(
    states: list[tuple[list[Region], torch.Tensor, torch.Tensor, torch.Tensor | None]],
    value: torch.Tensor,
    kernel: Kernel,
    scaling: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attend to the regions of some bands, each with the queries and keys that are rotated for it, and with what is
    added to the logits of each query (batch or 1, queries), if anything is.

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
