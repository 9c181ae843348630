"""ReRoPE and Leaky ReRoPE: distances beyond a window stand still, or grow slowly."""

from dataclasses import dataclass
from typing import Annotated

from ..decode import Bound
from ..plan import Band, ExtensionPlan, PositionMap
from .rotary import RemapMethod, near_and_far, window_of


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
    stride: Annotated[float, Bound("of at least 1", lambda stride: stride >= 1)] | None = None

    def bands(self, plan: ExtensionPlan) -> tuple[Band, ...]:
        window = window_of(self, plan, 1 / 2)
        stride = self.stride
        if stride is None:
            stride = max(1.0, 2 * (plan.target_length - window) / max(plan.trained_length - window, 1))
        slow = PositionMap(rate=1 / stride)
        return near_and_far(window, PositionMap(rate=1 / stride, offset=window - window / stride), slow)
