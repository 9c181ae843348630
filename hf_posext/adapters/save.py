"""Saving of an adapter with its plan: files, README, and upload to the Hub."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import CheckpointError, NotPatchedError, PlanMismatchError, UnsupportedModelError
from ..export.servers import IGNORED, serving_obstacle
from ..markdown import inline, render
from ..packages import require
from ..patching import Patch, find_patch, unwrap
from ..patching.checkpoint import new_directory, upload
from ..patching.fingerprint import BaseModel
from ..patching.saved_config import REPLACED_KEY, carry_in_adapters, open_patched_config
from ..patching.untrusted import read_json
from ..plan import ExtensionPlan
from .directory import CARD_FILE, CONFIG_FILE, FILES, OUR_KEYS, AdapterDirectory, blank_twin, computes, misfit


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    adapter_name: str | None = None,
    base_model: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Save the adapter of a patched model with everything needed to open it again.

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
            f"the config of {base_model} does not say the positions of ({patch.plan.describe()}). Name a checkpoint "
            "that patch.save_pretrained wrote under this plan, or leave base_model out."
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
            f"PEFT does not build the adapter {name!r} again from what it saves of it: {homeless}. Merge it into the "
            "weights, model.merge_and_unload(), and save the model."
        )
    tokenizer = tokenizer or patch.tokenizer
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    (path / CARD_FILE).write_text(adapter_readme(path), encoding="utf-8")
    return path


def tell_adapters(model: nn.Module, patch: Patch) -> None:
    """Let all adapters of a patched model, prompt learning included, be written with its plan."""
    configs = getattr(model, "peft_config", None)
    if not patch.plan.changes_nothing:
        carry_in_adapters(patch.model, patch._state, configs)
        patch._state.knows_prompts = True


def _name(model: nn.Module, name: str | None) -> str:
    """Return the name of the adapter to save."""
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
    """Save one adapter into a directory, by PEFT or by transformers."""
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
    """Make the adapter a plain one on a base whose config contains the positions."""
    config = json.loads(path.read_text(encoding="utf-8"))
    entries = {key: value for key, value in config.items() if key not in OUR_KEYS}
    entries |= {**config["posext_replaced"], "base_model_name_or_path": base_model}
    path.write_text(json.dumps(entries, indent=2, sort_keys=True), encoding="utf-8")


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that `--max-lora-rank` of vLLM takes."""


def how_to_open(directory: Path) -> str:
    """Return the section of a card on opening an adapter or checkpoint, with this package and without it.

    Args:
        directory (`Path`): of the adapter or checkpoint.
    """
    adapter = AdapterDirectory.read(directory) if (directory / CONFIG_FILE).is_file() else None
    plan = ExtensionPlan.load(directory)
    return render(
        "how_to_open.md.jinja",
        "hf_posext.adapters",
        plan=plan,
        adapter=adapter is not None,
        base=public_name(adapter.base_name) if adapter else "",
        by_base=adapter is not None and REPLACED_KEY not in read_json(directory / CONFIG_FILE),
        by_config=_in_config(directory, plan),
        obstacles={name: serving_obstacle(adapter.config, name) for name in IGNORED} if adapter else {},
        commands={name: shlex.join(words) for name, words in serving_commands(adapter).items()} if adapter else {},
    )


def serving_commands(adapter: AdapterDirectory) -> dict[str, list[str]]:
    """Return the commands by which servers load an adapter beside a base whose config says the positions."""
    base, length = public_name(adapter.base_name), str(adapter.plan.target_length)
    most = max([adapter.config.get("r", 0), *(adapter.config.get("rank_pattern") or {}).values()])
    rank = next((str(rank) for rank in VLLM_RANKS if rank >= most), "")
    vllm = ["vllm", "serve", base, "--max-model-len", length, "--enable-lora", "--max-lora-rank", rank]
    sglang = ["sglang", "serve", "--model-path", base, "--context-length", length, "--enable-lora"]
    return {
        "vLLM": [*vllm, "--lora-modules", "adapter=PATH"],
        "SGLang": [*sglang, "--lora-paths", "adapter=PATH"],
    }


def _in_config(directory: Path, plan: ExtensionPlan) -> bool:
    """Return whether the config in a directory says the positions."""
    if not (directory / "config.json").is_file():
        return False
    try:
        return computes(open_patched_config(directory), plan)
    except ValueError:  # a config with code of its own, which a card does not run
        return False


def card_data(adapter: AdapterDirectory) -> ModelCardData:
    """Return the Hub metadata of an adapter."""
    name = adapter.base_name
    on_hub = name is not None and name.count("/") == 1 and not Path(name).exists() and not name.startswith(".")
    return ModelCardData(
        library_name="peft",
        base_model=name if on_hub else None,
        tags=tags(adapter.plan),
        pipeline_tag="text-generation" if adapter.config.get("task_type") == "CAUSAL_LM" else None,
    )


def tags(plan: ExtensionPlan) -> list[str]:
    """Return the Hub tags of a plan: the package, its purpose, and the method names."""
    methods = (str(entry.get("name", plan.method)) for entry in plan.parameters)
    return ["hf_posext", "long-context", "position-encoding", *dict.fromkeys(methods)]


def adapter_readme(directory: Path) -> str:
    """Return the README of an adapter without measured results."""
    adapter = AdapterDirectory.read(directory)
    title = f"# Adapter for {inline(public_name(adapter.base_name))} under {inline(adapter.plan.method)}\n\n"
    text = f"---\n{card_data(adapter).to_yaml()}\n---\n\n{title}{how_to_open(directory)}"
    return str(ModelCard(text))


def public_name(name: str | None) -> str:
    """Return the public name of a base model, without local paths."""
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

    The files that [`save_adapter`], [`ExtensionPlan.save`] and [`~hf_posext.reporting.write_model_card`] write are
    uploaded in one commit, and no others. An adapter is read first, as it is when it is opened.

    Args:
        directory (`str` or `Path`): that holds them.
        repo_id (`str`): `user/name`; the repository is made if it does not exist.
        private (`bool`, *optional*): whether a new repository is private; by default as the organisation has it.
        revision (`str`, *optional*): branch to commit to.
        commit_message (`str`, *optional*): by default it names the plan.
        token (`str` or `bool`, *optional*): by default the one of `hf auth login`.

    Returns:
        `str`: URL of the commit.

    Raises:
        CheckpointError: an adapter that is incomplete or corrupt.
        PlanError: the directory holds no plan, or a corrupt one.
    """
    path = Path(directory)
    if (path / CONFIG_FILE).exists():
        adapter = AdapterDirectory.read(path)
        plan = adapter.plan
        if adapter.base_name is None or Path(adapter.base_name).is_absolute():
            logger.warning(
                "%s names %s as its base model, which others do not have; they will have to give it: "
                "load_adapter(%r, base=model)",
                path,
                adapter.base_name,
                repo_id,
            )
    else:
        plan = ExtensionPlan.load(path)
    return upload(
        path,
        repo_id,
        plan,
        files=FILES,
        private=private,
        revision=revision,
        commit_message=commit_message,
        token=token,
    )
