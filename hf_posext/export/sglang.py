"""SGLang: the same `rope_parameters`, with what it needs beyond transformers.

Read from the wheel of SGLang 0.5.23: `srt/layers/rotary_embedding/*.py`, `srt/configs/model_config.py`,
`srt/utils/hf_transformers/{common,config}.py`, `srt/models/{llama,qwen3,gemma3_causal}.py`.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedConfig

from ..plan import ExtensionPlan, RotaryPlan
from .config_servers import config_entries
from .serving import DIRECTORY, Serving, override_flag, refuse

SERVER = "SGLang"
READ_FROM = "SGLang 0.5.23"


def serve(config: PreTrainedConfig, plan: ExtensionPlan, obstacle: str | None) -> Serving:
    """
    Raises:
        ExportError: SGLang cannot compute the positions.
    """

    def adapt(entry: RotaryPlan, parameters: dict[str, Any], differences: list[str]) -> None:
        kind = parameters["rope_type"]
        if entry.name and kind != "default":
            reason = f"of rope_parameters that are nested by layer type it reads the base alone, not {kind!r}"
            raise refuse(SERVER, plan, reason, "ntk and theta, which change the base, can be exported")
        if kind == "proportional":
            raise refuse(SERVER, plan, "it does not look at the partial_rotary_factor of rope type 'proportional'")
        if kind == "yarn":
            own = 0.1 * math.log(parameters["factor"]) + 1.0
            if not math.isclose(entry.attention_factor, own, rel_tol=1e-6):
                parameters["attn_factor"] = entry.attention_factor / own
            made_up = "times `attn_factor`, which makes up for it here" if "attn_factor" in parameters else "as here"
            differences.append(
                "`attention_factor` of a `yarn` config is ignored: cosine and sine are multiplied by "
                f"`0.1 ln(factor) + 1`, {made_up}."
            )
        if entry.short_inv_freq is not None:
            differences.append(
                "The long factor list is used for all requests of a batch once one of them has a position above "
                f"{plan.trained_length}, and cached keys keep the list that they were made with: what a request gets "
                "depends on the others."
            )

    entries, differences = config_entries(SERVER, config, plan, obstacle, adapt)
    length = ("--context-length", str(plan.target_length))
    override = ("--json-model-override-args", override_flag(config, plan, entries), *length) if plan.rotaries else ()
    command = ("sglang", "serve", "--model-path", DIRECTORY, *length)
    return Serving(SERVER, READ_FROM, plan, (command,), entries, override, tuple(differences))
