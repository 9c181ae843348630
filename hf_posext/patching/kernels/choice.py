"""Choice of the kernel that attends, by device and by a trial of the kernel there.

Each is tried once on a small problem (`trial.py`). One that fails or computes something else is left alone, with a
warning. [`attention_kernel`] forces one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...errors import InvalidParameterError
from .cuda import KERNELS, Kernel, flash_attn_kernel, torch_kernel
from .trial import ERROR, PASS_ERROR, error_of_kernel, error_of_passes, error_of_step, passes

MAX_WIDTH = 256
"""Channels of a head that FlashAttention-2 takes at most."""

BLOCKS = ("cpu", "plain")
"""The forms that go through blocks of queries, with biases: they take masks, softcaps and any device."""

ONE_PASS = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes that are rotated and merged by Triton."""

_forced: list[str] = []
_tried: dict[tuple[Any, ...], bool] = {}


@contextmanager
def attention_kernel(name: str) -> Iterator[None]:
    """
    Inside, attention over parts runs on one kernel; where that cannot do what is asked (gradients, masks that are not
    bands, ...), on the plain form.

    Args:
        name (`str`): `"torch"` (PyTorch's own on CUDA: the one that its attention picks, but FlashAttention-2 for
            windows), `"flash_attn"` (the package), `"cpu"` (PyTorch's own on the CPU, with gradients) or `"plain"`
            (matrix products, everywhere).

    Raises:
        InvalidParameterError: there is no such kernel, or its package is not installed.
    """
    known = (*KERNELS, *BLOCKS)
    if name not in known:
        raise InvalidParameterError(f"Expected an attention kernel among {', '.join(known)}, got {name!r}.")
    if name == "flash_attn" and importlib.util.find_spec(name) is None:
        raise InvalidParameterError(f"Expected the package of {name!r} to be installed: pip install flash-attn.")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def forced() -> str | None:
    """The kernel that [`attention_kernel`] asks for."""
    return _forced[-1] if _forced else None


def choose(query: torch.Tensor, value: torch.Tensor) -> Kernel | None:
    """The kernel for bands on the device of the states, without a mask and gradients; `None` where there is none."""
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
    """Return whether a package is installed. Cached: a lookup takes as long as a decoding step in one layer."""
    return importlib.util.find_spec(package) is not None


def works(kernel: Kernel, query: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether a kernel computes what it should on the device and in the dtype of some states, with as many
    heads."""
    like = query.device, query.dtype, query.shape[1], value.shape[1], query.shape[-1]
    found = _tried.get((kernel, *like))
    if found is None:
        if torch.compiler.is_compiling():  # patching has tried it already, unless the model was moved since
            return False
        what = f"{kernel.__name__} is not used on {like[0]} in {like[1]}"
        found = _tried[kernel, *like] = passes(what, lambda: error_of_kernel(kernel, *like), ERROR)
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

    def error() -> float:
        return error_of_passes(importlib.import_module(".triton_passes", __package__), device)

    found = passes(f"Triton is not used on {device}", error, PASS_ERROR)
    return importlib.import_module(".triton_passes", __package__) if found else None


def one_step(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, parts: int) -> Any:
    """The class of such steps for states (batch, heads, tokens, dim) and some parts; `None` where they are left to
    others. It is tried once on a small problem."""
    if query.device.type != "cuda" or query.shape[2] != 1 or forced() or one_pass(query) is None:
        return None
    width = query.shape[-1]
    strides = key.stride()
    if strides != value.stride() or strides[2:] != (width, 1) or key.shape != value.shape or width > MAX_WIDTH:
        return None
    if not query.dtype == key.dtype == value.dtype:  # under autocast, rotation leaves float32 beside bfloat16
        return None
    if key.requires_grad or value.requires_grad:
        return None
    if query.stride(1) != width or query.shape[0] > 1 and query.stride(0) != width * query.shape[1]:
        return None
    return _step_of(query.device, query.dtype, query.shape[1], key.shape[1], width, parts)


@functools.cache
def _step_of(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int, parts: int) -> Any:
    kernels: Any = importlib.import_module(".triton_step", __package__)
    if parts > kernels.MAX_PARTS or parts * heads // key_heads > kernels.MAX_ROWS:
        return None
    like = device, dtype, heads, key_heads, width, parts
    what = f"steps are not one kernel on {device} in {dtype}"
    return kernels.Step if passes(what, lambda: error_of_step(kernels.Step, *like), ERROR) else None
