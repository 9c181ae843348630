"""Writes an adapter with the positions that it was trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import NotPatchedError, PlanMismatchError, UnsupportedModelError
from ..packages import require
from ..patching import find_patch
from ..patching.checkpoint import new_directory
from .directory import CARD_FILE, CONFIG_FILE, NOTICE
from .fingerprint import BaseModel
from .instructions import adapter_readme
from .match import computes


def save_adapter(
    model: nn.Module, directory: str | Path, *, base_model: str | None = None, tokenizer: Any | None = None
) -> Path:
    """Save the adapter of a patched model, with all that opens it again.

    The directory gets what a `PeftModel` needs (`adapter_config.json`, `adapter_model.safetensors`), the plan
    (`posext_plan.json`), some numbers of the base by which another is told from it (`posext_base.json`), the config of
    the patched base (`config.json`), and a `README.md` that says how to open it with and without this package.

    Plain PEFT knows nothing of plans: on a base without the patch it would open the adapter and answer wrongly.
    `adapter_config.json` has a key that it does not know, of which it warns by name, and transformers refuses the
    directory, since its `config.json` makes it a model whose weights are missing. Where a checkpoint exists that has
    the plan's positions by its config alone (`patch.save_pretrained`), name it as `base_model`: then the adapter needs
    neither, and opens with plain PEFT and transformers.

    Args:
        model (`PeftModel`): with one adapter, on a base that carries a patch.
        directory (`str` or `Path`): must not exist yet, or be empty.
        base_model (`str`, *optional*): folder or Hub id of a checkpoint whose config says the plan's positions.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): saved beside the adapter; by default the one that
            [`patch_model`] was given.

    Returns:
        `Path`: the directory.

    Raises:
        NotPatchedError: the model carries no patch; plain PEFT saves its adapter.
        UnsupportedModelError: no `PeftModel`, or one with several adapters.
        PlanMismatchError: the config of `base_model` does not say the plan's positions.
        FileExistsError: the directory holds files.
    """
    require("train")
    from peft import PeftModel
    from transformers import AutoConfig

    if not isinstance(model, PeftModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no adapter; patch.save_pretrained(directory) saves a patched model"
        )
    if list(model.peft_config) != ["default"]:
        raise UnsupportedModelError(
            f"the model has the adapters {', '.join(model.peft_config)}; save_adapter saves one of the name 'default'"
        )
    patch = find_patch(model)
    if patch is None:
        raise NotPatchedError(
            "the model carries no patch; patch_model(model, ...) makes one, model.save_pretrained(...) saves without"
        )
    if base_model is not None and not computes(
        AutoConfig.from_pretrained(base_model, trust_remote_code=False), patch.plan
    ):
        raise PlanMismatchError(
            f"the config of {base_model} does not say the positions of ({patch.plan.describe()}); name a checkpoint "
            "that patch.save_pretrained wrote under this plan, or leave base_model out"
        )
    path = new_directory(directory)
    model.save_pretrained(path)
    patch.plan.save(path)
    BaseModel.of(model).save(path)
    _edit_config(path / CONFIG_FILE, base_model)
    if base_model is None:
        patch.model.config.save_pretrained(path)
    tokenizer = tokenizer or patch.tokenizer
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    (path / CARD_FILE).write_text(adapter_readme(path), encoding="utf-8")
    return path


def _edit_config(path: Path, base_model: str | None) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    change = {NOTICE: True} if base_model is None else {"base_model_name_or_path": base_model}
    path.write_text(json.dumps(config | change, indent=2, sort_keys=True), encoding="utf-8")
