"""Methods for attention biases by distance: slopes of ALiBi, and buckets with learned biases (T5, MPNet)."""

import math
from dataclasses import dataclass, replace

from ..errors import InvalidParameterError
from ..plan import BucketPlan, ExtensionPlan, Slopes
from ..scheme import PositionalScheme
from .base import Method


@dataclass(frozen=True)
class ALiBiLinear(Method):
    """Divide all ALiBi slopes by the factor, so that the longest distance costs what it cost in training.

    `m_h / s`, at every length. Al-Khateeb et al., *Position Interpolation Improves ALiBi Extrapolation*, 2023.
    """

    name = "alibi-linear"
    title = "ALiBi position interpolation"
    url = "https://arxiv.org/abs/2310.13017"
    kinds = ("alibi",)

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        slopes = plan.slopes or plan.scheme.slopes
        return plan.with_edits(Slopes, Slopes(tuple(slope / plan.factor for slope in slopes)))


@dataclass(frozen=True)
class ALiBiNTK(Method):
    """Keep the steepest ALiBi slope, divide the flattest by the factor, and space the others geometrically.

    `m_h / s ** ((h - 1) / (H - 1))` for heads h = 1 to H from steep to flat. If the number of heads is not a power
    of two, the slopes are not a geometric series, and the exponent is `log(m_1 / m_h) / log(m_1 / m_H)`. After Keezen,
    *NTK-ALiBi*, 2023; plain interpolation: Al-Khateeb et al., *Position Interpolation Improves ALiBi Extrapolation*,
    2023.
    """

    name = "alibi-ntk"
    title = "NTK-ALiBi"
    url = code = "https://github.com/keezen/ntk_alibi"
    kinds = ("alibi",)

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        slopes = plan.slopes or plan.scheme.slopes
        steep, flat = max(slopes), min(slopes)

        def share(slope: float) -> float:
            return math.log(steep / slope) / math.log(steep / flat) if steep > flat else 1.0

        return plan.with_edits(Slopes, Slopes(tuple(slope / plan.factor ** share(slope) for slope in slopes)))


@dataclass(frozen=True)
class BucketMethod(Method):
    """Base class of the methods for bucketed relative distances.

    In a model that has a learned table as well (MPNet), the method must be composed with one for the table.

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


@dataclass(frozen=True)
class BucketLinear(BucketMethod):
    """Divide relative distances by the factor, rounded away from zero, before they are sorted into buckets.

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


@dataclass(frozen=True)
class BucketMaxDistance(BucketMethod):
    """Stretch the far buckets of relative distances `s` times. The nearest half keep one distance each.

    `b + floor(ln(|d| / b) / ln(s D / b) * b)` for distances from `b` on, D being the trained maximum. This changes
    the learned meaning of the far buckets: each now stands for farther distances. Buckets: Raffel et al.,
    *Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer*, 2019.

    Args:
        max_distance (`int`, *optional*): In tokens. By default the model's own, times the factor.
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
