"""Attention over bands of positions: the choice of the kernel for a device, based on a trial of the kernel there.

`banded.banded_attention` is the entry point for a forward. A decoding step may run in one kernel instead
([`one_step`]), and a rotation in one pass over memory ([`one_pass`]).

Each kernel is tried once on a small problem. A kernel that fails or computes wrong numbers is not used, and a warning
is logged.

A CUDA kernel takes queries (batch, heads, queries, dim) and keys and values (batch, key heads, keys, dim). It returns
the attended values in the shape of the queries, and a float32 log-sum-exp (batch, heads, queries), which is used to
merge pieces. With `window`, each query sees the latest `window` keys up to its own, and the last query is aligned with
the last key. Otherwise, queries see all keys, or with `causal` (as many queries as keys) the keys up to their own.
Query heads share key heads, which are not repeated.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend

logger = logging.getLogger(__name__)

Kernel = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""Function called as `kernel(query, key, value, scaling=..., causal=..., window=...)`."""

CUDNN = torch.ops.aten._scaled_dot_product_cudnn_attention.default
FLASH = torch.ops.aten._flash_attention_forward.default
"""Operators with a fixed overload. Resolving the overload would take longer than launching the kernel."""

PLANNED = 128
"""Minimum number of queries for cuDNN. With fewer, building its plan is not worth the time."""

MAX_WIDTH = 256
"""Maximum head dimension of FlashAttention-2."""

FORCED: str | None = None
"""Attention path that tests force. `"torch"` is PyTorch's own kernels on CUDA. The other two run in blocks of queries
and support biases, masks, and softcaps: `"cpu"` is PyTorch's own kernel on a CPU, `"plain"` matrix products on any
device."""

ONE_PASS = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes that Triton rotates and merges."""

KEYS = 256
"""Number of keys in a trial."""

ERROR = 0.05
"""Tolerance for a trial of attention. bfloat16 is off by 0.01, and one key too many by more."""

PASS_ERROR = 1e-4
"""Tolerance for a trial of a rotation or a merge in float32."""

_tried: dict[tuple[Any, ...], bool] = {}


def torch_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scaling: float, causal: bool, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with PyTorch's CUDA kernels: cuDNN if PyTorch's attention would choose it, otherwise FlashAttention-2.

    cuDNN builds a plan for each new shape, which takes longer than a decoding step. It is therefore not used for a few
    queries, because their number of keys grows with each step.
    """
    picked = -1
    if window is None and query.shape[2] >= PLANNED:
        picked = torch._fused_sdp_choice(query, key, value, None, 0.0, causal, scale=scaling, enable_gqa=True)
    if picked == SDPBackend.CUDNN_ATTENTION.value:
        out, total = CUDNN(query, key, value, None, True, 0.0, causal, False, scale=scaling)[:2]
        return out, total.reshape(query.shape[:3])
    states = (tensor.transpose(1, 2) for tensor in (query, key, value))
    sides = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    counts = query.shape[2], key.shape[2]
    out, total, *_ = FLASH(*states, None, None, *counts, 0.0, causal, False, scale=scaling, **sides)
    return out.transpose(1, 2), total


def choose(query: torch.Tensor, value: torch.Tensor) -> Kernel | None:
    """Return the kernel for bands without mask and gradients on the device of the states, or `None`."""
    if FORCED:
        return torch_kernel if FORCED == "torch" else None
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return None
    if not query.shape[-1] == value.shape[-1] <= MAX_WIDTH:
        return None
    available = torch.backends.cuda.is_flash_attention_available()
    return torch_kernel if available and works(torch_kernel, query, value) else None


