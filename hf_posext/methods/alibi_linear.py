"""Position interpolation of ALiBi."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..plan import ExtensionPlan
from .base import Method, register


@register
@dataclass(frozen=True)
class ALiBiLinear(Method):
    """All slopes of ALiBi divided by the factor, so that the longest distance costs what it did in training.

    `m_h / s`, at every length. Al-Khateeb et al., *Position Interpolation Improves ALiBi Extrapolation*, 2023.
    """

    name: ClassVar[str] = "alibi-linear"
    title: ClassVar[str] = "ALiBi position interpolation"
    url: ClassVar[str] = "https://arxiv.org/abs/2310.13017"
    kinds: ClassVar[tuple[str, ...]] = ("alibi",)

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        slopes = plan.slopes or plan.scheme.slopes
        return replace(plan, slopes=tuple(slope / plan.factor for slope in slopes))
