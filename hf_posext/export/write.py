"""Export of a checkpoint for one server, with its instructions and flags."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import InvalidParameterError, NotPatchedError
from ..escaping import render
from ..patching import find_patch
from ..patching.checkpoint import new_directory, refuse_adapter
from ..patching.saved_config import edited, stop_4, stop_readers, text_path
from . import llama_cpp, servers
from .servers import IGNORED, Serving, serving_obstacle

SERVERS = {
    "transformers": servers.serve_transformers,
    "transformers-4": servers.serve_transformers_4,
    "vllm": servers.serve_vllm,
    "sglang": servers.serve_sglang,
    "llama.cpp": llama_cpp.serve,
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
        raise InvalidParameterError(f"cannot export to {to!r}; there are: {', '.join(SERVERS)}")
    patch = find_patch(model)
    if patch is None:
        raise NotPatchedError("the model carries no patch; patch_model(model, ...) makes one, load_patched opens one")
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
            if serving.server == llama_cpp.SERVER:  # `hf-posext gguf` adds the plan to the file after conversion
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
