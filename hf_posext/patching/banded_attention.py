"""Attention in which near and far pairs see different positions.

The parts of a plan are disjoint, so each block of queries scores the keys of each part once and one softmax runs over
all of them: exact, and of memory linear in length. Plain PyTorch, with gradients, on any device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..plan import Part, PositionMap

SCORE_BYTES = 64 * 2**20
"""Float32 scores that are held at a time; smaller was slower on CPU, larger no faster."""


@dataclass(frozen=True)
class Branch:
    """One part with its rotated queries (batch, heads, queries, dim) and keys (batch, key heads, keys, dim)."""

    part: Part
    query: torch.Tensor
    key: torch.Tensor


def mapped(positions: torch.Tensor, rule: PositionMap) -> torch.Tensor:
    """The positions that a part sees; same shape, float32 where they may be fractional."""
    if rule == PositionMap():
        return positions
    moved = positions if rule.modulo is None else positions % rule.modulo
    if rule.group != 1:
        moved = moved // rule.group
    if rule.rate != 1 or rule.offset != int(rule.offset):
        moved = moved.float() * rule.rate
    moved = moved + (int(rule.offset) if rule.offset == int(rule.offset) else rule.offset)
    return moved if rule.limit is None else moved.clamp(max=rule.limit)


def belongs(part: Part, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
    """Which pairs are in a part: positions (batch, queries) and (batch, keys) give bool (batch, queries, keys)."""
    distance = (query_positions // part.chunk)[..., :, None] - (key_positions // part.chunk)[..., None, :]
    inside = distance >= part.low if part.low > 0 else torch.ones_like(distance, dtype=torch.bool)
    if part.high is not None:
        inside &= distance < part.high
    if part.keys_below is not None:
        inside &= key_positions[..., None, :] < part.keys_below
    return inside


def banded_attention(
    branches: list[Branch],
    value: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    aligned: bool,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Causal attention over disjoint parts.

    Args:
        branches (`list[Branch]`): the parts, with queries and keys rotated for each.
        value (`torch.Tensor` of shape `(batch, key heads, keys, dim)`): values.
        query_positions (`torch.Tensor` of shape `(batch, queries)`): positions before any remapping.
        key_positions (`torch.Tensor` of shape `(batch, keys)`): the same of the keys.
        mask (`torch.Tensor` broadcastable to `(batch, heads, queries, keys)`, *optional*): bool (attend) or additive;
            without it, the last query sees all keys and each one before it one key less.
        aligned (`bool`): positions are the indices of the keys, so that parts are bands of the score matrix.
        scaling (`float`): scores are multiplied by it.
        softcap (`float`, *optional*): scores become `softcap * tanh(scores / softcap)`.
        sinks (`torch.Tensor` of shape `(heads,)`, *optional*): a learned score of attending to nothing.
        dropout (`float`, *optional*, defaults to 0): of attention weights.

    Returns:
        `torch.Tensor` of shape `(batch, queries, heads, dim)`.
    """
    batch, heads, queries, _ = branches[0].query.shape
    key_heads, keys = value.shape[1], value.shape[2]
    rows = max(16, SCORE_BYTES // (4 * batch * heads * keys))
    out = value.new_empty(batch, queries, heads, value.shape[-1]) if not torch.is_grad_enabled() else None
    blocks = []
    for start in range(0, queries, rows):
        stop = min(start + rows, queries)
        first, last = keys - queries + start, keys - queries + stop
        scores, values = [], []
        for branch in branches:
            low, high = _extent(branch.part, first, last, keys, aligned, causal=mask is None)
            if low >= high:
                continue
            query = branch.query[:, :, start:stop].reshape(batch, key_heads, -1, branch.query.shape[-1])
            score = query @ branch.key[:, :, low:high].transpose(-1, -2)
            score = score.view(batch, heads, stop - start, high - low).float() * scaling
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            allowed = belongs(branch.part, query_positions[:, start:stop], key_positions[:, low:high])[:, None]
            if mask is None:
                index = torch.arange(low, high, device=score.device)
                allowed = allowed & (index <= torch.arange(first, last, device=score.device)[:, None])
            else:
                here = mask[:, :, start:stop, low:high] if mask.shape[2] > 1 else mask[:, :, :, low:high]
                if here.dtype == torch.bool:
                    allowed = allowed & here
                else:
                    score = score + here
            scores.append(score.masked_fill(~allowed, -torch.inf))
            values.append(value[:, :, low:high])
        if sinks is not None:
            scores.append(sinks.float().reshape(1, -1, 1, 1).expand(batch, -1, stop - start, 1))
        # a query that may attend to nothing (left padding) gets 0, as no one reads it
        weights = torch.cat(scores, -1).softmax(-1).nan_to_num(0.0).to(value.dtype)
        if sinks is not None:
            weights = weights[..., :-1]
        if dropout:
            weights = torch.nn.functional.dropout(weights, dropout)
        grouped = weights.reshape(batch, key_heads, -1, weights.shape[-1]) @ torch.cat(values, 2)
        block = grouped.view(batch, heads, stop - start, -1).transpose(1, 2)
        if out is None:
            blocks.append(block)
        else:
            out[:, start:stop] = block
    return torch.cat(blocks, 1) if out is None else out


def _extent(part: Part, first: int, last: int, keys: int, aligned: bool, causal: bool) -> tuple[int, int]:
    """The range of keys that a part can hold for queries `first` to `last - 1`."""
    end = min(last, keys) if causal or aligned else keys
    if not aligned:
        return 0, end
    oldest = 0 if part.high is None else (first // part.chunk - part.high + 1) * part.chunk
    newest = ((last - 1) // part.chunk - part.low + 1) * part.chunk
    if part.keys_below is not None:
        newest = min(newest, part.keys_below)
    return max(oldest, 0), min(newest, end)
