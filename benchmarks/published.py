"""Remapped positions of the papers, independent of the package: an exact reference, and the published code.

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
    """Return the distance at which query `i` sees key `j`. `None` stands for the unpatched model."""
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


def logit_loss(method: Any, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """Return the float64 amount that a fade or decay subtracts from the logit of query `i` and key `j`."""
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
    """Return the float64 attention of the queries `rows`, each pair rotated by its distance: `(rows, heads, dim)`."""
    query, key, value = (states_of_kind[0].double() for states_of_kind in states)
    groups, half = len(query) // len(key), query.shape[-1] // 2
    keys = torch.arange(key.shape[1], device=key.device)
    apart = distance(method, rows[:, None], keys).double()
    lost = logit_loss(method, rows[:, None], keys)
    angle = apart[..., None] * inv_freq.double()
    cos, sin = angle.cos(), angle.sin()
    outputs = []
    for head, states_of_head in enumerate(query[:, rows]):
        (a, b), (c, d) = (
            channels.split(half, -1) for channels in (states_of_head[:, None], key[head // groups][None])
        )
        scores = ((a * c + b * d) * cos + (a * d - b * c) * sin).sum(-1) * query.shape[-1] ** -0.5
        weights = (scores - lost).masked_fill(keys > rows[:, None], -torch.inf).softmax(-1)
        outputs.append(weights @ value[head // groups])
    return torch.stack(outputs, 1)


def rotated(method: Any, states: tuple[torch.Tensor, ...], rotary: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return queries and keys rotated by their own positions, and by those of far pairs."""
    query, key, _ = states
    positions = torch.arange(query.shape[2], device=query.device)[None]
    match method:
        case SelfExtend(group=g, window=w):
            far = positions // g + w - w // g, positions // g
        case ReRoPE(window=w):
            far = torch.full_like(positions, w), torch.zeros_like(positions)
        case _:
            raise TypeError(f"no published code for {method}")
    cos, sin = rotary(query, positions)
    (query_cos, query_sin), (key_cos, key_sin) = (rotary(query, far_positions) for far_positions in far)
    far_query, _ = apply_rotary_pos_emb(query, key, query_cos, query_sin)
    _, far_key = apply_rotary_pos_emb(query, key, key_cos, key_sin)
    return [apply_rotary_pos_emb(query, key, cos, sin), (far_query, far_key)]


def repeated(key: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    return key.repeat_interleave(query.shape[1] // key.shape[1], 1)


@torch.inference_mode()
def eager(method: Any, states: tuple[torch.Tensor, ...], rotary: Any) -> torch.Tensor:
    """Run the default code of Self-Extend and ReRoPE, which scores all pairs twice and selects by `torch.where`."""
    value = repeated(states[2], states[0])
    near, far = (
        query @ repeated(key, query).transpose(-1, -2) * query.shape[-1] ** -0.5
        for query, key in rotated(method, states, rotary)
    )
    positions = torch.arange(near.shape[-1], device=near.device)
    apart = positions[:, None] - positions
    scores = torch.where(apart < method.window, near, far).masked_fill_(apart < 0, torch.finfo(near.dtype).min)
    weights = softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).transpose(1, 2)


@torch.inference_mode()
def flash(method: Any, states: tuple[torch.Tensor, ...], rotary: Any) -> torch.Tensor:
    """Run Self-Extend's code for FlashAttention.

    One call attends within the window and one past it, on repeated heads. Their outputs are merged in float32 with
    weights from the log-sum-exp. Copies of the published code are kept.
    """
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
    """Return causal attention and its log-sum-exp by FlashAttention-2, or on a CPU by PyTorch's own kernel."""
    length = query.shape[2]
    if query.is_cuda:
        states = (tensor.transpose(1, 2) for tensor in (query, key, value))
        near = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
        out, total, *_ = torch.ops.aten._flash_attention_forward(
            *states, None, None, length, length, 0.0, True, False, **near
        )
        return out.transpose(1, 2), total
    positions = torch.arange(length)
    apart = positions[:, None] - positions
    visible = (apart >= 0) & (apart < (window or length))
    mask = torch.zeros(length, length, dtype=query.dtype).masked_fill_(~visible, -torch.inf)
    out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=mask)
    return out, total
