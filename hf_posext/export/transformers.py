"""Plain transformers: the checkpoint as it is, if its config says the positions."""

from __future__ import annotations

import transformers
from transformers import PreTrainedConfig

from ..plan import ExtensionPlan
from .serving import Serving, refuse

SERVER = "transformers"


def serve(config: PreTrainedConfig, plan: ExtensionPlan, obstacle: str | None) -> Serving:
    """
    Raises:
        ExportError: transformers cannot compute the positions from a config.
    """
    if obstacle:
        instead = "patch.save_pretrained(path) saves the plan beside the weights, load_patched(path) opens both"
        raise refuse(SERVER, plan, obstacle, instead)
    differences = []
    if any(entry.short_inv_freq is not None for entry in plan.rotaries):
        differences.append(
            "The two factor lists of LongRoPE change over at the original length, by the longest row of a batch; keys "
            "that are in the cache when a generation passes it keep the short ones."
        )
    return Serving(SERVER, f"transformers {transformers.__version__}", plan, differences=tuple(differences))
