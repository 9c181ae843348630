"""Asks PEFT which weights an adapter has on a model, and compares them with those in a directory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError
from ..patching.mixin import plain_class
from ..patching.ownership import MARK
from .directory import CONFIG_FILE, AdapterDirectory

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedModel

Shapes = dict[str, tuple[int, ...]]

BUILDING = (ValueError, KeyError, TypeError, AttributeError, RuntimeError, NotImplementedError, ImportError)
"""Errors that PEFT raises if a config does not fit a model. PEFT has no error of its own for that."""

_PREFIX = "base_model.model."


def peft_config(adapter: AdapterDirectory) -> PeftConfig:
    """The config of an adapter, as PEFT has it.

    Raises:
        CheckpointError: this version of PEFT has no adapters of this type, or does not take the entries.
    """
    from peft import PeftConfig

    try:
        return PeftConfig.from_peft_type(**adapter.config)
    except BUILDING as error:
        raise CheckpointError(
            f"{adapter.path / CONFIG_FILE} is of no adapter that this version of PEFT knows: {error}"
        ) from error


def misfit(adapter: AdapterDirectory, model: PreTrainedModel) -> str | None:
    """Return the mismatch between the weights of an adapter and a model; `None` if there is none.

    Args:
        adapter (`AdapterDirectory`): whose weights are compared.
        model (`PreTrainedModel`): the base, patched, without an adapter; nothing is changed on it.

    Raises:
        CheckpointError: the adapter lacks weights of its own config.
    """
    config = peft_config(adapter)
    try:
        with unchanged(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = _build(model, config)
            trained, all_saved = _shapes(built, False), _shapes(built, True)
    except BUILDING as error:
        return f"PEFT cannot put it on a {type(model).__name__}: {error}"
    missing = sorted(trained.keys() - adapter.shapes.keys())
    if missing:
        raise CheckpointError(
            f"{adapter.path} lacks {len(missing)} weights of its own config, {missing[0]} among them; save the "
            "adapter again by save_adapter(model, path)"
        )
    for key, shape in adapter.shapes.items():
        place = trained.get(key, all_saved.get(key))
        name = key.removeprefix(_PREFIX)
        if place is None:
            return f"it has no place for {name}"
        if place != shape:
            return f"its {name} has shape {place}, the adapter's {shape}"
    return None


def trained_shapes(model: nn.Module, name: str = "default") -> Shapes:
    """Shapes of the weights that PEFT saves of an adapter, by the names that they have in a file."""
    return _shapes(model, False, name)


def _build(model: PreTrainedModel, config: PeftConfig) -> Any:
    """An adapter on a model, its weights on the meta device."""
    from peft import get_peft_model

    config = copy.deepcopy(config)
    if isinstance(getattr(config, "init_lora_weights", None), str):
        config.init_lora_weights = True  # PiSSA and others would write into the weights of the base
    return get_peft_model(model, config, low_cpu_mem_usage=True)


def _shapes(model: Any, embeddings: bool, name: str = "default") -> Shapes:
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=embeddings)
    return {key: tuple(weight.shape) for key, weight in weights.items()}


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Whatever PEFT puts into a model meanwhile, afterwards it has its own modules, flags and attributes."""
    modules = [(module, dict(module._modules)) for module in model.modules()]
    flags = [(weight, weight.requires_grad) for weight in model.parameters()]
    attributes = set(vars(model))
    patch = vars(model).pop(MARK, None)  # what is tried is not an adapter of the patch
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for module, children in modules:
                module._modules.clear()
                module._modules.update(children)
            for weight, trained in flags:
                weight.requires_grad_(trained)
            for name in vars(model).keys() - attributes:
                delattr(model, name)
            if patch is not None:
                setattr(model, MARK, patch)


def blank_twin(model: PreTrainedModel) -> PreTrainedModel:
    """The modules of a model without numbers, on the meta device, and without what a patch added to them."""
    config = plain_class(model.config).from_dict(model.config.to_dict())  # type: ignore[attr-defined]
    with torch.device("meta"):
        twin: PreTrainedModel = type(model)(config)
    return twin
