"""Trials: a kernel is used where it computes what it should on a small problem, and left alone elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from .cuda import Kernel

logger = logging.getLogger(__name__)

KEYS = 256
"""Keys of a small problem."""

ERROR = 0.05
"""Tolerance for attention: bfloat16 is off by 0.01, one key too many by more."""

PASS_ERROR = 1e-4
"""Tolerance for a rotation or a merge in float32."""


def passes(what: str, error: Callable[[], float], allowed: float) -> bool:
    """Return whether a kernel computes what it should; a warning says why it does not.

    Args:
        what (`str`): name of the kernel, and where it is tried.
        error (`Callable`): runs the kernel on a small problem and returns its largest error. Whatever it raises (a
            compiler that is missing, too little memory on a multiprocessor) counts as a failure.
        allowed (`float`): largest error of a kernel that is used.
    """
    try:
        off = error()
    except Exception as raised:  # kernels raise whatever their library does
        first = str(raised).splitlines()[0] if str(raised) else repr(raised)
        logger.warning("%s: %s: %s", what, type(raised).__name__, first)
        return False
    if not off <= allowed:  # nor NaN
        logger.warning("%s: it is off by %.2g", what, off)
        return False
    return True


def error_of_kernel(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int
) -> float:
    """Return the largest error of a kernel on a square, a rectangle and a band."""
    draw = torch.Generator(device).manual_seed(0)  # the user's numbers stay what they are
    query, key, value = (
        torch.randn(1, count, KEYS, width, device=device, dtype=dtype, generator=draw)
        for count in (heads, key_heads, key_heads)
    )
    spread = [one.float().repeat_interleave(heads // key_heads, 1) for one in (key, value)]
    distance = torch.arange(KEYS, device=device)[:, None] - torch.arange(KEYS, device=device)
    errors = []
    for rows, causal, window in ((KEYS, True, None), (KEYS // 2, False, None), (KEYS // 2, False, KEYS // 4)):
        here = distance[-rows:]
        hidden = (here < 0) & (causal or window is not None) | (here >= (window or KEYS))
        scores = (query[:, :, -rows:].float() @ spread[0].mT * width**-0.5).masked_fill(hidden, -torch.inf)
        out, total = kernel(query[:, :, -rows:], key, value, scaling=width**-0.5, causal=causal, window=window)
        errors += [out.float() - scores.softmax(-1) @ spread[1], total.float() - scores.logsumexp(-1)]
    return largest(*errors)


def error_of_passes(kernels: Any, device: torch.device) -> float:
    """Return the largest error of a rotation and a merge by Triton."""
    draw = torch.Generator(device).manual_seed(0)
    states, cos, sin = torch.randn(3, 1, 1, KEYS, 8, device=device, generator=draw).unbind()
    rotated = kernels.rotate(states, cos, sin, 4) - (states * cos + states.roll(4, -1) * sin)
    sums = states.sum(-1)
    kernels.merge(held := states.clone(), torch.zeros_like(sums), cos, sums)
    return largest(rotated, held - torch.lerp(states, cos, torch.sigmoid(sums)[..., None]))


def error_of_step(
    step: Any, device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int, parts: int
) -> float:
    """Return how far a step is off from matrix products in float32, its output or the key that leaves."""
    draw = torch.Generator(device).manual_seed(0)  # the user's numbers stay what they are

    def states(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, width, device=device, dtype=dtype, generator=draw)

    query, key, value = states(heads, 1), states(key_heads, KEYS), states(key_heads, KEYS)
    phases, leaving = states(2, parts + 1).float(), KEYS // 2
    partners = torch.arange(width, device=device).roll(1)
    starts = tuple(KEYS // parts * later for later in reversed(range(parts)))
    wanted = key.to(torch.float32, copy=True)
    last = wanted[:, :, leaving]
    wanted[:, :, leaving] = last * phases[:, 0, -1] + last[..., partners] * phases[:, 1, -1]
    spread = [one.repeat_interleave(heads // key_heads, 1) for one in (wanted, value.float())]
    asked = query.float() * phases[:, None, 0] + query[..., partners].float() * phases[:, None, 1]
    scores = [
        asked[:, :, part, None] @ spread[0][:, :, start:stop].mT * width**-0.5
        for part, start, stop in zip(range(parts), starts, (KEYS, *starts), strict=False)
    ]
    fading = torch.tensor([[0.0, 0.0, 1.0]] * (parts - 1) + [[-0.5, -0.3, 8.0]], device=device)[None]
    distance = torch.arange(KEYS - 1, KEYS - 1 - starts[-2] if parts > 1 else -1, -1, device=device)
    octave = torch.frexp((distance // 8).float()).exponent
    scores[-1] += -0.5 - 0.3 * (octave - 0.5).clamp(min=0)
    weights = torch.cat(scores[::-1], -1).softmax(-1)
    made = step(query, key, torch.stack([partners, partners]), phases, starts, width**-0.5, fading)
    found = made(query, key, value, leaving)
    return largest(found.float() - (weights @ spread[1]).transpose(1, 2), key.float() - wanted)


def largest(*errors: torch.Tensor) -> float:
    """Return the largest absolute value in some tensors; NaN if one has it."""
    return float(torch.stack([error.abs().max() for error in errors]).max())
