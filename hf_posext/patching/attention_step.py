"""Where a step of decoding runs on one kernel of Triton, which turns and attends at once."""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

import torch

from .attention_kernels import MAX_WIDTH, TRIAL, TRIAL_ERROR, forced, one_pass

logger = logging.getLogger(__name__)


def one_step(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, parts: int) -> Any:
    """The class of such steps for states (batch, heads, tokens, dim) and some parts; `None` where they are left to
    others. It is tried once on a small problem, as other kernels are (`attention_kernels.py`)."""
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
    kernels: Any = importlib.import_module(".triton_decoding", __package__)
    if parts > kernels.MAX_PARTS or parts * heads // key_heads > kernels.MAX_ROWS:
        return None
    try:
        off = _trial(kernels.Step, device, dtype, heads, key_heads, width, parts)
    except Exception as error:  # a compiler that is missing, or too little memory on a multiprocessor, among others
        logger.warning("steps are not one kernel on %s in %s: %s: %s", device, dtype, type(error).__name__, error)
        return None
    if not off < TRIAL_ERROR:
        logger.warning("steps are not one kernel on %s in %s: it is off by %.2g", device, dtype, off)
        return None
    return kernels.Step


def _trial(
    step: Any, device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int, parts: int
) -> float:
    """How far a step is off from what matrix products give in float32, or the key that leaves."""
    draw = torch.Generator(device).manual_seed(0)  # the user's numbers stay what they are

    def states(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, width, device=device, dtype=dtype, generator=draw)

    query, key, value = states(heads, 1), states(key_heads, TRIAL), states(key_heads, TRIAL)
    phases, leaving = states(2, parts + 1).float(), TRIAL // 2
    partners = torch.arange(width, device=device).roll(1)
    starts = tuple(TRIAL // parts * later for later in reversed(range(parts)))
    wanted = key.to(torch.float32, copy=True)
    last = wanted[:, :, leaving]
    wanted[:, :, leaving] = last * phases[:, 0, -1] + last[..., partners] * phases[:, 1, -1]
    spread = [one.repeat_interleave(heads // key_heads, 1) for one in (wanted, value.float())]
    asked = query.float() * phases[:, None, 0] + query[..., partners].float() * phases[:, None, 1]
    scores = [
        asked[:, :, part, None] @ spread[0][:, :, start:stop].mT * width**-0.5
        for part, start, stop in zip(range(parts), starts, (TRIAL, *starts), strict=False)
    ]
    fading = torch.tensor([[0.0, 0.0, 1.0]] * (parts - 1) + [[-0.5, -0.3, 8.0]], device=device)[None]
    distance = torch.arange(TRIAL - 1, TRIAL - 1 - starts[-2] if parts > 1 else -1, -1, device=device)
    octave = torch.frexp((distance // 8).float()).exponent
    scores[-1] += -0.5 - 0.3 * (octave - 0.5).clamp(min=0)
    weights = torch.cat(scores[::-1], -1).softmax(-1)
    made = step(query, key, torch.stack([partners, partners]), phases, starts, width**-0.5, fading)
    found = made(query, key, value, leaving)
    off = (found.float() - (weights @ spread[1]).transpose(1, 2)).abs().max(), (key.float() - wanted).abs().max()
    return max(float(one) for one in off)
