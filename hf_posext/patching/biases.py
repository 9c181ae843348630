"""Attention biases by distance: ALiBi slopes, and buckets of relative distances.

transformers rounds the biases of BLOOM and Falcon to the dtype of the model, which in bfloat16 is whole positions a
few hundred tokens on. Here they are computed in float32 and added to the mask. Attention layers get it by hooks, which
run whoever else has wrapped their forward (accelerate, with a `device_map`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..plan import BucketPlan, ExtensionPlan
from .effect import no_effect
from .observe import buckets_of
from .sites import bucket_modules, logits_of_probe
from .undo import Mixin, UndoLog, mix


class AttentionSlopes:
    """Forward pre-hook of an attention layer, with the float32 slopes (heads,) of a plan and their biases.

    Args:
        biased: function of the family that returns the arguments that take the place of those of the layer.
    """

    def __init__(self, slopes: torch.Tensor, biased: Biased) -> None:
        self.slopes = slopes
        self.biased = biased
        self.used = False

    def on(self, device: torch.device) -> torch.Tensor:
        """Return the slopes on a device, where they stay: the host would wait in every layer to move them."""
        if not self.used:
            self.used = True
        if self.slopes.device != device:
            self.slopes = self.slopes.to(device)
        return self.slopes

    def biases(self, mask: torch.Tensor) -> torch.Tensor:
        """Return slope times position of each key, float32 of shape (batch, heads, 1, keys).

        Positions are counted over the keys that the last query sees, as transformers counts them over the attention
        mask: padding has none.
        """
        real = (mask[:, 0, -1] > torch.finfo(mask.dtype).min / 2).long()
        positions = (real.cumsum(-1) - 1) * real
        return self.on(mask.device)[None, :, None, None] * positions[:, None, None]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of the layer with the biases of these slopes."""
        return args, kwargs | self.biased(self, module, kwargs)


Biased: TypeAlias = Callable[[AttentionSlopes, Any, dict[str, Any]], dict[str, torch.Tensor]]


