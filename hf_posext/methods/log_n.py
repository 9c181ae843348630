"""Log-n scaling of queries."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import ExtensionPlan, QueryScale
from .base import Method, register
from .remap import with_query_scale


@register
@dataclass(frozen=True)
class LogN(Method):
    """Scale queries with the logarithm of their position, which keeps attention sharp. On top of any other method.

    Query p is multiplied by `max(1, ln(p + 1) / ln L)`. Su, *Scaled attention by log n*, 2021 (`"rerope+log-n"`); the
    argument from entropy: Chiang and Cholak, *Overcoming a Theoretical Limitation of Self-Attention*, 2022.
    """

    name = "log-n"
    title = "log-n query scaling"
    url = "https://arxiv.org/abs/2202.12172"
    kinds = ("rotary",)
    needs_factor = False

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        return with_query_scale(plan, QueryScale(length=plan.trained_length, log=True))
