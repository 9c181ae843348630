"""Saving and opening of a patched model: safetensors and JSON, no pickle, no code.

A patch that replaces a table of positions saves the longer table as the model's weights, so that plain transformers
opens the checkpoint, or what fine-tuning made of it. The rows that it replaced cannot be computed back from the longer
table. They are saved beside the weights, in a folder of their own where nothing that reads all safetensors of a
checkpoint finds them, and put in again when the model is loaded: only then can that patch be undone, too.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import CheckpointError, PlanError, PlanMismatchError, UnsupportedModelError, first_line
from ..plan import PLAN_FILE, PLAN_KEY, SCHEMA, ExtensionPlan
from .detect import text_config
from .loading import Source, open_weights, serializable
from .mixin import mix
from .saved_config import CarriesPlan, open_patched_config, saved_plan
from .sites import LENGTH_FIELDS
from .tables import set_rows, tables_of
from .undo import UndoLog
from .untrusted import check_directory, read_json

REPLACED_FILE = "posext_replaced/tables.safetensors"
FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "posext_replaced/*")
"""Files of a patched model that are downloaded from the Hub."""


def upload(
    directory: str | Path,
    repo_id: str,
    plan: ExtensionPlan,
    *,
    files: Sequence[str] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Upload the files of a directory to the Hub in one commit, and return its URL."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=directory,
        allow_patterns=files,
        revision=revision,
        commit_message=commit_message or f"Upload {plan.method} {plan.trained_length} -> {plan.target_length}",
    )
    return str(commit.commit_url)


def save_patched(
    model: PreTrainedModel,
    plan: ExtensionPlan,
    tokenizer: PreTrainedTokenizerBase | None,
    replaced: Mapping[str, torch.Tensor],
    directory: str | Path,
) -> None:
    """Save weights, config, plan, tokenizer, and replaced tables into a new directory."""
    path = new_directory(directory)
    with serializable(model):
        model.save_pretrained(path)
    if plan.changes_nothing:  # the config of such a patch is the model's own, for readers of one generation
        config = copy.deepcopy(model.config)
        config.__class__ = mix(CarriesPlan, type(config))
        config.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    plan.save(path)
    if replaced:
        (path / REPLACED_FILE).parent.mkdir()
        save_file({name: rows.detach().contiguous() for name, rows in replaced.items()}, path / REPLACED_FILE)


def new_directory(directory: str | Path) -> Path:
    """Create a directory, or accept an empty one. A directory that contains files raises a `FileExistsError`."""
    path = Path(directory)
    if path.exists() and (not path.is_dir() or any(file.suffix != ".lock" for file in path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty directory. Choose another, or remove it first.")
    path.mkdir(parents=True, exist_ok=True)
    return path


def refuse_adapter(model: PreTrainedModel) -> None:
    """Refuse a model with the layers of an adapter, which would be saved under their names."""
    if getattr(model, "peft_config", None):
        raise UnsupportedModelError(
            f"{type(model).__name__} has an adapter. Save it by save_adapter(model, path). To merge it into the "
            "weights, call merge_and_unload() of the PeftModel, or of load_adapter(path)"
        )


def open_saved(
    directory: str | Path, **kwargs: Any
) -> tuple[PreTrainedModel, ExtensionPlan, dict[str, torch.Tensor], bool]:
    """Open a saved patched model in its unpatched state, so that its plan can be applied again; see [`load_patched`].

    Returns:
        `tuple`: the model without the patch, the plan, the rows by path of the longer tables as they were saved, and
        whether the tables before the patch were saved, too.
    """
    directory = local_directory(directory, FILES)
    check_directory(directory)
    read_json(directory / "config.json")
    plan = ExtensionPlan.load(directory)
    trusted = bool(kwargs.pop("trust_remote_code", False))
    config = open_patched_config(directory, trust_remote_code=trusted)
    cls = model_class(config, directory, trusted)
    if config.model_type != plan.scheme.model_type and text_config(config).model_type != plan.scheme.model_type:
        raise PlanMismatchError(
            f"the plan in {directory} is for {plan.scheme.model_type}, the weights are {config.model_type}; "
            "put back the plan that was saved with them"
        )
    in_config = saved_plan(config)
    # Directories from before schema 3 contain the plan in its own file alone.
    if in_config is None and not plan.changes_nothing and read_json(directory / PLAN_FILE).get("schema") == SCHEMA:
        raise PlanMismatchError(
            f"{directory} contains {PLAN_FILE}, but the model without a patch was saved there later. Remove the file, "
            "and open the directory with from_pretrained"
        )
    if in_config not in (None, plan):
        raise PlanMismatchError(
            f"{directory} contains two plans, in {PLAN_FILE} and in config.json; put back the one that was saved with "
            "the weights"
        )
    vars(config).pop(PLAN_KEY, None)  # the model has yet to be patched
    if not (plan.table or plan.sinusoids):  # the saved rows are as many as the saved config says
        _restore_shipped(config, plan)
    model = open_weights(cls, Source(str(directory), str(directory), None, trusted), config, **kwargs)
    return model, plan, _put_back(model, plan, directory), (directory / REPLACED_FILE).is_file()


def local_directory(name: str | Path, patterns: Sequence[str]) -> Path:
    """Return a local directory. The files of a Hub id (`user/name`, `user/name@revision`) are downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    path = Path(name)
    if path.is_dir():
        return path
    repo_id, _, revision = str(name).partition("@")
    if path.is_absolute() or str(name).startswith(".") or repo_id.count("/") != 1:
        raise CheckpointError(f"no such directory: {name}. Pass the directory that was saved, or a Hub id (user/name)")
    try:
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=list(patterns)))
    except (OSError, HFValidationError) as error:
        raise CheckpointError(
            f"neither a directory nor a repository that can be read: {name} ({first_line(error)})"
        ) from error


