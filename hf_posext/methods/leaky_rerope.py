"""Leaky ReRoPE: distances beyond a window grow slowly."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import InvalidParameterError
from ..plan import Band, ExtensionPlan, PositionMap
from .base import register
from .remap import RemapMethod, near_and_far, window_of


@register
@dataclass(frozen=True)
class LeakyReRoPE(RemapMethod):
    """Keep distances within the window, and let farther ones grow `stride` times slower.

    Distance `d < w` gives `d`, else `w + (d - w) / k`. Su, *Rectified Rotary Position Embeddings*, 2023.

    Args:
        window (`int`, *optional*): `w` in tokens. By default half the trained length.
        stride (`float`, *optional*): `k`. By default the stride that puts the target's longest distance halfway
            between the window and the trained length, because distances near its end are trained the least.
    """

    name = "leaky-rerope"
    title = "Leaky ReRoPE"
    url = "https://github.com/bojone/rerope"
    code = "https://github.com/bojone/rerope"

    window: int | None = None
    stride: float | None = None

    def __post_init__(self) -> None:
        if self.stride is not None and not 1 <= self.stride < math.inf:
            raise InvalidParameterError(f"Expected a leaky-rerope stride of 1 or more, got {self.stride}.")

    def bands(self, plan: ExtensionPlan) -> tuple[Band, ...]:
        window = window_of(self, plan, 1 / 2)
        stride = self.stride
        if stride is None:
            stride = max(1.0, 2 * (plan.target_length - window) / max(plan.trained_length - window, 1))
        slow = PositionMap(rate=1 / stride)
        return near_and_far(window, PositionMap(rate=1 / stride, offset=window - window / stride), slow)
