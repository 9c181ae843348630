"""Plain transformers: the checkpoint as it is, if its config says the positions."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedConfig

from ..patching.detect import text_config
from ..patching.older_readers import LEAST, entries_of_4
from ..plan import ExtensionPlan
from .serving import Serving, refuse

SERVER = "transformers"


def serve_4(config: PreTrainedConfig, plan: ExtensionPlan, obstacle: str | None) -> Serving:
    """The same, for version 4 as the oldest reader.

    Raises:
        ExportError: it would not compute the positions.
    """
    if not obstacle and isinstance(reason := _older(config, plan), str):
        raise refuse("transformers 4", plan, reason, "export it for transformers, whose version 5 computes it")
    return serve(config, plan, obstacle)


def _older(config: PreTrainedConfig, plan: ExtensionPlan) -> dict[str, Any] | str:
    return entries_of_4(text_config(config).to_dict()) if plan.rotaries else {}


def serve(config: PreTrainedConfig, plan: ExtensionPlan, obstacle: str | None) -> Serving:
    """
    Raises:
        ExportError: transformers cannot compute the positions from a config.
    """
    if obstacle:
        instead = "patch.save_pretrained(path) saves the plan beside the weights, load_patched(path) opens both"
        raise refuse(SERVER, plan, obstacle, instead)
    differences = []
    older = _older(config, plan)
    if isinstance(older, str):
        differences.append(
            f"The oldest reader is transformers 5.0: {older}. An older one opens the checkpoint with the positions of "
            "a plain model, and says nothing."
        )
    elif plan.rotaries:
        differences.append(
            f"The oldest reader is transformers {LEAST}, by `rope_theta` and `rope_scaling`; version 5 reads "
            "`rope_parameters`, which says the same."
        )
    if any(entry.short_inv_freq is not None for entry in plan.rotaries):
        differences.append(
            "The two factor lists of LongRoPE change over at the original length, by the longest row of a batch; keys "
            "that are in the cache when a generation passes it keep the short ones."
        )
    return Serving(SERVER, f"transformers {transformers.__version__}", plan, differences=tuple(differences))
