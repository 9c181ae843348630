"""Kernels that attend to a band or a rectangle and tell the log-sum-exp, by which pieces of one softmax are merged.

A kernel gets queries (batch, heads, queries, dim) and keys and values (batch, key heads, keys, dim), and gives the
attended values in the shape of the queries and a float32 log-sum-exp (batch, heads, queries). With `window`, query i
of the last ones sees the latest `window` keys up to its own; without it, queries see all keys, or, where `causal` (as
many queries as keys), those up to their own. Keys' heads are shared, not repeated.

Which one is taken follows from the device; [`attention_kernel`] forces one.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from ..errors import InvalidParameterError

Kernel = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""`kernel(query, key, value, scaling=..., causal=..., window=...)`."""

MAX_WIDTH = 256
"""Channels of a head that FlashAttention-2 takes at most."""

BLOCKS = ("cpu", "plain")
"""The forms that go through blocks of queries, with biases: they take masks, softcaps and any device."""

_forced: list[str] = []


@contextmanager
def attention_kernel(name: str) -> Iterator[None]:
    """
    Inside, attention over parts runs on one kernel; where that cannot do what is asked (gradients, masks that are not
    bands, ...), on the plain form.

    Args:
        name (`str`): `"torch"` (PyTorch's own on CUDA: the one that its attention picks, but FlashAttention-2 for
            windows), `"flash_attn"` (the package), `"flex"` (FlexAttention, with any mask; PyTorch 2.9 or newer),
            `"cpu"` (PyTorch's own on the CPU) or `"plain"` (matrix products, everywhere).

    Raises:
        InvalidParameterError: there is no such kernel, or its package is not installed.
    """
    known = (*KERNELS, "flex", *BLOCKS)
    if name not in known:
        raise InvalidParameterError(f"attention kernel is {name!r}; give one of {', '.join(known)}")
    if name == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        raise InvalidParameterError("attention kernel 'flash_attn' is not installed: pip install flash-attn")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def forced() -> str | None:
    """The kernel that [`attention_kernel`] asks for."""
    return _forced[-1] if _forced else None


def choose(query: torch.Tensor, value: torch.Tensor) -> Kernel | None:
    """The kernel for bands on the device of the states, without a mask and gradients; `None` where there is none.

    FlexAttention is never chosen by itself: it compiles, and where it would win has not been measured.
    """
    name = forced()
    if name is not None:
        return KERNELS.get(name)
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.device.type != "cuda" or not half or not query.shape[-1] == value.shape[-1] <= MAX_WIDTH:
        return None
    if torch.backends.cuda.is_flash_attention_available():
        return torch_kernel
    return flash_attn_kernel if importlib.util.find_spec("flash_attn") else None


def torch_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scaling: float, causal: bool, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's kernels for CUDA: cuDNN where its attention would pick that, FlashAttention-2 otherwise."""
    if window is None and _picks_cudnn(query, key, value, scaling, causal):
        out, total = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, causal, False, scale=scaling
        )[:2]
        return out, total.reshape(query.shape[:3])
    states = (one.transpose(1, 2) for one in (query, key, value))
    sides = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    out, total = torch.ops.aten._flash_attention_forward(
        *states, None, None, query.shape[2], key.shape[2], 0.0, causal, False, scale=scaling, **sides
    )[:2]
    return out.transpose(1, 2), total


def _picks_cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, causal: bool) -> bool:
    picked = torch._fused_sdp_choice(query, key, value, None, 0.0, causal, scale=scaling, enable_gqa=True)
    return bool(picked == SDPBackend.CUDNN_ATTENTION.value)


def flash_attn_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scaling: float, causal: bool, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The package flash-attn, version 2."""
    states = (one.transpose(1, 2) for one in (query, key, value))
    sides = (-1, -1) if window is None else (window - 1, 0)
    package: Any = importlib.import_module("flash_attn")
    out, total, _ = package.flash_attn_func(
        *states, softmax_scale=scaling, causal=causal, window_size=sides, return_attn_probs=True
    )
    return out.transpose(1, 2), total


KERNELS: dict[str, Kernel] = {"torch": torch_kernel, "flash_attn": flash_attn_kernel}
"""Those for bands and rectangles without biases."""
