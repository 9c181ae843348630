"""What vLLM and SGLang share: both read `rope_parameters` of `config.json`, in much the same way.

They differ from transformers in the same three places: a config whose type is `linear` has its limit multiplied by the
factor, `attention_factor` of `longrope` is not looked at, and `mrope_section` only under some types.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

from ..patching.detect import text_config
from ..plan import ExtensionPlan, RotaryPlan
from .serving import refuse

MROPE_TYPES = ("default", "yarn")
"""Rope types under which positions of several axes (Qwen-VL) are kept."""

Adapt = Callable[[RotaryPlan, dict[str, Any], list[str]], None]
"""What one server does otherwise: changes the parameters of a set of frequencies, and adds sentences."""


def config_entries(
    server: str, config: PreTrainedConfig, plan: ExtensionPlan, obstacle: str | None, adapt: Adapt
) -> tuple[dict[str, Any], list[str]]:
    """Entries of the text config that are other than for transformers, and in words what differs.

    Raises:
        ExportError: the plan needs more than a config and weights.
    """
    if obstacle or plan.buckets:
        raise refuse(server, plan, obstacle or "it does not serve models with buckets of relative distances")
    text: Any = text_config(config)
    rope: dict[str, dict[str, Any]] = {}
    entries: dict[str, Any] = {}
    differences: list[str] = []
    for entry in plan.rotaries:
        parameters = rope[entry.name] = dict(entry.rope_parameters or {})
        kind = parameters["rope_type"]
        if "mrope_section" in parameters and kind not in MROPE_TYPES:
            reason = f"under rope type {kind!r} it does not look at mrope_section"
            raise refuse(server, plan, reason, "yarn, ntk and theta can be exported")
        if "factor" in parameters:
            parameters["factor"] = float(parameters["factor"])  # an int is taken for a list of factors
        if kind == "longrope":
            parameters |= {"short_mscale": entry.attention_factor, "long_mscale": entry.attention_factor}
            differences += [
                "`attention_factor` of a `longrope` config is ignored; `short_mscale` and `long_mscale` say it here.",
                "`longrope` is refused for models that rotate neighbouring channels (GLM, Cohere, ERNIE 4.5).",
            ]
        if kind == "linear" and "gemma3" not in text.model_type:
            limit = _least(plan.target_length, parameters["factor"])
            entries["max_position_embeddings"] = limit
            differences.append(
                "The limit in a `linear` config is multiplied by its factor. It is therefore the original "
                f"{limit} here, and {plan.target_length} in a checkpoint for transformers."
            )
        adapt(entry, parameters, differences)
    if rope:
        entries["rope_parameters"] = rope.get("", {**text.rope_parameters, **rope})
    return entries, differences


def _least(target: int, factor: float) -> int:
    """The least length that `factor` times is the target or more."""
    length = round(target / factor)
    return length if length * factor >= target else length + 1
