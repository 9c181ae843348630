"""Kernels that attend to a band or a rectangle and tell the log-sum-exp, by which pieces of one softmax are merged.

A kernel gets queries (batch, heads, queries, dim) and keys and values (batch, key heads, keys, dim), and gives the
attended values in the shape of the queries and a float32 log-sum-exp (batch, heads, queries). With `window`, query i
of the last ones sees the latest `window` keys up to its own; without it, queries see all keys, or, where `causal` (as
many queries as keys), those up to their own. Keys' heads are shared, not repeated.

Which one is taken follows from the device, and from what it computes there: each is tried once on a small problem, and
one that fails or computes something else is left alone, with a warning. [`attention_kernel`] forces one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from ..errors import InvalidParameterError

logger = logging.getLogger(__name__)

Kernel = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""`kernel(query, key, value, scaling=..., causal=..., window=...)`."""

CUDNN = torch.ops.aten._scaled_dot_product_cudnn_attention.default
FLASH = torch.ops.aten._flash_attention_forward.default
"""Without a look at their overloads, which takes longer than to start them."""

MAX_WIDTH = 256
"""Channels of a head that FlashAttention-2 takes at most."""

PLANNED = 128
"""Queries from which cuDNN is worth the plan that it makes."""

BLOCKS = ("cpu", "plain")
"""The forms that go through blocks of queries, with biases: they take masks, softcaps and any device."""

TRIAL, TRIAL_ERROR = 256, 0.05
"""Keys that a kernel is tried on, and how far it may be off: bfloat16 is by 0.01, a key too many by more."""

ONE_PASS, ONE_PASS_ERROR = (torch.float16, torch.bfloat16, torch.float32), 1e-4
"""Dtypes that are rotated and merged by Triton, and how far that may be off in float32."""

_forced: list[str] = []
_tried: dict[tuple[Any, ...], bool] = {}


@contextmanager
def attention_kernel(name: str) -> Iterator[None]:
    """
    Inside, attention over parts runs on one kernel; where that cannot do what is asked (gradients, masks that are not
    bands, ...), on the plain form.

    Args:
        name (`str`): `"torch"` (PyTorch's own on CUDA: the one that its attention picks, but FlashAttention-2 for
            windows), `"flash_attn"` (the package), `"kernels"` (the same from the Hub, by the package `kernels`, which
            downloads it at first), `"flex"` (FlexAttention, with any mask; PyTorch 2.9 or newer), `"cpu"` (PyTorch's
            own on the CPU, with gradients) or `"plain"` (matrix products, everywhere).

    Raises:
        InvalidParameterError: there is no such kernel, or its package is not installed.
    """
    known = (*KERNELS, "flex", *BLOCKS)
    if name not in known:
        raise InvalidParameterError(f"attention kernel is {name!r}; give one of {', '.join(known)}")
    if name in PACKAGES and importlib.util.find_spec(name) is None:
        raise InvalidParameterError(f"attention kernel {name!r} is not installed: pip install {PACKAGES[name]}")
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

    FlexAttention is never chosen by itself: it compiles, and where it would win has not been measured. Nor is the
    Hub's kernel, which is downloaded.
    """
    name = forced()
    if name is not None:
        return KERNELS.get(name)
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return None
    if not query.shape[-1] == value.shape[-1] <= MAX_WIDTH:
        return None
    kernels = [torch_kernel] if torch.backends.cuda.is_flash_attention_available() else []
    if _has("flash_attn"):
        kernels.append(flash_attn_kernel)
    return next((kernel for kernel in kernels if works(kernel, query, value)), None)


@functools.cache
def _has(package: str) -> bool:
    """Whether a package is installed; to look takes as long as a step of decoding does in a layer."""
    return importlib.util.find_spec(package) is not None


def works(kernel: Kernel, query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a kernel computes what it should on the device and in the dtype of some states, with as many heads."""
    like = query.device, query.dtype, query.shape[1], value.shape[1], query.shape[-1]
    found = _tried.get((kernel, *like))
    if found is None:
        if torch.compiler.is_compiling():  # patching has tried it already, unless the model was moved since
            return False
        reason = _trial(kernel, *like)
        if reason is not None:
            logger.warning("%s is not used on %s in %s: %s", kernel.__name__, *like[:2], reason)
        found = _tried[kernel, *like] = reason is None
    return found


