"""ReRoPE: one distance for everything beyond a window."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import Band, ExtensionPlan, PositionMap
from .base import register
from .remap import RemapMethod, near_and_far, window_of


@register
@dataclass(frozen=True)
class ReRoPE(RemapMethod):
    """Keep distances within the window, and rotate all farther ones by the window itself.

    Distance `d < w` gives `d`, else `w`. Su, *Rectified Rotary Position Embeddings*, 2023. Reads any length.

    Args:
        window (`int`, *optional*): `w` in tokens. By default three quarters of the trained length.
    """

    name = "rerope"
    title = "ReRoPE"
    url = "https://github.com/bojone/rerope"
    code = "https://github.com/bojone/rerope"

    window: int | None = None

    def bands(self, plan: ExtensionPlan) -> tuple[Band, ...]:
        window = window_of(self, plan, 3 / 4)
        return near_and_far(window, PositionMap(rate=0, offset=window), PositionMap(rate=0))
