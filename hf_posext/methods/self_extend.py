"""Self-Extend: grouped positions beyond a window."""

import math
from dataclasses import dataclass

from ..decode import Count
from ..errors import InvalidParameterError
from ..plan import Band, ExtensionPlan, PositionMap
from .rotary import RemapMethod, near_and_far, window_of


@dataclass(frozen=True)
class SelfExtend(RemapMethod):
    """Keep distances within the window, and count farther ones in groups of tokens.

    Query i and key j at distance `w` or more get positions `i // g + w - w / g` and `j // g`, which reaches
    `(L - w) g + w` tokens. The window must be a multiple of the group: otherwise the published code uses fractional
    positions in prefill and others in decoding. Jin et al., *LLM Maybe LongLM: Self-Extend LLM Context Window Without
    Tuning*, 2024.

    Args:
        group (`int`, *optional*): `g`. By default the smallest power of two that puts the target's farthest position
            at three quarters of the trained length or before, because positions near its end are trained the least. If
            the window is wider than that, all trained positions are used.
        window (`int`, *optional*): `w` in tokens. By default half the trained length, rounded down to a multiple of
            the group.
    """

    name = "self-extend"
    title = "Self-Extend"
    url = "https://arxiv.org/abs/2401.01325"
    code = "https://github.com/datamllab/LongLM"

    group: Count | None = None
    window: int | None = None

    def bands(self, plan: ExtensionPlan) -> tuple[Band, ...]:
        window = window_of(self, plan, 1 / 2)
        group = self.group
        if group is None:
            room = round(plan.trained_length * 3 / 4) - window
            if room <= 0:  # a wide window leaves only the positions near the end of the trained length
                room = max(plan.trained_length - window, 1)
            group = 2 ** math.ceil(math.log2(max((plan.target_length - window) / room, 1)))
        if self.window is None:
            window = max(window // group, 1) * group
        if window % group:
            raise InvalidParameterError(
                f"Expected a self-extend window that is a multiple of the group, got {window} and {group}. "
                f"Pass e.g. window={group * max(1, window // group)}."
            )
        return near_and_far(
            window, PositionMap(group=group, offset=window - window // group), PositionMap(group=group)
        )