def _bloom(slopes: AttentionSlopes, module: Any, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    alibi, mask = given["alibi"], given["attention_mask"]
    return {"alibi": alibi.new_zeros(1, 1, 1), "attention_mask": mask + slopes.biases(mask)}


def _falcon(slopes: AttentionSlopes, module: Any, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return a mask that contains the biases over the root of the head width, as Falcon's does.

    Kernels of SDPA want the mask in the dtype of the states. What each query adds to all of its keys alike counts for
    nothing, so that the mask gets distances, which are small, and so exact, where attention is.
    """
    mask = given["attention_mask"]
    biases, lowest = slopes.biases(mask), torch.finfo(mask.dtype).min
    unseen = mask < lowest / 2
    nearest = biases.masked_fill(unseen, 0).amax(-1, keepdim=True)  # that of the last token that a query sees
    scaled = (biases - nearest) / math.sqrt(module.hidden_size // module.num_heads)
    return {"alibi": biases, "attention_mask": scaled.to(mask.dtype).masked_fill(unseen, lowest)}


def _mpt(slopes: AttentionSlopes, module: Any, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return biases that count back from the last key, padding or not."""
    shipped = given["position_bias"]
    distances = torch.arange(1 - shipped.shape[-1], 1, dtype=torch.float32, device=shipped.device)
    return {"position_bias": slopes.on(shipped.device)[:, None, None] * distances}


_FAMILIES: dict[str, Biased] = {"BloomAttention": _bloom, "FalconAttention": _falcon, "MptAttention": _mpt}


def apply_slopes(model: PreTrainedModel, plan: ExtensionPlan, log: UndoLog) -> str:
    """Apply the slopes of a plan to a model, and check that every layer uses them.

    Returns:
        `str`: why a saved checkpoint needs this package.
    """
    if plan.slopes == plan.scheme.slopes:
        raise no_effect(plan, "the slopes")
    slopes = torch.tensor(plan.slopes, dtype=torch.float32)
    sites: dict[str, AttentionSlopes] = {}
    for path, module in model.named_modules():
        names = (cls.__name__ for cls in type(module).__mro__)
        biased = next((_FAMILIES[name] for name in names if name in _FAMILIES), None)
        if biased is not None:
            sites[path] = AttentionSlopes(slopes, biased)
            log.on_undo(module.register_forward_pre_hook(sites[path], with_kwargs=True).remove)
    if not sites:
        raise UnsupportedModelError(
            f"Expected attention layers of {', '.join(_FAMILIES)}, got none in {plan.scheme.model_type}. Pass "
            "attn_implementation='sdpa' or 'eager' where it is loaded."
        )
    logits_of_probe(model)  # by the path that users run, whoever has wrapped it
    idle = [path for path, site in sites.items() if not site.used]
    if idle:
        raise UnsupportedModelError(
            f"Expected {idle[0]} of {plan.scheme.model_type} to run with the slopes of {plan.method}, got a call past "
            "its hooks. Remove what wraps it, then patch."
        )
    return "no config of transformers can express the slopes of ALiBi"


MOST_DISTANCES = 2**16
"""Distances that are sorted to see whether a plan changes their buckets."""


class OtherBuckets(Mixin):
    """Mixin for T5-like modules, whose bucket function takes the maximum distance."""

    _posext_buckets: BucketPlan

    def _relative_position_bucket(self, relative_position: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        squeezed = _squeezed(relative_position, self._posext_buckets.factor)
        out: torch.Tensor = super()._relative_position_bucket(squeezed, *args, **kwargs)  # type: ignore[misc]
        return out


class OtherBucketsOfMPNet(Mixin):
    """Mixin for MPNet, whose bucket function has another name and signature."""

    _posext_buckets: BucketPlan

    def relative_position_bucket(self, relative_position: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._posext_buckets.max_distance is not None:
            kwargs["max_distance"] = self._posext_buckets.max_distance
        squeezed = _squeezed(relative_position, self._posext_buckets.factor)
        out: torch.Tensor = super().relative_position_bucket(squeezed, *args, **kwargs)  # type: ignore[misc]
        return out


def _squeezed(distance: torch.Tensor, factor: float) -> torch.Tensor:
    """Return `sign(d) ceil(|d| / s)`. Whole numbers are required, because each of the nearest distances has a
    bucket."""
    return distance.sign() * (distance.abs().float() / factor).ceil().to(distance.dtype)


def apply_buckets(model: PreTrainedModel, plan: ExtensionPlan, log: UndoLog) -> str | None:
    """Apply the buckets of a plan to a model.

    Returns:
        `str`, *optional*: why a config cannot state them; `None` where it does.
    """
    assert plan.buckets is not None and plan.scheme.buckets is not None
    distances = torch.arange(min(2 * max(plan.target_length, plan.scheme.buckets.max_distance), MOST_DISTANCES))
    before = buckets_of(model, distances, BucketPlan())
    sites, reach, obstacle = bucket_modules(model).values(), plan.buckets.max_distance, None
    stated = all(hasattr(module, "relative_attention_max_distance") for module in sites)
    if stated and reach is not None:
        for owner in (*sites, model.config):
            log.set(owner, "relative_attention_max_distance", reach)
    if plan.buckets.factor != 1 or not stated:
        obstacle = "no config of transformers can divide distances before they are sorted into buckets"
        for module in sites:
            mixin = OtherBuckets if hasattr(module, "_relative_position_bucket") else OtherBucketsOfMPNet
            log.set(module, "_posext_buckets", plan.buckets)
            log.set(module, "__class__", mix(mixin, type(module)))
    if torch.equal(buckets_of(model, distances, BucketPlan()), before):
        raise no_effect(plan, "the buckets")
    return obstacle
