"""Sorts relative distances into other buckets than a model was trained with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import NoEffectError
from ..plan import BucketPlan, ExtensionPlan
from .mixin import Mixin, mix
from .observe import buckets_of
from .sites import bucket_modules
from .undo import UndoLog

MOST_DISTANCES = 2**16
"""Distances that are sorted to see whether a plan changes their buckets."""


class OtherBuckets(Mixin):
    """Mixed into a module of T5's kin, which sorts distances into buckets by a function that takes its reach."""

    _posext_buckets: BucketPlan

    def _relative_position_bucket(self, relative_position: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        squeezed = _squeezed(relative_position, self._posext_buckets.factor)
        out: torch.Tensor = super()._relative_position_bucket(squeezed, *args, **kwargs)  # type: ignore[misc]
        return out


class OtherBucketsOfMPNet(Mixin):
    """The same for MPNet, which names the function otherwise and has no maximum distance of its own to set."""

    _posext_buckets: BucketPlan

    def relative_position_bucket(self, relative_position: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._posext_buckets.max_distance is not None:
            kwargs["max_distance"] = self._posext_buckets.max_distance
        squeezed = _squeezed(relative_position, self._posext_buckets.factor)
        out: torch.Tensor = super().relative_position_bucket(squeezed, *args, **kwargs)  # type: ignore[misc]
        return out


def _squeezed(distance: torch.Tensor, factor: float) -> torch.Tensor:
    """`sign(d) ceil(|d| / s)`, whole numbers, since the nearest distances have a bucket each."""
    return distance.sign() * (distance.abs() / factor).ceil().to(distance.dtype)


def apply_buckets(model: PreTrainedModel, plan: ExtensionPlan, log: UndoLog) -> str | None:
    """Put the buckets of a plan into a model.

    Returns:
        `str`, *optional*: `None` where the config now says the same as the live model, else why it cannot.

    Raises:
        NoEffectError: distances are sorted as before.
    """
    assert plan.buckets is not None and plan.scheme.buckets is not None
    reach = plan.buckets.max_distance
    distances = torch.arange(min(2 * max(plan.target_length, plan.scheme.buckets.max_distance), MOST_DISTANCES))
    before = buckets_of(model, distances, BucketPlan())
    obstacle = _swap(model, plan.buckets, reach, log)
    if torch.equal(buckets_of(model, distances, BucketPlan()), before):
        raise NoEffectError(
            f"{plan.describe()} leaves the buckets as they are; pass a factor above 1, or method 'none'"
        )
    return obstacle


def _swap(model: PreTrainedModel, buckets: BucketPlan, reach: int | None, log: UndoLog) -> str | None:
    """Buckets into every module that has some; returns why a config cannot say them."""
    sites = bucket_modules(model).values()
    said = all(hasattr(module, "relative_attention_max_distance") for module in sites)
    if reach is not None and said:
        for module in sites:
            log.set(module, "relative_attention_max_distance", reach)
        log.set(model.config, "relative_attention_max_distance", reach)
    if buckets.factor == 1 and said:
        return None
    for module in sites:
        mixin = OtherBuckets if hasattr(module, "_relative_position_bucket") else OtherBucketsOfMPNet
        log.set(module, "_posext_buckets", buckets)
        log.set(module, "__class__", mix(mixin, type(module)))
    return "no config of transformers can say that distances are divided before they are sorted into buckets"
