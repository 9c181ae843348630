"""The temperature of Llama 4's layers without positions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import InvalidParameterError
from ..plan import ExtensionPlan, QueryScale
from .base import Method, register
from .remap import with_query_scale


@register
@dataclass(frozen=True)
class Llama4Temperature(Method):
    """Scale queries in steps with the logarithm of their position, as Llama 4. On top of any other method.

    Query p is multiplied by `1 + scale * ln(floor((p + 1) / step) + 1)`. Llama 4 uses a scale of 0.1 and a step of
    8192, in its layers that do not rotate. Here it acts in those that do. A scale that grows with the input is from
    Nakanishi, *Scalable-Softmax Is Superior for Attention*, 2025.

    Args:
        scale (`float`, *optional*, defaults to 0.1): above 0.
        step (`int`, *optional*): tokens of a step; the trained length by default.
    """

    name = "llama4-temperature"
    title = "temperature of Llama 4"
    url = "https://arxiv.org/abs/2501.19399"
    code = "https://github.com/meta-llama/llama-models"
    kinds = ("rotary",)
    needs_factor = False

    scale: float = 0.1
    step: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise InvalidParameterError(f"Expected a llama4-temperature scale above 0, got {self.scale}.")
        if self.step is not None and self.step < 1:
            raise InvalidParameterError(f"Expected a llama4-temperature step of 1 token or more, got {self.step}.")

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        step = plan.trained_length if self.step is None else self.step
        return with_query_scale(plan, QueryScale(length=plan.trained_length, temperature=self.scale, step=step))
