"""Buckets of relative distances that reach farther."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from ..errors import InvalidParameterError
from ..plan import BucketPlan, ExtensionPlan
from .base import register
from .bucket import BucketMethod


@register
@dataclass(frozen=True)
class BucketMaxDistance(BucketMethod):
    """Buckets of relative distances that reach `s` times as far; the nearest half stay one for each distance.

    `b + floor(ln(|d| / b) / ln(s D / b) * b)` for distances from `b` on, D being the trained maximum. This changes
    what the far buckets have learned to mean: each now stands for farther distances. Buckets: Raffel et al.,
    *Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer*, 2019.

    Args:
        max_distance (`int`, *optional*): in tokens; the model's own times the factor where not given.
    """

    name: ClassVar[str] = "bucket-max-distance"
    title: ClassVar[str] = "raised maximum distance"
    url: ClassVar[str] = "https://arxiv.org/abs/1910.10683"

    max_distance: int | None = None

    def buckets(self, plan: ExtensionPlan, current: BucketPlan) -> BucketPlan:
        assert plan.scheme.buckets is not None
        shipped = plan.scheme.buckets.max_distance
        reach = math.ceil(shipped * plan.factor) if self.max_distance is None else self.max_distance
        if reach < shipped:
            raise InvalidParameterError(
                f"{self.name} max_distance is {reach}; give {shipped}, the model's own, or more"
            )
        return replace(current, max_distance=reach)
