"""Saving of adapters with the positions they were trained with: files, README, and upload to the Hub."""

from __future__ import annotations

import copy
import logging
import shlex
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import CheckpointError, NotPatchedError, PlanMismatchError, UnsupportedModelError
from ..escaping import inline, render
from ..export.servers import IGNORED, serving_obstacle
from ..packages import require
from ..patching import find_patch, unwrap
from ..patching.checkpoint import new_directory, upload
from ..patching.saved_config import REPLACED_KEY, BaseModel, edited, open_patched_config, restored, tell_adapters
from ..patching.undo import plain_class
from ..patching.untrusted import read_json
from ..plan import ExtensionPlan
from .load import CARD_FILE, CONFIG_FILE, FILES, OUR_KEYS, AdapterDirectory, computes, misfit


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    adapter_name: str | None = None,
    base_model: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Save the adapter of a patched model, with everything needed to load it again.

    The directory contains the files of a `PeftModel` (`adapter_config.json`, `adapter_model.safetensors`), the plan
    (`posext_plan.json`), numbers that identify the base (`posext_base.json`), the config of the patched base
    (`config.json`, unless `base_model` is given), and a `README.md` with instructions for loading the adapter with and
    without this package.

    Plain PEFT does not support plans. On a base without the patch, it would load the adapter and compute wrong logits.
    Therefore, `adapter_config.json` contains a `peft_type` that PEFT refuses with a message that names the plan. If
    the config of a checkpoint alone gives the plan's positions, as `patch.save_pretrained` writes it, pass that
    checkpoint as `base_model`. Plain PEFT and transformers then load the adapter, with equal logits.

    An adapter that PEFT cannot build again from the directory is refused when it is saved, not when it is loaded.

    Args:
        model (`PeftModel` or `PreTrainedModel`): patched model with an adapter, made by `get_peft_model` or by
            `model.add_adapter`.
        directory (`str` or `Path`): a directory that is empty or does not exist yet.
        adapter_name (`str`, *optional*): adapter to save, if there are several. Defaults to the only one, or to the
            active one.
        base_model (`str`, *optional*): folder or Hub id of a checkpoint whose config gives the plan's positions.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): tokenizer to save with the adapter. Defaults to the one
            given to [`patch_model`].

    Returns:
        `Path`: the directory.

    Raises:
        NotPatchedError: the model has no patch. Plain PEFT saves its adapter.
        UnsupportedModelError: the model has no such adapter, or PEFT cannot build it again from the saved files.
        PlanMismatchError: the config of `base_model` does not give the plan's positions.
        FileExistsError: the directory holds files.
    """
    require("train")
    from transformers import AutoConfig

    name = _name(model, adapter_name)
    patch = find_patch(model)
    if patch is None:
        raise NotPatchedError(
            "Expected a patched model, got one without a patch. Patch it by patch_model(model, ...), or save the "
            "adapter by model.save_pretrained(...)."
        )
    if base_model is not None and not computes(
        AutoConfig.from_pretrained(base_model, trust_remote_code=False), patch.plan
    ):
        raise PlanMismatchError(
            f"the config of {base_model} does not say the positions of ({patch.plan.describe()}). Name a checkpoint "
            "that patch.save_pretrained wrote under this plan, or leave base_model out."
        )
    path = new_directory(directory)
    tell_adapters(model)
    _save(model, name, path)
    patch.plan.save(path)
    BaseModel.of(model).save(path)
    if base_model is not None:
        with edited(path / CONFIG_FILE) as config:  # PEFT's own again: the config of the base gives the positions
            config |= {**config[REPLACED_KEY], "base_model_name_or_path": base_model}
            for key in OUR_KEYS:
                config.pop(key, None)
    else:
        patch.model.config.save_pretrained(path)
    plain = plain_class(patch.model.config).from_dict(restored(patch.model.config.to_dict()))  # type: ignore[attr-defined]
    try:
        with torch.device("meta"):  # the same modules, without weights and without what the patch changed
            twin = type(patch.model)(plain)
        difference = misfit(AdapterDirectory.read(path), twin)
        if difference and hasattr(model, "unload"):  # a few kinds have shapes that depend on the weights of the base
            network: Any = copy.deepcopy(model)
            difference = misfit(AdapterDirectory.read(path), unwrap(network.unload()))
    except CheckpointError as error:
        difference = str(error)
    if difference:
        shutil.rmtree(path)
        raise UnsupportedModelError(
            f"PEFT does not build the adapter {name!r} again from what it saves of it: {difference}. Merge it into "
            "the weights, model.merge_and_unload(), and save the model."
        )
    tokenizer = tokenizer or patch.tokenizer
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    (path / CARD_FILE).write_text(adapter_readme(path), encoding="utf-8")
    return path


def _name(model: nn.Module, name: str | None) -> str:
    """Return the name of the adapter to save."""
    names = list(getattr(model, "peft_config", None) or ())
    if not names:
        raise UnsupportedModelError(
            f"Expected a model with an adapter, got a {type(unwrap(model)).__name__} without one. Save a patched "
            "model by patch.save_pretrained(directory)."
        )
    active: Any = getattr(model, "active_adapters", [])
    active = active() if callable(active) else active
    only = names if len(names) == 1 else active if len(active) == 1 else [""]
    chosen = str(only[0]) if name is None else name
    if chosen not in names:
        given = "none while several are active" if name is None else repr(name)
        raise UnsupportedModelError(
            f"Expected adapter_name to be one of {', '.join(names)}, got {given}. Pass the one to save."
        )
    return chosen


def _save(model: Any, name: str, path: Path) -> None:
    """Save one adapter to a directory, with PEFT or transformers."""
    from peft import PeftModel

    if isinstance(model, PeftModel):
        model.save_pretrained(path, selected_adapters=[name])
        if name != "default":  # PEFT saves it to a subfolder
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


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that `--max-lora-rank` of vLLM accepts."""


