"""Self-Extend: grouped positions beyond a window."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..errors import InvalidParameterError
from ..plan import ExtensionPlan, Part, PositionMap
from ..registry import register
from .remap import RemapMethod, near_and_far, require_window


@register
@dataclass(frozen=True)
class SelfExtend(RemapMethod):
    """Distances below the window as they are, farther ones counted in groups of tokens.

    Query i and key j at distance `w` or more get positions `i // g + w - w / g` and `j // g`, which reaches
    `(L - w) g + w` tokens. The window must be a multiple of the group: otherwise the published code uses fractional
    positions in prefill and others in decoding. Jin et al., *LLM Maybe LongLM: Self-Extend LLM Context Window Without
    Tuning*, 2024.

    Args:
        group (`int`, *optional*): `g`; where not given, twice the smallest that reaches the target, since the
            positions near the trained length are the least trained.
        window (`int`, *optional*): `w` in tokens; where not given, a quarter of the trained length, rounded down to a
            multiple of the group.
    """

    name: ClassVar[str] = "self-extend"
    title: ClassVar[str] = "Self-Extend"
    url: ClassVar[str] = "https://arxiv.org/abs/2401.01325"

    group: int | None = None
    window: int | None = None

    def parts(self, plan: ExtensionPlan) -> tuple[Part, ...]:
        quarter = plan.original_length // 4 if self.window is None else self.window
        room = max(plan.original_length - quarter, 1)
        group = self.group if self.group is not None else 2 * math.ceil((plan.target_length - quarter) / room)
        window = quarter if self.window is not None else max(quarter // max(group, 1), 1) * group
        if group < 1 or window % group:
            raise InvalidParameterError(
                f"self-extend group {group} and window {window}; give a window that is a multiple of the group, "
                f"e.g. window={max(group, 1) * max(1, window // max(group, 1))}"
            )
        require_window(self, "window", window, plan)
        return near_and_far(
            window, PositionMap(group=group, offset=window - window // group), PositionMap(group=group)
        )