def model_class(config: PreTrainedConfig, name: str | Path, trust_remote_code: bool = False) -> Any:
    """Return the class that a config names as its architecture, or the auto class of code that is trusted."""
    architecture = (config.architectures or [""])[0]
    cls = getattr(transformers, architecture, None)
    if trust_remote_code:
        for auto, place in (getattr(config, "auto_map", None) or {}).items():
            if str(place).endswith(f".{architecture}"):
                return getattr(transformers, auto)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise UnsupportedModelError(f"{name} is of architecture {architecture!r}, which transformers does not have")
    return cls


def _put_back(model: PreTrainedModel, plan: ExtensionPlan, directory: Path) -> dict[str, torch.Tensor]:
    """Put the replaced tables into a model, and return the tables that it had."""
    if not (plan.table or (plan.sinusoids and tables_of(model))):
        _restore_shipped(model.config, plan)
        return {}
    file, tables = directory / REPLACED_FILE, tables_of(model)
    try:
        replaced = load_file(file) if file.is_file() else _first_rows(model, plan, directory)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is corrupt or incomplete: {first_line(error)}. Copy it again.") from error
    rows = {len(table) for table in replaced.values()}
    fits = replaced.keys() == tables.keys() and all(
        table.shape[1:] == tables[path].weight.shape[1:] for path, table in replaced.items()
    )
    if not fits or len(rows) != 1:
        raise PlanMismatchError(
            f"{file} holds other tables than the weights beside it; put back the one that was saved with them"
        )
    longer: dict[str, torch.Tensor] = {path: module.weight for path, module in tables.items()}
    first = next(iter(tables.values()))
    offset = plan.scheme.table.offset if plan.scheme.table else 0
    if first.num_embeddings != plan.target_length + offset:
        raise PlanMismatchError(
            f"the plan in {directory} is for {plan.target_length} positions, the weights have a table of "
            f"{first.num_embeddings} rows; put back the plan that was saved with them"
        )
    set_rows(model, {path: table.to(longer[path]) for path, table in replaced.items()}, offset, UndoLog())
    return longer


def _first_rows(model: PreTrainedModel, plan: ExtensionPlan, directory: Path) -> dict[str, torch.Tensor]:
    """Return stand-ins for the unpatched tables, if the writer of a directory did not save them.

    Sines that transformers makes anew are those that the model had. The rows of a learned table are lost: any rows do
    until the saved ones take their place, and `Patch.undo` refuses.
    """
    tables, made_anew = tables_of(model), model._keys_to_ignore_on_save or ()
    if plan.sinusoids and not all(f"{path}.weight" in made_anew for path in tables):
        raise PlanError(
            f"{directory} lacks {REPLACED_FILE}, the table that the patch replaced, without which it cannot be "
            f"undone; put it back, or open the longer model alone: {type(model).__name__}.from_pretrained(...)"
        )
    shipped = plan.scheme.table.rows if plan.scheme.table else plan.scheme.shipped_length or plan.trained_length
    return {path: module.weight.detach()[:shipped].clone() for path, module in tables.items()}


def _restore_shipped(config: PreTrainedConfig, plan: ExtensionPlan) -> None:
    """Restore the unpatched positions of a config, so that the plan can be applied again."""
    text: Any = text_config(config)
    for entry in plan.rotaries:
        shipped = dict(plan.scheme.rotary(entry.name).shipped)
        text.rope_parameters = {**text.rope_parameters, entry.name: shipped} if entry.name else shipped
    if plan.rotaries and plan.scheme.shipped_length is not None:
        text.max_position_embeddings = plan.scheme.shipped_length
    for part in (config, text):  # the second is a copy in encoder-decoder models
        for name in LENGTH_FIELDS:
            if plan.scheme.shipped_length is not None and getattr(part, name, None) == plan.target_length:
                setattr(part, name, plan.scheme.shipped_length)
        if plan.scheme.buckets is not None and hasattr(part, "relative_attention_max_distance"):
            part.relative_attention_max_distance = plan.scheme.buckets.max_distance
