"""Carries a patched model through a directory: safetensors and JSON, no pickle, no code.

A patch that replaces a table of positions saves the longer table as the model's weights, so that plain transformers
opens the checkpoint, or what fine-tuning made of it. The rows that it replaced cannot be computed back from the longer
table. They are saved beside the weights, in a folder of their own where nothing that reads all safetensors of a
checkpoint finds them, and put in again when the model is loaded: only then can that patch be undone, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..errors import PlanError, PlanMismatchError, UnsupportedModelError
from ..plan import ExtensionPlan
from .detect import text_config
from .learned_table import set_rows, tables_of
from .loading import check_loaded, serializable
from .sites import LENGTH_FIELDS
from .undo import UndoLog
from .untrusted import check_directory

REPLACED_FILE = "posext_replaced/tables.safetensors"


def save_patched(
    model: PreTrainedModel,
    plan: ExtensionPlan,
    tokenizer: Any | None,
    replaced: Mapping[str, torch.Tensor],
    directory: str | Path,
) -> None:
    """Weights, config, plan, tokenizer and replaced tables into a new directory.

    Raises:
        FileExistsError: the directory holds files.
    """
    path = new_directory(directory)
    with serializable(model):
        model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    plan.save(path)
    if replaced:
        (path / REPLACED_FILE).parent.mkdir()
        save_file({name: rows.detach().contiguous() for name, rows in replaced.items()}, path / REPLACED_FILE)


def new_directory(directory: str | Path) -> Path:
    """A directory that did not exist, or was empty.

    Raises:
        FileExistsError: it holds files.
    """
    path = Path(directory)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty directory; choose another, or remove it first")
    path.mkdir(parents=True, exist_ok=True)
    return path


def refuse_adapter(model: PreTrainedModel) -> None:
    """
    Raises:
        UnsupportedModelError: PEFT has put adapter layers into the model, which would be saved under their names.
    """
    if getattr(model, "peft_config", None):
        raise UnsupportedModelError(
            f"{type(model).__name__} has an adapter: save it by save_adapter(model, path), or merge it into the "
            "weights first, model.merge_and_unload()"
        )


def open_saved(directory: str | Path, **kwargs: Any) -> tuple[PreTrainedModel, ExtensionPlan, dict[str, torch.Tensor]]:
    """Open what [`save_patched`] wrote as the model was before it was patched, so that the plan can be applied anew.

    Args:
        directory (`str` or `Path`): the saved directory.
        kwargs: passed to `from_pretrained` (`dtype`, `device_map`, ...).

    Returns:
        `tuple`: the model without the patch, the plan, and the rows by path of the longer tables as they were saved.

    Raises:
        PlanError: no plan there, or a corrupt one.
        PlanMismatchError: the plan does not fit the weights beside it.
        CheckpointError: a directory that cannot be trusted.
    """
    check_directory(directory)
    plan = ExtensionPlan.load(directory)
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    cls = model_class(config, directory)
    if config.model_type != plan.scheme.model_type and text_config(config).model_type != plan.scheme.model_type:
        raise PlanMismatchError(
            f"the plan in {directory} is for {plan.scheme.model_type}, the weights are {config.model_type}; "
            "put back the plan that was saved with them"
        )
    if not (plan.table or plan.sinusoids):  # the saved rows are as many as the saved config says
        _restore_shipped(config, plan)
    kwargs = {**kwargs, "use_safetensors": True, "output_loading_info": True}
    model, loaded = cls.from_pretrained(directory, config=config, **kwargs)
    check_loaded(loaded, directory)
    return model, plan, _put_back(model, plan, Path(directory))


def model_class(config: PreTrainedConfig, name: str | Path) -> type[PreTrainedModel]:
    """The class that a config names as its architecture.

    Raises:
        UnsupportedModelError: transformers has no model of that name.
    """
    architecture = (config.architectures or [""])[0]
    cls = getattr(transformers, architecture, None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise UnsupportedModelError(f"{name} is of architecture {architecture!r}, which transformers does not have")
    return cls


def _put_back(model: PreTrainedModel, plan: ExtensionPlan, directory: Path) -> dict[str, torch.Tensor]:
    """The tables of before the patch into a model, as they were replaced; returns those that the model came with."""
    if not (plan.table or (plan.sinusoids and tables_of(model))):
        _restore_shipped(model.config, plan)
        return {}
    file = directory / REPLACED_FILE
    if not file.is_file():
        raise PlanError(
            f"{directory} lacks {REPLACED_FILE}, the table that the patch replaced, without which it cannot be "
            f"undone; put it back, or open the longer model alone: {type(model).__name__}.from_pretrained(...)"
        )
    replaced, tables = load_file(file), tables_of(model)
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


def _restore_shipped(config: PreTrainedConfig, plan: ExtensionPlan) -> None:
    """The positions of a config as they were before the model was patched, so that the plan can be applied anew."""
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
