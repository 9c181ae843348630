"""vLLM: the same `rope_parameters`, with what it needs beyond transformers.

Read from the wheel of vLLM 0.33.0 (4ba787ec9): `model_executor/layers/rotary_embedding/*.py`, `config/model.py`,
`transformers_utils/config.py`, `model_executor/models/{llama,gemma3,gpt2}.py`.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ..plan import ExtensionPlan, RotaryPlan
from .config_servers import config_entries
from .serving import DIRECTORY, Serving, override_flag, refuse

SERVER = "vLLM"
READ_FROM = "vLLM 0.33.0 (4ba787ec9)"


def serve(config: PreTrainedConfig, plan: ExtensionPlan, obstacle: str | None) -> Serving:
    """
    Raises:
        ExportError: vLLM cannot compute the positions.
    """

    def adapt(entry: RotaryPlan, parameters: dict[str, Any], differences: list[str]) -> None:
        if parameters.get("partial_rotary_factor") == 0:
            raise refuse(SERVER, plan, "it refuses a partial_rotary_factor of 0")
        if parameters["rope_type"] == "longrope":
            differences.append(
                "Without `--max-model-len`, a `longrope` model is served at its original length: keep the flag."
            )
        if entry.short_inv_freq is not None:
            differences.append(
                "The long factor list is used for every input, short ones too, as soon as `--max-model-len` is above "
                f"{plan.trained_length}; transformers uses the short list up to there."
            )

    entries, differences = config_entries(SERVER, config, plan, obstacle, adapt)
    length = ("--max-model-len", str(plan.target_length))
    override = ("--hf-overrides", override_flag(config, plan, entries), *length) if plan.rotaries else ()
    command = ("vllm", "serve", DIRECTORY, *length)
    return Serving(SERVER, READ_FROM, plan, (command,), entries, override, tuple(differences))
