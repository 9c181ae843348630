"""Kernels of CUDA that attend to a band or a rectangle and return the log-sum-exp, by which pieces are merged.

A kernel takes queries (batch, heads, queries, dim) and keys and values (batch, key heads, keys, dim). It returns the
attended values in the shape of the queries, and a float32 log-sum-exp (batch, heads, queries). With `window`, query i
of the last ones sees the latest `window` keys up to its own. Without it, queries see all keys, or, where `causal` (as
many queries as keys), those up to their own. Heads of keys are shared, not repeated.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend

Kernel = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""`kernel(query, key, value, scaling=..., causal=..., window=...)`."""

CUDNN = torch.ops.aten._scaled_dot_product_cudnn_attention.default
FLASH = torch.ops.aten._flash_attention_forward.default
"""Without a look at their overloads, which takes longer than to start them."""

PLANNED = 128
"""Queries from which cuDNN is worth the plan that it makes."""


def torch_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scaling: float, causal: bool, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend by PyTorch's kernels for CUDA: cuDNN where its attention would pick that, FlashAttention-2 otherwise.

    cuDNN plans each shape anew, which takes longer than a step: not for a few queries, whose keys grow in number.
    """
    if window is None and query.shape[2] >= PLANNED and _picks_cudnn(query, key, value, scaling, causal):
        out, total = CUDNN(query, key, value, None, True, 0.0, causal, False, scale=scaling)[:2]
        return out, total.reshape(query.shape[:3])
    states = (one.transpose(1, 2) for one in (query, key, value))
    sides = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    out, total = FLASH(*states, None, None, query.shape[2], key.shape[2], 0.0, causal, False, scale=scaling, **sides)[
        :2
    ]
    return out.transpose(1, 2), total


def _picks_cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, causal: bool) -> bool:
    picked = torch._fused_sdp_choice(query, key, value, None, 0.0, causal, scale=scaling, enable_gqa=True)
    return bool(picked == SDPBackend.CUDNN_ATTENTION.value)


def flash_attn_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scaling: float, causal: bool, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend by the package flash-attn, version 2."""
    package: Any = importlib.import_module("flash_attn")
    states = (one.transpose(1, 2) for one in (query, key, value))
    sides = (-1, -1) if window is None else (window - 1, 0)
    out, total, _ = package.flash_attn_func(
        *states, softmax_scale=scaling, causal=causal, window_size=sides, return_attn_probs=True
    )
    return out.transpose(1, 2), total


KERNELS: dict[str, Kernel] = {"torch": torch_kernel, "flash_attn": flash_attn_kernel}
