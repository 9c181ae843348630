"""Carries a patched model through a directory: safetensors and JSON, no pickle, no code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel

from ..errors import PlanMismatchError, UnsupportedModelError
from ..plan import ExtensionPlan
from .detect import text_config


def save_patched(model: PreTrainedModel, plan: ExtensionPlan, tokenizer: Any | None, directory: str | Path) -> None:
    """Weights, config, plan and tokenizer into a new directory.

    Raises:
        FileExistsError: the directory holds files.
    """
    path = Path(directory)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty directory; choose another, or remove it first")
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    plan.save(path)


def load_patched(directory: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Open what `patch.save_pretrained` saved, with the patch in force, so that it can be described and undone.

    Args:
        directory (`str` or `Path`): the saved directory.
        kwargs: passed to `from_pretrained` (`dtype`, `device_map`, ...).

    Returns:
        [`PreTrainedModel`]: patched; `unpatch_model` gives the model as it was before it was patched.

    Raises:
        PlanError: no plan there, or a corrupt one.
        PlanMismatchError: the plan does not fit the weights beside it.
    """
    from .patch import patch_model

    plan = ExtensionPlan.load(directory)
    config = AutoConfig.from_pretrained(directory)
    name = (config.architectures or [""])[0]
    cls = getattr(transformers, name, None)
    if cls is None or not issubclass(cls, PreTrainedModel):
        raise UnsupportedModelError(f"{directory} is of architecture {name!r}, which transformers does not have")
    if config.model_type != plan.scheme.model_type and text_config(config).model_type != plan.scheme.model_type:
        raise PlanMismatchError(
            f"the plan in {directory} is for {plan.scheme.model_type}, the weights are {config.model_type}; "
            "put back the plan that was saved with them"
        )
    _restore_shipped(text_config(config), plan)
    model: PreTrainedModel = cls.from_pretrained(directory, config=config, use_safetensors=True, **kwargs)
    patch_model(model, plan)
    return model


def _restore_shipped(config: Any, plan: ExtensionPlan) -> None:
    """The positions of a config as they were before the model was patched, so that the plan can be applied anew."""
    for entry in plan.rotaries:
        shipped = dict(plan.scheme.rotary(entry.name).shipped)
        config.rope_parameters = {**config.rope_parameters, entry.name: shipped} if entry.name else shipped
    if plan.rotaries and plan.scheme.shipped_length is not None:
        config.max_position_embeddings = plan.scheme.shipped_length