def how_to_open(directory: Path) -> str:
    """Return the section of a card on loading an adapter, or a checkpoint, with and without this package."""
    adapter = AdapterDirectory.read(directory) if (directory / CONFIG_FILE).is_file() else None
    plan = ExtensionPlan.load(directory)
    try:
        by_config = (directory / "config.json").is_file() and computes(open_patched_config(directory), plan)
    except ValueError:  # a config with code of its own, which a card does not run
        by_config = False
    return render(
        "how_to_open.md.jinja",
        "hf_posext.adapters",
        plan=plan,
        adapter=adapter is not None,
        base=public_name(adapter.base_name) if adapter else "",
        by_base=adapter is not None and REPLACED_KEY not in read_json(directory / CONFIG_FILE),
        by_config=by_config,
        obstacles={name: serving_obstacle(adapter.config, name) for name in IGNORED} if adapter else {},
        commands={name: shlex.join(words) for name, words in serving_commands(adapter).items()} if adapter else {},
    )


def serving_commands(adapter: AdapterDirectory) -> dict[str, list[str]]:
    """Return the commands for servers to load an adapter beside a base whose config gives the positions."""
    base, length = public_name(adapter.base_name), str(adapter.plan.target_length)
    most = max([adapter.config.get("r") or 0, *(adapter.config.get("rank_pattern") or {}).values()])
    rank = next((str(rank) for rank in VLLM_RANKS if rank >= most), "")
    vllm = ["vllm", "serve", base, "--max-model-len", length, "--enable-lora", "--max-lora-rank", rank]
    sglang = ["sglang", "serve", "--model-path", base, "--context-length", length, "--enable-lora"]
    return {
        "vLLM": [*vllm, "--lora-modules", "adapter=PATH"],
        "SGLang": [*sglang, "--lora-paths", "adapter=PATH"],
    }


def card_data(adapter: AdapterDirectory) -> ModelCardData:
    """Return the metadata of an adapter for the Hub."""
    name = adapter.base_name
    on_hub = name is not None and name.count("/") == 1 and not Path(name).exists() and not name.startswith(".")
    return ModelCardData(
        library_name="peft",
        base_model=name if on_hub else None,
        tags=tags(adapter.plan),
        pipeline_tag="text-generation" if adapter.config.get("task_type") == "CAUSAL_LM" else None,
    )


def tags(plan: ExtensionPlan) -> list[str]:
    """Return the tags of a model with a plan: the package, its purpose, and the names of the methods."""
    methods = (str(entry.get("name", plan.method)) for entry in plan.parameters)
    return ["hf_posext", "long-context", "position-encoding", *dict.fromkeys(methods)]


def adapter_readme(directory: Path) -> str:
    """Return the README of an adapter without measured results."""
    adapter = AdapterDirectory.read(directory)
    title = f"# Adapter for {inline(public_name(adapter.base_name))} under {inline(adapter.plan.method)}\n\n"
    text = f"---\n{card_data(adapter).to_yaml()}\n---\n\n{title}{how_to_open(directory)}"
    return str(ModelCard(text))


def public_name(name: str | None) -> str:
    """Return the name of a base model for a card, without the path of a local folder."""
    if name is None:
        return "the base model"
    return Path(name).name if Path(name).is_absolute() else name


logger = logging.getLogger(__name__)


def push_to_hub(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Upload an adapter, or only its plan, with its card.

    Only the files that [`save_adapter`], [`ExtensionPlan.save`] and [`~hf_posext.reporting.write_model_card`] write
    are uploaded, in one commit. An adapter is checked first, as it is on loading.

    Args:
        directory (`str` or `Path`): directory of the files.
        repo_id (`str`): `user/name`. The repository is created if it does not exist.
        private (`bool`, *optional*): whether a new repository is private. Defaults to the organization's setting.
        revision (`str`, *optional*): branch to commit to.
        commit_message (`str`, *optional*): message of the commit. The default names the plan.
        token (`str` or `bool`, *optional*): token for the Hub. Defaults to that of `hf auth login`.

    Returns:
        `str`: URL of the commit.

    Raises:
        CheckpointError: the adapter is incomplete or corrupt.
        PlanError: the directory contains no plan, or a corrupt one.
    """
    path = Path(directory)
    if (path / CONFIG_FILE).exists():
        adapter = AdapterDirectory.read(path)
        plan = adapter.plan
        if adapter.base_name is None or Path(adapter.base_name).is_absolute():
            logger.warning(
                "%s names %s as its base model, which others do not have. They have to pass it: "
                "load_adapter(%r, base=model)",
                path,
                adapter.base_name,
                repo_id,
            )
    else:
        plan = ExtensionPlan.load(path)
    options = {"private": private, "revision": revision, "commit_message": commit_message, "token": token}
    return upload(path, repo_id, plan, files=FILES, **options)  # type: ignore[arg-type]
