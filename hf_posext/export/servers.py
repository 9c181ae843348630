"""Checkpoints for servers: config, commands, and the differences of transformers, vLLM, SGLang and llama.cpp.

vLLM and SGLang both read `rope_parameters` of `config.json`. They differ from transformers in the same three places:
they multiply the limit of a `linear` config by its factor, ignore `attention_factor` of `longrope`, and read
`mrope_section` under some types only. Read from the wheels of vLLM 0.33.0 (4ba787ec9) and SGLang 0.5.23:
`model_executor/layers/rotary_embedding/*.py`, `config/model.py`, `transformers_utils/config.py`,
`model_executor/models/{llama,gemma3,gpt2}.py`; `srt/layers/rotary_embedding/*.py`, `srt/configs/model_config.py`,
`srt/utils/hf_transformers/{common,config}.py`, `srt/models/{llama,qwen3,gemma3_causal}.py`.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers import __version__ as transformers_version

from ..errors import InvalidParameterError, NotPatchedError
from ..escaping import render
from ..patching import find_patch
from ..patching.checkpoint import new_directory, refuse_adapter
from ..patching.detect import text_config
from ..patching.saved_config import LEAST, edited, entries_of_4, stop_4, stop_readers, text_path
from ..plan import ExtensionPlan, RotaryPlan, TablePlan
from .llama_cpp import READ_FROM, SERVER, RopeKeys, refuse, rope_keys

DIRECTORY = "{directory}"
"""Placeholder for the exported directory in commands."""


@dataclass(frozen=True)
class Serving:
    """Instructions for a server to run a plan.

    Attributes:
        server (`str`): name of the server.
        read_from (`str`): version of the server's source that the instructions are based on.
        plan (`ExtensionPlan`): plan to run.
        commands (`tuple[tuple[str, ...], ...]`): commands to run in order. `{directory}` stands for the export.
        text (`Mapping`): entries of the text part of `config.json` that differ from those for transformers.
        override (`tuple[str, ...]`): flags that give the base model the same positions without an export; empty if
            there is no such flag.
        differences (`tuple[str, ...]`): parts of this plan that the server ignores or treats differently.
    """

    server: str
    read_from: str
    plan: ExtensionPlan
    commands: tuple[tuple[str, ...], ...] = ()
    text: Mapping[str, Any] = field(default_factory=dict)
    override: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()

    def command_lines(self, directory: str) -> list[str]:
        """Return the commands as lines for a shell, for an export in `directory`."""
        return [shlex.join(word.replace(DIRECTORY, directory) for word in command) for command in self.commands]


OLLAMA = ("default", "linear", "llama3")
"""Rope types that the converter of ollama computes for Llama (`convert/convert_llama.go`)."""


def serve_transformers_4(config: PreTrainedConfig, plan: ExtensionPlan, obstacle: str | None) -> Serving:
    """Return the instructions for transformers, with version 4 as the oldest reader."""
    if not obstacle and isinstance(reason := _older(config, plan), str):
        raise refuse("transformers 4", plan, reason, "export it for transformers, whose version 5 computes it")
    return serve_transformers(config, plan, obstacle)


def _older(config: PreTrainedConfig, plan: ExtensionPlan) -> dict[str, Any] | str:
    return entries_of_4(text_config(config).to_dict()) if plan.rotaries else {}


def serve_transformers(config: PreTrainedConfig, plan: ExtensionPlan, obstacle: str | None) -> Serving:
    """Return the instructions for transformers."""
    if obstacle:
        instead = "patch.save_pretrained(path) saves the plan beside the weights, load_patched(path) opens both"
        raise refuse("transformers", plan, obstacle, instead)
    differences = []
    older = _older(config, plan)
    if isinstance(older, str):
        differences.append(
            f"The oldest reader is transformers 5.0: {older}. An older one stops. The converters of ollama and mlx-lm "
            "take the positions of a plain model, without a warning."
        )
    elif plan.rotaries:
        differences.append(
            f"The oldest reader is transformers {LEAST}, by `rope_theta` and `rope_scaling`; version 5 reads "
            "the same from `rope_parameters`."
        )
        kind = older.get("rope_scaling", {}).get("rope_type", "default")
        if kind not in OLLAMA:
            differences.append(
                f"ollama's converter (017eb8ae4) ignores `{kind}` for Llama, without a warning. Export for llama.cpp: "
                "ollama imports the GGUF file."
            )
        if kind == "longrope":
            differences.append(
                "mlx-lm (060aa4349) takes the long factors alone, and ignores `attention_factor` of `longrope`."
            )
    if any(entry.short_inv_freq is not None for entry in plan.rotaries):
        differences.append(
            "The two factor lists of LongRoPE change over at the trained length, by the longest row of a batch; keys "
            "that are in the cache when a generation passes it keep the short ones."
        )
    return Serving("transformers", f"transformers {transformers_version}", plan, differences=tuple(differences))


MROPE_TYPES = ("default", "yarn")
"""Rope types under which vLLM and SGLang keep positions of several axes (Qwen-VL)."""

Adapt = Callable[[RotaryPlan, dict[str, Any], list[str]], None]
"""Function of one server that changes the parameters of a set of frequencies, and adds differences."""


def _serve(
    server: Serving, length_flag: str, override_flag: str, config: PreTrainedConfig, obstacle: str | None, adapt: Adapt
) -> Serving:
    """Complete the instructions of a server, which has its command without the length.

    The flag that overrides `config.json` takes JSON, at the top level or in its text part.
    """
    plan, part = server.plan, text_path(config)
    entries, differences = _config_entries(server.server, config, plan, obstacle, adapt)
    length = (length_flag, str(plan.target_length))
    changed = {"max_position_embeddings": plan.target_length, **entries}
    flag = json.dumps({part: changed} if part else changed, separators=(",", ":"))
    return replace(
        server,
        commands=((*server.commands[0], *length),),
        text=entries,
        override=(override_flag, flag, *length) if plan.rotaries else (),
        differences=tuple(differences),
    )


def _config_entries(
    server: str, config: PreTrainedConfig, plan: ExtensionPlan, obstacle: str | None, adapt: Adapt
) -> tuple[dict[str, Any], list[str]]:
    """Return the entries of the text config that differ from those for transformers, and sentences on differences."""
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
                "`attention_factor` of a `longrope` config is ignored: `short_mscale` and `long_mscale` contain it.",
                "`longrope` is refused for models that rotate neighbouring channels (GLM, Cohere, ERNIE 4.5).",
            ]
        if kind == "linear" and "gemma3" not in text.model_type:
            limit = round(plan.target_length / parameters["factor"])
            limit += limit * parameters["factor"] < plan.target_length  # it has to reach the target
            entries["max_position_embeddings"] = limit
            differences.append(
                "The limit in a `linear` config is multiplied by its factor. It is therefore the original "
                f"{limit} here, and {plan.target_length} in a checkpoint for transformers."
            )
        adapt(entry, parameters, differences)
    if rope:
        entries["rope_parameters"] = rope.get("", {**text.rope_parameters, **rope})
    return entries, differences


def serve_vllm(config: PreTrainedConfig, plan: ExtensionPlan, obstacle: str | None) -> Serving:
    """Return the instructions for vLLM."""

    def adapt(entry: RotaryPlan, parameters: dict[str, Any], differences: list[str]) -> None:
        if parameters.get("partial_rotary_factor") == 0:
            raise refuse("vLLM", plan, "it refuses a partial_rotary_factor of 0")
        if parameters["rope_type"] == "longrope":
            differences.append(
                "Without `--max-model-len`, a `longrope` model is served at its trained length: keep the flag."
            )
        if entry.short_inv_freq is not None:
            differences.append(
                "The long factor list is used for every input, short ones too, as soon as `--max-model-len` is above "
                f"{plan.trained_length}; transformers uses the short list up to there."
            )

    vllm = Serving("vLLM", "vLLM 0.33.0 (4ba787ec9)", plan, (("vllm", "serve", DIRECTORY),))
    return _serve(vllm, "--max-model-len", "--hf-overrides", config, obstacle, adapt)


def serve_sglang(config: PreTrainedConfig, plan: ExtensionPlan, obstacle: str | None) -> Serving:
    """Return the instructions for SGLang."""

    def adapt(entry: RotaryPlan, parameters: dict[str, Any], differences: list[str]) -> None:
        kind = parameters["rope_type"]
        if entry.name and kind != "default":
            reason = f"of rope_parameters that are nested by layer type it reads the base alone, not {kind!r}"
            raise refuse("SGLang", plan, reason, "ntk and theta, which change the base, can be exported")
        if kind == "proportional":
            raise refuse("SGLang", plan, "it does not look at the partial_rotary_factor of rope type 'proportional'")
        if kind == "yarn":
            mscale = 0.1 * math.log(parameters["factor"]) + 1.0
            if not math.isclose(entry.attention_factor, mscale, rel_tol=1e-6):
                parameters["attn_factor"] = entry.attention_factor / mscale
            correction = (
                "times `attn_factor`, which makes up for it here" if "attn_factor" in parameters else "as here"
            )
            differences.append(
                "`attention_factor` of a `yarn` config is ignored: cosine and sine are multiplied by "
                f"`0.1 ln(factor) + 1`, {correction}."
            )
        if entry.short_inv_freq is not None:
            differences.append(
                "The long factor list is used for all requests of a batch once one of them has a position above "
                f"{plan.trained_length}, and cached keys keep the list that they were made with: what a request gets "
                "depends on the others."
            )

    sglang = Serving("SGLang", "SGLang 0.5.23", plan, (("sglang", "serve", "--model-path", DIRECTORY),))
    return _serve(sglang, "--context-length", "--json-model-override-args", config, obstacle, adapt)


def serve_llama_cpp(config: PreTrainedConfig, plan: ExtensionPlan, obstacle: str | None) -> Serving:
    """Return the instructions for llama.cpp."""
    if plan.rotates_late or not all(isinstance(edit, RotaryPlan | TablePlan) for edit in plan.edits):
        instead = "a plan that only changes frequencies can be exported"
        if plan.method.startswith("self-extend"):
            instead += (
                "; its own form of self-extend (--grp-attn-n, --grp-attn-w) is in llama-completion, not in the server"
            )
        raise refuse(SERVER, plan, obstacle or "it has no key for this", instead)
    rope = rope_keys(plan)
    differences = [
        "The server cuts every slot at the context length of the file, which is the target length here.",
    ]
    if "rope.scaling.attn_factor" in rope.keys and rope.keys.get("rope.scaling.type") == "yarn":
        differences.append(
            "`attention_factor`: YaRN multiplies by `0.1 ln(factor) + 1`, whatever `yarn_attn_factor` and "
            "`--yarn-attn-factor` are; the key `rope.scaling.attn_factor` makes up for it."
        )
    if rope.tensors:
        differences.append(
            "Frequencies that no key expresses are in a tensor of divisors. These architectures load it: "
            f"{', '.join(rope.architectures)}. Others refuse the file."
        )
        differences.append(
            "The converter alone does not write that tensor: a file without the second step has the positions of the "
            "base model, without a warning."
        )
    if len(rope.tensors) > 1:
        differences.append(
            f"Which of the two lists is used is decided by `-c` when the server starts: above {plan.trained_length} "
            "the long one, for short inputs too."
        )
    if rope.flags:
        differences.append("YaRN's bounds are not in the file: without the flags it uses 32 and 1.")
    file = "converted.gguf"
    convert = ("python", "convert_hf_to_gguf.py", DIRECTORY, "--outfile", file, "--outtype", "auto")
    commands: list[tuple[str, ...]] = [convert]
    if not rope.by_converter:
        file = "model.gguf"
        commands.append(("hf-posext", "gguf", DIRECTORY, "converted.gguf", "model.gguf"))
    commands.append(("llama-server", "-m", file, "-c", str(plan.target_length), *rope.flags))
    text = _entries_for_converter(config, plan, rope)
    return Serving(SERVER, READ_FROM, plan, tuple(commands), text, differences=tuple(differences))


def _entries_for_converter(config: PreTrainedConfig, plan: ExtensionPlan, rope: RopeKeys) -> dict[str, Any]:
    """Return config entries for the converter: the plain base if it would write a rope type without its numbers."""
    text: Any = text_config(config)
    if text.model_type == "gpt2":
        return {"n_ctx": plan.target_length}  # the only entry from which it reads the length of GPT-2's table
    if rope.by_converter:
        return {}
    entry = plan.rotaries[0]
    plain = {"rope_type": "default", "rope_theta": plan.scheme.rotary(entry.name).theta}
    return {"rope_parameters": {**text.rope_parameters, entry.name: plain} if entry.name else plain}


REFUSED = (
    "use_dora modules_to_save lora_bias layer_replication use_qalora use_bdlora alora_invocation_tokens "
    "trainable_token_indices"
).split()
"""Entries of `adapter_config.json` that vLLM refuses (`lora/peft_helper.py`), and SGLang refuses or ignores."""

IGNORED = {"vLLM": (), "SGLang": ("rank_pattern", "alpha_pattern", "use_rslora")}
"""Entries that each server ignores.

