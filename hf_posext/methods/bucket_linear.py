"""Position interpolation of relative distances."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..plan import BucketPlan, ExtensionPlan
from .base import register
from .bucket import BucketMethod


@register
@dataclass(frozen=True)
class BucketLinear(BucketMethod):
    """Relative distances divided by the factor before they are sorted into buckets, rounded away from zero.

    `sign(d) ceil(|d| / s)`: no other token shares the bucket of distance 0, and both directions stay apart.
    Position interpolation (Chen et al., *Extending Context Window of Large Language Models via Positional
    Interpolation*, 2023) of the buckets of Raffel et al., *Exploring the Limits of Transfer Learning with a Unified
    Text-to-Text Transformer*, 2019.
    """

    name: ClassVar[str] = "bucket-linear"
    title: ClassVar[str] = "interpolated relative distances"
    url: ClassVar[str] = "https://arxiv.org/abs/2306.15595"

    def buckets(self, plan: ExtensionPlan, current: BucketPlan) -> BucketPlan:
        return replace(current, factor=current.factor * plan.factor)
