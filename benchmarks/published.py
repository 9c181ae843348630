"""Remapped positions as their papers have them, apart from the package: what is exact, and what was fast until now.

Queries and keys are `(1, heads, tokens, dim)` before any rotation, with fewer heads for keys and values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.functional import softmax
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_posext.methods import Composition, Decay, DualChunk, Fade, LeakyReRoPE, ReRoPE, SelfExtend, StringShift


def distance(method: Any, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """The distance at which query `i` sees key `j`; `None` is the model as it is."""
    d = i - j
    match method:
        case None:
            return d
        case Composition(components=(first, *_)):
            return distance(first, i, j)
        case SelfExtend(group=g, window=w):
            return torch.where(d < w, d, i // g + w - w // g - j // g)
        case ReRoPE(window=w):
            return d.clamp(max=w)
        case LeakyReRoPE(window=w, stride=k):
            return torch.where(d < w, d, w + (d - w) / k)
        case StringShift(shift=s, local=w):
            return torch.where(d < s, d, d - s + w)
        case DualChunk(chunk=chunk, local=local):
            step = chunk - local
            apart = i // step - j // step
            before = torch.where(apart == 1, (i % step + step).clamp(max=chunk), min(2 * step - 1, chunk))
            return torch.where(apart == 0, i % step, before) - j % step
    raise TypeError(f"no formula for {method}")


def taken(method: Any, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """Return what a fade or a decay subtracts from the logit of query `i` and key `j` beyond the window, float64."""
    d = (i - j).double()
    match method:
        case Composition(components=(ReRoPE(window=w), Fade(strength=s, reference=r))):
            loss = s * ((i - w + 1).double() / r).clamp(min=1).log() + 0 * d
        case Composition(components=(ReRoPE(window=w), Decay(strength=s, start=start))):
            octave = (d / start).clamp(min=1).log2().floor() + 0.5
            loss = torch.where(d < start, 0, s * math.log(2) * octave)
        case _:
            return 0 * d
    return torch.where(d < w, 0, loss)


def exact(method: Any, states: tuple[torch.Tensor, ...], inv_freq: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Attention of some queries in float64, each pair rotated by its distance: `(rows, heads, dim)`."""
    query, key, value = (each[0].double() for each in states)
    groups, half = len(query) // len(key), query.shape[-1] // 2
    keys = torch.arange(key.shape[1], device=key.device)
    apart = distance(method, rows[:, None], keys).double()
    lost = taken(method, rows[:, None], keys)
    angle = apart[..., None] * inv_freq.double()
    cos, sin = angle.cos(), angle.sin()
    found = []
    for head, states_of_head in enumerate(query[:, rows]):
        (a, b), (c, d) = (each.split(half, -1) for each in (states_of_head[:, None], key[head // groups][None]))
        scores = ((a * c + b * d) * cos + (a * d - b * c) * sin).sum(-1) * query.shape[-1] ** -0.5
        weights = (scores - lost).masked_fill(keys > rows[:, None], -torch.inf).softmax(-1)
        found.append(weights @ value[head // groups])
    return torch.stack(found, 1)


def rotated(method: Any, states: tuple[torch.Tensor, ...], rotary: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Queries and keys at their own positions, and at those of far pairs."""
    query, key, _ = states
    at = torch.arange(query.shape[2], device=query.device)[None]
    match method:
        case SelfExtend(group=g, window=w):
            far = at // g + w - w // g, at // g
        case ReRoPE(window=w):
            far = torch.full_like(at, w), torch.zeros_like(at)
        case _:
            raise TypeError(f"no published code for {method}")
    cos, sin = rotary(query, at)
    (query_cos, query_sin), (key_cos, key_sin) = (rotary(query, each) for each in far)
    far_query, _ = apply_rotary_pos_emb(query, key, query_cos, query_sin)
    _, far_key = apply_rotary_pos_emb(query, key, key_cos, key_sin)
    return [apply_rotary_pos_emb(query, key, cos, sin), (far_query, far_key)]


def repeated(key: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    return key.repeat_interleave(query.shape[1] // key.shape[1], 1)


@torch.inference_mode()
def eager(method: Any, states: tuple[torch.Tensor, ...], rotary: Any) -> torch.Tensor:
    """The default code of Self-Extend and ReRoPE: all pairs are scored twice, and `torch.where` selects."""
    value = repeated(states[2], states[0])
    near, far = (
        query @ repeated(key, query).transpose(-1, -2) * query.shape[-1] ** -0.5
        for query, key in rotated(method, states, rotary)
    )
    at = torch.arange(near.shape[-1], device=near.device)
    apart = at[:, None] - at
    scores = torch.where(apart < method.window, near, far).masked_fill_(apart < 0, torch.finfo(near.dtype).min)
    weights = softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).transpose(1, 2)


@torch.inference_mode()
def flash(method: Any, states: tuple[torch.Tensor, ...], rotary: Any) -> torch.Tensor:
    """Self-Extend's code for FlashAttention: a call with a window and one past it, on repeated heads, merged in
    float32 with weights of the log-sum-exp, copies and all."""
    window, value = method.window, repeated(states[2], states[0])
    (query, key), (far_query, far_key) = rotated(method, states, rotary)
    key, far_key = repeated(key, query), repeated(far_key, query)
    length = query.shape[2]
    near, near_sum = attend(query, key, value, window)
    far, far_sum = attend(far_query[:, :, window:], far_key[:, :, : length - window], value[:, :, : length - window])
    near_weight = torch.ones_like(near_sum)
    near_weight[:, :, window:] = 1 / (1 + torch.exp(far_sum - near_sum[:, :, window:]))
    far_weight = 1 / (1 + torch.exp(near_sum[:, :, window:] - far_sum))
    out = (near * near_weight[..., None]).to(value.dtype)
    out[:, :, window:] += (far * far_weight[..., None]).to(value.dtype)
    return out.nan_to_num(nan=0).transpose(1, 2)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention, and its log-sum-exp, by FlashAttention-2; on a CPU by what PyTorch has there."""
    length = query.shape[2]
    if query.is_cuda:
        states = (each.transpose(1, 2) for each in (query, key, value))
        near = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
        out, total, *_ = torch.ops.aten._flash_attention_forward(
            *states, None, None, length, length, 0.0, True, False, **near
        )
        return out.transpose(1, 2), total
    at = torch.arange(length)
    apart = at[:, None] - at
    seen = (apart >= 0) & (apart < (window or length))
    mask = torch.zeros(length, length, dtype=query.dtype).masked_fill_(~seen, -torch.inf)
    out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=mask)
    return out, total
