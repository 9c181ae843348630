"""Entropy-aware ABF: a larger base, and queries that grow with their position in all layers but the first."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InvalidParameterError
from ..plan import ExtensionPlan, QueryScale
from .base import register
from .frequencies import FrequencyMethod
from .remap import with_query_scale
from .theta import Theta


@register
@dataclass(frozen=True)
class EABF(FrequencyMethod):
    """Raise the base, and scale queries with the logarithm of their position except in the first layers.

    The base becomes `theta`, as in [`Theta`], and query p is multiplied by `max(1, ln(p + 1) / ln L)` in all layers
    except the first `skip`. Zhang et al., *Extending LLMs' Context Window with 100 Samples*, 2024. Meant for training
    on a few samples afterwards.

    Args:
        theta (`float`, *optional*, defaults to 500000): the new base.
        skip (`int`, *optional*, defaults to 2): first layers, whose queries are not scaled.
    """

    name = "eabf"
    title = "entropy-aware ABF"
    url = "https://arxiv.org/abs/2401.07004"
    code = "https://github.com/GAIR-NLP/Entropy-ABF"
    needs_factor = False

    theta: float = 500_000.0
    skip: int = 2

    def __post_init__(self) -> None:
        Theta(theta=self.theta)  # refuses values out of bounds
        if self.skip < 0:
            raise InvalidParameterError(f"Expected an eabf skip of 0 layers or more, got {self.skip}.")

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        scale = QueryScale(length=plan.trained_length, log=True, first_layer=self.skip)
        return with_query_scale(Theta(theta=self.theta).extend(plan), scale)
