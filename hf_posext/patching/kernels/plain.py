"""Attention over parts by matrix products: on any device, with any mask, and with gradients."""

from __future__ import annotations

import torch
from torch.nn.functional import dropout as drop

from .fused import Piece, grouped, grouped_sinks

WIDE = hasattr(torch.ops.aten.bmm, "dtype") and torch.version.hip is None
"""Whether PyTorch multiplies half precision into float32, on CUDA and without gradients: from 2.8 on, not by ROCm."""


def attend_pieces(
    pieces: list[Piece],
    queries: list[torch.Tensor],
    keys: list[torch.Tensor],
    value: torch.Tensor,
    scaling: float,
    sinks: torch.Tensor | None,
    softcap: float | None,
    dropout: float,
) -> torch.Tensor:
    """One softmax over the pieces of a block, in plain PyTorch, with gradients."""
    queries = [grouped(query, value.shape[1]) for query in queries]
    scores = []
    for part, low, high, bias, shift in pieces:
        score = queries[part] @ keys[part][:, :, low:high].transpose(-1, -2)
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
    parts = torch.split(weights, [score.shape[-1] for score in scores], -1)  # that of the sink has no value
    out = parts[0] @ value[:, :, pieces[0].low : pieces[0].high]
    for weight, piece in zip(parts[1:], pieces[1:], strict=False):
        out = out + weight @ value[:, :, piece.low : piece.high]
    return out


def attend_single(
    queries: list[torch.Tensor],
    key: torch.Tensor,
    value: torch.Tensor,
    seen: list[torch.Tensor],
    shifts: list[torch.Tensor | None],
    mask: torch.Tensor | None,
    scaling: float,
    sinks: torch.Tensor | None,
    softcap: float | None,
    dropout: float,
) -> torch.Tensor:
    """A single query (batch, heads, 1, dim), turned for each part, to keys that stand the same for all parts.

    Each key is scored by the queries of all parts at once, so that it is read once, and `seen`, bool (batch, 1, keys)
    for each part, tells which of the scores counts. `shifts` (batch or 1, 1, keys or 1) are added to them.

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
    for here, shift, score in zip(seen, shifts, each, strict=True):
        chosen = torch.where(here[:, None], score if shift is None else score + shift[:, None], chosen)
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
