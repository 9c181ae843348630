"""Writes an adapter with the positions that it was trained with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import CheckpointError, NotPatchedError, PlanMismatchError, UnsupportedModelError
from ..packages import require
from ..patching import Patch, find_patch, unwrap
from ..patching.carrying import carry_in_adapters
from ..patching.checkpoint import new_directory
from ..patching.fingerprint import BaseModel
from .directory import CARD_FILE, CONFIG_FILE, OUR_KEYS, AdapterDirectory
from .instructions import adapter_readme
from .match import computes
from .weights import blank_twin, misfit


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    adapter_name: str | None = None,
    base_model: str | None = None,
    tokenizer: Any | None = None,
) -> Path:
    """Save the adapter of a patched model, with all that opens it again.

    The directory gets what a `PeftModel` needs (`adapter_config.json`, `adapter_model.safetensors`), the plan
    (`posext_plan.json`), some numbers of the base by which another is told from it (`posext_base.json`), the config of
    the patched base (`config.json`), and a `README.md` that says how to open it with and without this package.

    Plain PEFT knows nothing of plans: on a base without the patch it would open the adapter and answer wrongly. So
    `adapter_config.json` has a `peft_type` that it refuses, by a message that names the plan. Where a checkpoint has
    the plan's positions by its config alone (`patch.save_pretrained` wrote it), name it as `base_model`: then plain
    PEFT and transformers open the adapter, with equal logits.

    What PEFT could not build again from the directory is refused now, and not when it is opened.

    Args:
        model (`PeftModel` or `PreTrainedModel`): with an adapter, on a base that carries a patch; made by
            `get_peft_model` or by `model.add_adapter`.
        directory (`str` or `Path`): must not exist yet, or be empty.
        adapter_name (`str`, *optional*): which adapter, where there are several. By default the only one, or the one
            that is active.
        base_model (`str`, *optional*): folder or Hub id of a checkpoint whose config says the plan's positions.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): saved beside the adapter; by default the one that
            [`patch_model`] was given.

    Returns:
        `Path`: the directory.

    Raises:
        NotPatchedError: the model carries no patch; plain PEFT saves its adapter.
        UnsupportedModelError: the model has no such adapter, or one that PEFT cannot build again from what it saves.
        PlanMismatchError: the config of `base_model` does not say the plan's positions.
        FileExistsError: the directory holds files.
    """
    require("train")
    from transformers import AutoConfig

    name = _name(model, adapter_name)
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
    tell_adapters(model, patch)
    _save(model, name, path)
    patch.plan.save(path)
    BaseModel.of(model).save(path)
    if base_model is not None:
        _name_base(path / CONFIG_FILE, base_model)
    else:
        patch.model.config.save_pretrained(path)
    try:
        homeless = misfit(AdapterDirectory.read(path), blank_twin(patch.model))
    except CheckpointError as error:
        homeless = str(error)
    if homeless:
        shutil.rmtree(path)
        raise UnsupportedModelError(
            f"PEFT does not build the adapter {name!r} again from what it saves of it: {homeless}; merge it into the "
            "weights, model.merge_and_unload(), and save the model"
        )
    tokenizer = tokenizer or patch.tokenizer
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    (path / CARD_FILE).write_text(adapter_readme(path), encoding="utf-8")
    return path


def tell_adapters(model: nn.Module, patch: Patch) -> None:
    """Let the adapters of a patched model be written with its plan, those of prompt learning too."""
    configs = getattr(model, "peft_config", None)
    if not patch.plan.changes_nothing:
        carry_in_adapters(patch.model, patch._state, configs)
        patch._state.knows_prompts = True


def _name(model: nn.Module, name: str | None) -> str:
    """The adapter to save."""
    names = list(getattr(model, "peft_config", None) or ())
    if not names:
        raise UnsupportedModelError(
            f"{type(unwrap(model)).__name__} has no adapter; patch.save_pretrained(directory) saves a patched model"
        )
    active: Any = getattr(model, "active_adapters", [])
    active = active() if callable(active) else active
    only = names if len(names) == 1 else active if len(active) == 1 else [""]
    chosen = str(only[0]) if name is None else name
    if chosen not in names:
        given = "several are active" if name is None else f"adapter_name is {name!r}"
        raise UnsupportedModelError(f"{given}; the model has the adapters {', '.join(names)}: give adapter_name")
    return chosen


def _save(model: Any, name: str, path: Path) -> None:
    """One adapter into a directory, by PEFT or by transformers."""
    from peft import PeftModel

    if isinstance(model, PeftModel):
        model.save_pretrained(path, selected_adapters=[name])
        if name != "default":  # PEFT makes a folder for it
            for file in (path / name).iterdir():
                file.replace(path / file.name)
            (path / name).rmdir()
        return
    model, active = unwrap(model), unwrap(model).active_adapters()
    model.set_adapter(name)
    try:
        model.save_pretrained(path)
    finally:
        model.set_adapter(active)


def _name_base(path: Path, base_model: str) -> None:
    """Leave the adapter as any other one, on a base that has the positions by its config."""
    config = json.loads(path.read_text(encoding="utf-8"))
    entries = {key: value for key, value in config.items() if key not in OUR_KEYS}
    entries |= {**config["posext_replaced"], "base_model_name_or_path": base_model}
    path.write_text(json.dumps(entries, indent=2, sort_keys=True), encoding="utf-8")
