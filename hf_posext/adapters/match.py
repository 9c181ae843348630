"""When two plans, or a plan and a config, mean the same positions."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..patching.detect import text_config
from ..plan import ExtensionPlan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def same_effect(plan: ExtensionPlan, other: ExtensionPlan) -> bool:
    """Whether two plans give every token the same positions, whatever they call it."""

    def effect(of: ExtensionPlan) -> Any:
        rotaries = [(r.name, r.inv_freq, r.attention_factor, r.short_inv_freq, r.growth) for r in of.rotaries]
        rest = (of.trained_length, of.target_length, of.parts, of.query_scale, of.table, of.slopes, of.buckets)
        return sorted(rotaries, key=lambda rotary: rotary[0]), rest, of.sinusoids

    return bool(effect(plan) == effect(other))


def computes(config: PreTrainedConfig, plan: ExtensionPlan) -> bool:
    """Whether transformers computes the plan's positions from a config, without this package."""
    buckets = plan.buckets
    if buckets is not None and buckets.factor == 1:
        return bool(getattr(text_config(config), "relative_attention_max_distance", None) == buckets.max_distance)
    only_rotary = plan.rotaries and not (
        plan.rotates_late or plan.table or plan.buckets or plan.slopes or plan.sinusoids
    )
    if not only_rotary or any(entry.rope_parameters is None for entry in plan.rotaries):
        return False
    held: Any = getattr(text_config(config), "rope_parameters", None) or {}
    return all(
        _plain(held.get(entry.name) if entry.name else held) == _plain(entry.rope_parameters)
        for entry in plan.rotaries
    )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
