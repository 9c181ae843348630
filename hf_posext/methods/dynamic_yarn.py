"""Dynamic YaRN: a factor that follows the length of each row."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..errors import InvalidParameterError
from ..plan import ExtensionPlan, Growth, RotaryPlan
from ..scheme import Rotary
from .base import register
from .frequencies import FrequencyMethod, padded, powers, require_pairs, unscaled
from .yarn import YaRN


@register
@dataclass(frozen=True)
class DynamicYaRN(FrequencyMethod):
    """Apply YaRN with the factor that each row needs, so that short inputs keep their quality.

    [`YaRN`] with `s = max(1, l / L)` for a row of l tokens (Peng et al., 2023, section 3.3). As in
    [`DynamicNTK`], rows are independent and keys are cached unrotated.

    Args:
        beta_fast (`float`, *optional*, defaults to 32): rotations above which a pair is kept.
        beta_slow (`float`, *optional*, defaults to 1): rotations below which a pair is interpolated.
        truncate (`bool`, *optional*, defaults to `True`): round the ends of the ramp to whole pairs.
        temperature (`float`, *optional*, defaults to 0.1): cosine and sine are multiplied by `1 + t ln s`.
    """

    name = "dynamic-yarn"
    title = "dynamic YaRN"
    url = "https://arxiv.org/abs/2309.00071"
    code = "https://github.com/jquesnelle/yarn"

    beta_fast: float = 32
    beta_slow: float = 1
    truncate: bool = True
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 10:
            raise InvalidParameterError(
                f"Expected a dynamic-yarn temperature of 0 to 10, got {self.temperature}. Pass e.g. 0.1."
            )
        YaRN(beta_fast=self.beta_fast, beta_slow=self.beta_slow)  # refuses values out of bounds

    def rescale(self, rotary: Rotary, current: RotaryPlan, plan: ExtensionPlan) -> RotaryPlan:
        require_pairs(self, rotary)
        yarn = YaRN(beta_fast=self.beta_fast, beta_slow=self.beta_slow, truncate=self.truncate)
        interpolated = yarn.ramp(rotary, plan.trained_length, self.truncate)
        whole = powers(rotary.theta, rotary)
        growth = Growth(
            moving=padded(rotary, whole * interpolated),
            power=padded(rotary, torch.ones(rotary.pairs)),
            kept=padded(rotary, whole * (1 - interpolated)),
            temperature=self.temperature,
        )
        return replace(unscaled(rotary), growth=growth, rope_parameters=None)