def works(kernel: Kernel, query: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether a kernel is correct for the device, dtype, heads, and head dimension of the given states."""
    like = query.device, query.dtype, query.shape[1], value.shape[1], query.shape[-1]
    passed = _tried.get((kernel, *like))
    if passed is None:
        if torch.compiler.is_compiling():  # patching has already tried it, unless the model was moved afterwards
            return False
        what = f"{kernel.__name__} is not used on {like[0]} in {like[1]}"
        passed = _tried[kernel, *like] = passes(what, lambda: error_of_kernel(kernel, *like), ERROR)
    return passed


def one_pass(states: torch.Tensor) -> Any:
    """Return the module of Triton kernels that rotate and merge states in one pass; `None` if PyTorch has to.

    The kernels require Triton, a supported dtype, and adjacent channels. They are launched on the current CUDA device,
    so states must be on that device. Compiled graphs fuse PyTorch's operations themselves, and functorch transforms
    and autograd have to differentiate them.
    """
    if states.device.type != "cuda" or states.stride(-1) != 1 or states.dtype not in ONE_PASS:
        return None
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    if torch.is_grad_enabled() and states.requires_grad or states.device.index != torch.cuda.current_device():
        return None
    return _one_pass(states.device)


@functools.cache
def _one_pass(device: torch.device) -> Any:
    if importlib.util.find_spec("triton") is None:
        return None

    def error() -> float:
        return error_of_passes(importlib.import_module(".triton_kernels", __name__), device)

    passed = passes(f"Triton is not used on {device}", error, PASS_ERROR)
    return importlib.import_module(".triton_kernels", __name__) if passed else None


def one_step(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bands: int) -> Any:
    """Return the class that runs a decoding step over `bands` bands in one kernel.

    States have shape (batch, heads, tokens, dim). `None` if the kernel does not support them.
    """
    if query.device.type != "cuda" or query.shape[2] != 1 or FORCED or one_pass(query) is None:
        return None
    width, strides = query.shape[-1], key.stride()
    if strides != value.stride() or strides[2:] != (width, 1) or key.shape != value.shape or width > MAX_WIDTH:
        return None
    if not query.dtype == key.dtype == value.dtype:  # under autocast, rotation produces float32 next to bfloat16
        return None
    adjacent = query.stride(1) == width and (query.shape[0] == 1 or query.stride(0) == width * query.shape[1])
    if key.requires_grad or value.requires_grad or not adjacent:
        return None
    return _step_of(query.device, query.dtype, query.shape[1], key.shape[1], width, bands)


@functools.cache
def _step_of(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int, bands: int) -> Any:
    kernels: Any = importlib.import_module(".triton_kernels", __name__)
    if bands > kernels.MAX_BANDS or bands * heads // key_heads > kernels.MAX_ROWS:
        return None
    like = device, dtype, heads, key_heads, width, bands
    what = f"steps are not one kernel on {device} in {dtype}"
    return kernels.Step if passes(what, lambda: error_of_step(kernels.Step, *like), ERROR) else None


def passes(what: str, error: Callable[[], float], allowed: float) -> bool:
    """Return whether a kernel passes its trial. Otherwise, log a warning that begins with `what`.

    `error` runs the kernel on a small problem and returns its largest error. Any exception (a missing compiler, too
    little shared memory on a multiprocessor) counts as a failure.
    """
    try:
        deviation = error()
    except Exception as raised:  # the type of the exception depends on the kernel's library
        message = str(raised).splitlines()[0] if str(raised) else repr(raised)
        logger.warning("%s: %s: %s", what, type(raised).__name__, message)
        return False
    if not deviation <= allowed:  # written so that NaN fails as well
        logger.warning("%s: it is off by %.2g", what, deviation)
        return False
    return True


def error_of_kernel(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int
) -> float:
    """Return the largest error of a kernel on a causal square, a rectangle, and a window."""
    draw = torch.Generator(device).manual_seed(0)  # leaves the user's random state alone
    query, key, value = (
        torch.randn(1, count, KEYS, width, device=device, dtype=dtype, generator=draw)
        for count in (heads, key_heads, key_heads)
    )
    spread = [states.float().repeat_interleave(heads // key_heads, 1) for states in (key, value)]
    distance = torch.arange(KEYS, device=device)[:, None] - torch.arange(KEYS, device=device)
    errors = []
    for rows, causal, window in ((KEYS, True, None), (KEYS // 2, False, None), (KEYS // 2, False, KEYS // 4)):
        offsets = distance[-rows:]
        hidden = (offsets < 0) & (causal or window is not None) | (offsets >= (window or KEYS))
        scores = (query[:, :, -rows:].float() @ spread[0].mT * width**-0.5).masked_fill(hidden, -torch.inf)
        out, total = kernel(query[:, :, -rows:], key, value, scaling=width**-0.5, causal=causal, window=window)
        errors += [out.float() - scores.softmax(-1) @ spread[1], total.float() - scores.logsumexp(-1)]
    return largest(*errors)


def error_of_passes(kernels: Any, device: torch.device) -> float:
    """Return the largest error of Triton's rotation and merge."""
    draw = torch.Generator(device).manual_seed(0)
    states, cos, sin = torch.randn(3, 1, 1, KEYS, 8, device=device, generator=draw).unbind()
    rotated = kernels.rotate(states, cos, sin, 4) - (states * cos + states.roll(4, -1) * sin)
    sums = states.sum(-1)
    kernels.merge(values := states.clone(), torch.zeros_like(sums), cos, sums)
    return largest(rotated, values - torch.lerp(states, cos, torch.sigmoid(sums)[..., None]))


def error_of_step(
    step: Any, device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int, bands: int
) -> float:
    """Return the largest error of a step, in its output and in the key that it rotates in place.

    The reference is computed by matrix products in float32.
    """
    draw = torch.Generator(device).manual_seed(0)  # leaves the user's random state alone

    def states(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, width, device=device, dtype=dtype, generator=draw)

    query, key, value = states(heads, 1), states(key_heads, KEYS), states(key_heads, KEYS)
    phases, leaving = states(2, bands + 1).float(), KEYS // 2
    partners = torch.arange(width, device=device).roll(1)
    starts = tuple(KEYS // bands * later for later in reversed(range(bands)))
    # reference: rotate the leaving key and the query, score each band, and add the fading of the last band
    expected = key.to(torch.float32, copy=True)
    last = expected[:, :, leaving]
    expected[:, :, leaving] = last * phases[:, 0, -1] + last[..., partners] * phases[:, 1, -1]
    spread = [tensor.repeat_interleave(heads // key_heads, 1) for tensor in (expected, value.float())]
    rotated = query.float() * phases[:, None, 0] + query[..., partners].float() * phases[:, None, 1]
    scores = [
        rotated[:, :, band, None] @ spread[0][:, :, start:stop].mT * width**-0.5
        for band, start, stop in zip(range(bands), starts, (KEYS, *starts), strict=False)
    ]
    fading = torch.tensor([[0.0, 0.0, 1.0]] * (bands - 1) + [[-0.5, -0.3, 8.0]], device=device)[None]
    distance = torch.arange(KEYS - 1, KEYS - 1 - starts[-2] if bands > 1 else -1, -1, device=device)
    octave = torch.frexp((distance // 8).float()).exponent
    scores[-1] += -0.5 - 0.3 * (octave - 0.5).clamp(min=0)
    weights = torch.cat(scores[::-1], -1).softmax(-1)
    attend = step(query, key, torch.stack([partners, partners]), phases, starts, width**-0.5, fading)
    out = attend(query, key, value, leaving)
    return largest(out.float() - (weights @ spread[1]).transpose(1, 2), key.float() - expected)


def largest(*errors: torch.Tensor) -> float:
    """Return the largest absolute value in the given tensors, or NaN if any of them contains NaN."""
    return float(torch.stack([error.abs().max() for error in errors]).max())
