"""Queries scaled with the logarithm of their position: log-n, and the temperature of Llama 4."""

from dataclasses import dataclass

from ..decode import Count, Positive
from ..plan import ExtensionPlan, QueryScale
from .base import Method
from .rotary import with_query_scale


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

    scale: Positive = 0.1
    step: Count | None = None

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        length = plan.trained_length
        return with_query_scale(plan, QueryScale(length, temperature=self.scale, step=self.step or length))
