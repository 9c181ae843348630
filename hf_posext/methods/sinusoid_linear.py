"""Position interpolation of absolute sinusoids."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InvalidParameterError
from ..plan import ExtensionPlan, PositionMap, Sinusoids
from .base import Method, register


@register
@dataclass(frozen=True)
class SinusoidLinear(Method):
    """Give each token the sines of a position squeezed back into the trained range.

    The sines are those of `p / s` instead of `p`. Position interpolation (Chen et al., *Extending Context Window of
    Large Language Models via Positional Interpolation*, 2023) of the sinusoids of Vaswani et al., 2017.
    """

    name = "sinusoid-linear"
    title = "interpolated sinusoids"
    url = "https://arxiv.org/abs/2306.15595"
    kinds = ("sinusoidal",)

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        if plan.sinusoids is not None:
            raise InvalidParameterError(f"{plan.method} squeezes positions twice. Pass {self.name} once.")
        return plan.with_edits(Sinusoids, Sinusoids(PositionMap(rate=1 / plan.factor)))
