"""Methods for relative distances in buckets that have a learned bias each (T5, MPNet)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..errors import InvalidParameterError
from ..plan import BucketPlan, ExtensionPlan
from ..scheme import PositionalScheme
from .base import Method, register


@dataclass(frozen=True)
class BucketMethod(Method):
    """A method for relative distances in buckets, also beside a learned table (MPNet), which it must be composed with.

    Subclasses implement [`~BucketMethod.buckets`].
    """

    kinds = ("relative",)

    def applies_to(self, scheme: PositionalScheme) -> str | None:
        return scheme.obstacle if scheme.buckets is not None else super().applies_to(scheme)

    def buckets(self, plan: ExtensionPlan, current: BucketPlan) -> BucketPlan:
        """Return the buckets with this method applied on top."""
        raise TypeError(f"{type(self).__name__} must implement buckets(plan, current)")

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        if plan.scheme.table is not None and plan.table is None:
            raise InvalidParameterError(
                f"{plan.scheme.model_type} has a learned table too, which {self.name} leaves at its length. Stretch "
                f"it first: 'table-linear+{self.name}'."
            )
        return plan.with_edits(BucketPlan, self.buckets(plan, plan.buckets or BucketPlan()))


@register
@dataclass(frozen=True)
class BucketLinear(BucketMethod):
    """Relative distances divided by the factor before they are sorted into buckets, rounded away from zero.

    `sign(d) ceil(|d| / s)`: no other token shares the bucket of distance 0, and both directions stay apart.
    Position interpolation (Chen et al., *Extending Context Window of Large Language Models via Positional
    Interpolation*, 2023) of the buckets of Raffel et al., *Exploring the Limits of Transfer Learning with a Unified
    Text-to-Text Transformer*, 2019.
    """

    name = "bucket-linear"
    title = "interpolated relative distances"
    url = "https://arxiv.org/abs/2306.15595"

    def buckets(self, plan: ExtensionPlan, current: BucketPlan) -> BucketPlan:
        return replace(current, factor=current.factor * plan.factor)


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

    name = "bucket-max-distance"
    title = "raised maximum distance"
    url = "https://arxiv.org/abs/1910.10683"

    max_distance: int | None = None

    def buckets(self, plan: ExtensionPlan, current: BucketPlan) -> BucketPlan:
        assert plan.scheme.buckets is not None
        shipped = plan.scheme.buckets.max_distance
        reach = math.ceil(shipped * plan.factor) if self.max_distance is None else self.max_distance
        if reach < shipped:
            raise InvalidParameterError(
                f"{self.name}: expected max_distance from {shipped} (the model's own) on, got {reach}."
            )
        return replace(current, max_distance=None if reach == shipped else reach)
