"""Methods for the slopes of ALiBi."""

import math
from dataclasses import dataclass

from ..plan import ExtensionPlan, Slopes
from .base import Method


@dataclass(frozen=True)
class ALiBiLinear(Method):
    """Divide all ALiBi slopes by the factor, so that the longest distance costs what it cost in training.

    `m_h / s`, at every length. Al-Khateeb et al., *Position Interpolation Improves ALiBi Extrapolation*, 2023.
    """

    name = "alibi-linear"
    title = "ALiBi position interpolation"
    url = "https://arxiv.org/abs/2310.13017"
    kinds = ("alibi",)

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        slopes = plan.slopes or plan.scheme.slopes
        return plan.with_edits(Slopes, Slopes(tuple(slope / plan.factor for slope in slopes)))


@dataclass(frozen=True)
class ALiBiNTK(Method):
    """Keep the steepest ALiBi slope, divide the flattest by the factor, and space the others geometrically.

    `m_h / s ** ((h - 1) / (H - 1))` for heads h = 1 to H from steep to flat. If the number of heads is not a power
    of two, the slopes are not a geometric series, and the exponent is `log(m_1 / m_h) / log(m_1 / m_H)`. After Keezen,
    *NTK-ALiBi*, 2023; plain interpolation: Al-Khateeb et al., *Position Interpolation Improves ALiBi Extrapolation*,
    2023.
    """

    name = "alibi-ntk"
    title = "NTK-ALiBi"
    url = code = "https://github.com/keezen/ntk_alibi"
    kinds = ("alibi",)

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        slopes = plan.slopes or plan.scheme.slopes
        steep, flat = max(slopes), min(slopes)

        def share(slope: float) -> float:
            return math.log(steep / slope) / math.log(steep / flat) if steep > flat else 1.0

        return plan.with_edits(Slopes, Slopes(tuple(slope / plan.factor ** share(slope) for slope in slopes)))
