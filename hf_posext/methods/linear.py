"""Position interpolation."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import ExtensionPlan, RotaryPlan
from ..scheme import Rotary
from .base import register
from .frequencies import FrequencyMethod, from_tensor, powers


@register
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
