"""A changed base (ABF)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import InvalidParameterError
from ..plan import ExtensionPlan, RotaryPlan
from ..scheme import Rotary
from .base import register
from .frequencies import FrequencyMethod, from_tensor, powers


@register
@dataclass(frozen=True)
class Theta(FrequencyMethod):
    """Change the base, usually with training afterwards.

    `inv_freq_i = theta' ** (-2 i / d)`. Without `theta`, the pair that completes exactly one rotation within the
    trained length completes one within the target: `theta' = theta ** (ln(target / 2 pi) / ln(trained / 2 pi))`, the
    critical base of Liu et al., *Scaling Laws of RoPE-based Extrapolation* (arXiv 2310.05209). Adjusted base
    frequency: Xiong et al., *Effective Long-Context Scaling of Foundation Models*, 2023.

    Args:
        theta (`float`, *optional*): the new base, e.g. 500000.
    """

    name = "theta"
    title = "adjusted base frequency (ABF)"
    url = "https://arxiv.org/abs/2309.16039"

    theta: float | None = None

    def __post_init__(self) -> None:
        if self.theta is not None and not (math.isfinite(self.theta) and self.theta > 1):
            raise InvalidParameterError(f"Expected a theta above 1, got {self.theta}. Pass e.g. theta=500000.")

    def rescale(self, rotary: Rotary, current: RotaryPlan, plan: ExtensionPlan) -> RotaryPlan:
        theta = self.theta
        if theta is None:
            turns = [math.log(length / (2 * math.pi)) for length in (plan.target_length, plan.trained_length)]
            if turns[1] <= 0:
                raise InvalidParameterError(
                    f"A trained length of {plan.trained_length} is below one turn. Pass theta=."
                )
            theta = rotary.theta ** (turns[0] / turns[1])
        return from_tensor(
            rotary, powers(theta, rotary), rope_parameters={"rope_type": "default", "rope_theta": theta}
        )
