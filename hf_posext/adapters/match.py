"""When two plans, or a plan and a config, mean the same positions."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..patching.detect import text_config
from ..plan import BucketPlan, ExtensionPlan, RotaryPlan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def same_effect(plan: ExtensionPlan, other: ExtensionPlan) -> bool:
    """Whether two plans give every token the same positions, whatever they call it."""

    def effect(of: ExtensionPlan) -> Any:
        edits = [replace(edit, rope_parameters=None) if isinstance(edit, RotaryPlan) else edit for edit in of.edits]
        return of.trained_length, of.target_length, sorted(edits, key=lambda edit: getattr(edit, "name", ""))

    return bool(effect(plan) == effect(other))


def computes(config: PreTrainedConfig, plan: ExtensionPlan) -> bool:
    """Whether transformers computes the plan's positions from a config, without this package."""
    match plan.edits:
        case (BucketPlan(factor=1) as buckets,):
            return bool(getattr(text_config(config), "relative_attention_max_distance", None) == buckets.max_distance)
    said = [isinstance(edit, RotaryPlan) and bool(edit.rope_parameters) and not edit.growth for edit in plan.edits]
    if not said or not all(said):
        return False
    held: Any = getattr(text_config(config), "rope_parameters", None) or {}
    return all(
        _plain(held.get(entry.name) if entry.name else held) == _plain(entry.rope_parameters)
        for entry in plan.rotaries
    )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
