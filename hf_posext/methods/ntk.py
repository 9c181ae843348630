"""NTK-aware interpolation with a fixed factor."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import ExtensionPlan, RotaryPlan
from ..scheme import Rotary
from .base import register
from .frequencies import FrequencyMethod, from_tensor, powers, require_pairs


@register
@dataclass(frozen=True)
class NTK(FrequencyMethod):
    """Raise the base so that the slowest pair is interpolated and the fastest is kept.

    `theta' = theta * s ** (d / (d - 2))`: pair 0 stays, the last pair rotates `s` times slower. Its effective length
    is below `s` times the trained one (YaRN, section 3.1), so users often pass a larger factor. bloc97, *NTK-aware
    scaled RoPE*, 2023.
    """

    name = "ntk"
    title = "NTK-aware interpolation"
    url = "https://arxiv.org/abs/2309.00071"

    def rescale(self, rotary: Rotary, current: RotaryPlan, plan: ExtensionPlan) -> RotaryPlan:
        require_pairs(self, rotary)
        theta = rotary.theta * plan.factor ** (rotary.dim / (rotary.dim - 2))
        return from_tensor(
            rotary, powers(theta, rotary), rope_parameters={"rope_type": "default", "rope_theta": theta}
        )
