"""NTK-aware interpolation of ALiBi."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from ..plan import ExtensionPlan
from .base import Method, register


@register
@dataclass(frozen=True)
class ALiBiNTK(Method):
    """The steepest slope of ALiBi kept, the flattest divided by the factor, those between in geometric steps.

    `m_h / s ** ((h - 1) / (H - 1))` for heads h = 1 to H from steep to flat; where the slopes are no geometric series
    (the number of heads is no power of two), by `log(m_1 / m_h) / log(m_1 / m_H)` instead. After Keezen, *NTK-ALiBi*,
    2023; plain interpolation: Al-Khateeb et al., *Position Interpolation Improves ALiBi Extrapolation*, 2023.
    """

    name: ClassVar[str] = "alibi-ntk"
    title: ClassVar[str] = "NTK-ALiBi"
    url: ClassVar[str] = "https://github.com/keezen/ntk_alibi"
    kinds: ClassVar[tuple[str, ...]] = ("alibi",)

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        slopes = plan.slopes or plan.scheme.slopes
        steep, flat = max(slopes), min(slopes)

        def share(slope: float) -> float:
            return math.log(steep / slope) / math.log(steep / flat) if steep > flat else 1.0

        return replace(plan, slopes=tuple(slope / plan.factor ** share(slope) for slope in slopes))