SGLang scales every layer by `lora_alpha / r` (`srt/lora/{lora,lora_config}.py`).
"""

MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations of PEFT that write into the base weights. The adapter then depends on the changed weights."""


def serving_obstacle(config: Mapping[str, Any], server: str) -> str | None:
    """Return the reason that a server does not load an adapter, by its config, beside its base; `None` if it does."""
    if config.get("peft_type") != "LORA":
        return f"an adapter of type {config.get('peft_type')}"
    names = [name for name in (*REFUSED, *IGNORED[server]) if config.get(name)]
    if config.get("bias", "none") != "none":
        names.append("bias")
    if str(config.get("init_lora_weights", "")).lower().startswith(MUTATING):
        names.append("init_lora_weights")
    return ", ".join(names) or None


SERVERS = {
    "transformers": serve_transformers,
    "transformers-4": serve_transformers_4,
    "vllm": serve_vllm,
    "sglang": serve_sglang,
    "llama.cpp": serve_llama_cpp,
}
INSTRUCTIONS = "SERVING.md"


def export_checkpoint(
    model: nn.Module,
    directory: str | Path,
    to: str = "transformers",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    merged: Mapping[str, Any] | None = None,
) -> Serving:
    """Save a patched model in the form that makes a server compute the positions of its plan.

    The directory contains weights, config and tokenizer in the form that the server reads, the plan, and `SERVING.md`
    with the commands and the differences of the server. A plan that the server cannot run is refused before anything
    is written.

    Args:
        model (`PreTrainedModel`): model with a patch in force, and without an adapter.
        directory (`str` or `Path`): a directory that is empty or does not exist yet.
        to (`str`, *optional*, defaults to `"transformers"`): `"transformers"`, `"transformers-4"` (which refuses plans
            that version 4 would not compute), `"vllm"`, `"sglang"` or `"llama.cpp"`.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): tokenizer to save with the model, with its limit raised.
            Defaults to the one given to [`patch_model`].
        merged (`Mapping`, *optional*): config of the adapter that was merged into the model. `SERVING.md` then reports
            whether the server loads the adapter beside its base.

    Returns:
        [`Serving`]: commands, changed config entries, differences.

    Raises:
        ExportError: the server cannot compute the positions. The message contains the reason and an alternative.
        NotPatchedError: the model has no patch.
        UnsupportedModelError: the model has an adapter. Merge it first.
        InvalidParameterError: the server is unknown.
        FileExistsError: the directory holds files.
    """
    if to not in SERVERS:
        raise InvalidParameterError(f"Expected a server, got {to!r}. Pass one of {', '.join(SERVERS)}.")
    patch = find_patch(model)
    if patch is None:
        raise NotPatchedError(
            "Expected a patched model, got one without a patch. Patch it by patch_model, or open one by load_patched."
        )
    refuse_adapter(patch.model)
    serving = SERVERS[to](patch.model.config, patch.plan, patch.native_obstacle)
    path = new_directory(directory)
    patch.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    part = text_path(patch.model.config)
    with edited(path / "config.json") as config:
        text = config[part] if part else config
        if "rope_parameters" in serving.text:  # the entries for transformers 4 would take precedence, and differ
            text.pop("rope_scaling", None)
            text.pop("rope_theta", None)
            if serving.server == SERVER:  # `hf-posext gguf` adds the plan to the file after conversion
                stop_readers(config, part)
            else:
                stop_4(config)
        text.update(serving.text)
    if (path / "tokenizer_config.json").is_file():  # not raised if it was not given when the model was patched
        with edited(path / "tokenizer_config.json") as config:
            if "model_max_length" in config:
                config["model_max_length"] = max(config["model_max_length"], patch.plan.target_length)
    instructions = render(
        "serving.md.jinja",
        "hf_posext.export",
        {"shell": shlex.join},
        serving=serving,
        commands=serving.command_lines(path.name),
        merged=merged is not None,
        obstacle=serving_obstacle(merged, serving.server) if merged and serving.server in IGNORED else None,
        beside=serving.server in IGNORED,
    )
    (path / INSTRUCTIONS).write_text(instructions, encoding="utf-8")
    return serving
