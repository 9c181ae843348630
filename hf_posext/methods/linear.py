"""Position interpolation, of rotary frequencies and of sinusoids."""

from dataclasses import dataclass

from ..errors import InvalidParameterError
from ..plan import ExtensionPlan, PositionMap, RotaryPlan, Sinusoids
from ..scheme import Rotary
from .base import Method
from .rotary import FrequencyMethod, from_tensor, powers


@dataclass(frozen=True)
class Linear(FrequencyMethod):
    """Squeeze positions back into the trained range, by one factor for all frequencies.

    `inv_freq_i / s`, which is the same as position `p / s`. Chen et al., *Extending Context Window of Large Language
    Models via Positional Interpolation*, 2023.
    """

    name = "linear"
    title = "position interpolation (PI)"
    url = "https://arxiv.org/abs/2306.15595"

    def rescale(self, rotary: Rotary, current: RotaryPlan, plan: ExtensionPlan) -> RotaryPlan:
        return from_tensor(
            rotary,
            powers(rotary.theta, rotary) / plan.factor,
            rope_parameters={"rope_type": "linear", "factor": plan.factor},
        )


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