def one_pass(states: torch.Tensor) -> Any:
    """The module of kernels by which states are rotated and merged in one pass; `None` where that is left to PyTorch:
    without Triton, on other devices than the current one, where it would start them, and in graphs, transforms and
    under autograd, which fuse and differentiate."""
    if states.device.type != "cuda" or states.stride(-1) != 1 or states.dtype not in ONE_PASS:
        return None
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    if torch.is_grad_enabled() and states.requires_grad or states.device.index != torch.cuda.current_device():
        return None
    return _one_pass(states.device)


@functools.cache
def _one_pass(device: torch.device) -> Any:
    if not _has("triton"):
        return None
    try:
        kernels: Any = importlib.import_module(".triton_kernels", __package__)
        draw = torch.Generator(device).manual_seed(0)  # the user's numbers stay what they are
        states, cos, sin = torch.randn(3, 1, 1, TRIAL, 8, device=device, generator=draw).unbind()
        off = kernels.rotate(states, cos, sin, 4) - (states * cos + states.roll(4, -1) * sin)
        sums = states.sum(-1)
        kernels.merge(held := states.clone(), torch.zeros_like(sums), cos, sums)
        off = torch.cat([off, held - torch.lerp(states, cos, torch.sigmoid(sums)[..., None])]).abs().max().item()
    except Exception as error:  # a compiler that is missing, among others
        logger.warning("Triton is not used on %s: %s: %s", device, type(error).__name__, error)
        return None
    if not off < ONE_PASS_ERROR:
        logger.warning("Triton is not used on %s: it is off by %.2g", device, off)
        return None
    return kernels


def _trial(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int
) -> str | None:
    """Why a kernel cannot be used: what it raised, or how far it was off; of a square, a rectangle and a band."""
    draw = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(1, count, TRIAL, width, device=device, dtype=dtype, generator=draw)
        for count in (heads, key_heads, key_heads)
    )
    spread = [one.float().repeat_interleave(heads // key_heads, 1) for one in (key, value)]
    distance = torch.arange(TRIAL, device=device)[:, None] - torch.arange(TRIAL, device=device)
    for rows, causal, window in ((TRIAL, True, None), (TRIAL // 2, False, None), (TRIAL // 2, False, TRIAL // 4)):
        here = distance[-rows:]
        hidden = (here < 0) & (causal or window is not None) | (here >= (window or TRIAL))
        scores = (query[:, :, -rows:].float() @ spread[0].mT * width**-0.5).masked_fill(hidden, -torch.inf)
        try:
            out, total = kernel(query[:, :, -rows:], key, value, scaling=width**-0.5, causal=causal, window=window)
        except Exception as error:  # kernels raise whatever their library does
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else error!r}"
        off = max(
            (out.float() - scores.softmax(-1) @ spread[1]).abs().max().item(),
            (total.float() - scores.logsumexp(-1)).abs().max().item(),
        )
        if not off < TRIAL_ERROR:
            return f"it is off by {off:.2g}"
    return None


def torch_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scaling: float, causal: bool, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's kernels for CUDA: cuDNN where its attention would pick that, FlashAttention-2 otherwise.

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


def flash_attn_kernel(*states: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The package flash-attn, version 2."""
    return _flash_attn(importlib.import_module("flash_attn"), *states, **options)


def hub_kernel(*states: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as the Hub has it, in the version that transformers takes."""
    return _flash_attn(_from_hub(), *states, **options)


@functools.cache
def _from_hub() -> Any:
    loaders: Any = importlib.import_module("transformers.integrations.hub_kernels")
    return loaders.load_and_register_attn_kernel(HUB_KERNEL)


def _flash_attn(
    package: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    causal: bool,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    states = (one.transpose(1, 2) for one in (query, key, value))
    sides = (-1, -1) if window is None else (window - 1, 0)
    out, total, _ = package.flash_attn_func(
        *states, softmax_scale=scaling, causal=causal, window_size=sides, return_attn_probs=True
    )
    return out.transpose(1, 2), total


KERNELS: dict[str, Kernel] = {"torch": torch_kernel, "flash_attn": flash_attn_kernel, "kernels": hub_kernel}
"""Those for bands and rectangles without biases."""

PACKAGES = {"flash_attn": "flash-attn", "kernels": "kernels"}
"""What to install for those that are modules of their own."""

HUB_KERNEL = "kernels-community/flash-attn2"
