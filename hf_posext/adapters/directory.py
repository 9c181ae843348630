"""Directory of an adapter, read without loading its weights, and its fit to a model."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from ..decode import short
from ..errors import CheckpointError, PlanMismatchError
from ..patching.detect import text_config
from ..patching.fingerprint import BASE_FILE, BASE_KEY, BaseModel
from ..patching.mixin import plain_class
from ..patching.ownership import MARK
from ..patching.saved_config import REPLACED_KEY
from ..patching.untrusted import check_directory, read_json
from ..plan import PLAN_FILE, PLAN_KEY, BucketPlan, ExtensionPlan, RotaryPlan

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel


CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
FILES = (CONFIG_FILE, WEIGHTS_FILE, PLAN_FILE, BASE_FILE, CARD_FILE, "config.json", "*.png", "tokenizer*", "*.jinja")
"""Patterns of the files that are uploaded to the Hub. All except the card are downloaded again."""

OUR_KEYS = (PLAN_KEY, BASE_KEY, REPLACED_KEY, "needs_the_positions_of_posext_plan_see_README")
"""Entries of `adapter_config.json` that PEFT does not know. The last one occurs in directories from before 0.2."""


@dataclass(frozen=True)
class AdapterDirectory:
    """Content of an adapter's directory.

    Attributes:
        path (`Path`): the directory.
        config (`Mapping`): `adapter_config.json` as PEFT wrote it.
        plan (`ExtensionPlan`): positions that the adapter was trained with.
        base (`BaseModel`): model that the adapter was trained on.
        shapes (`Mapping[str, tuple[int, ...]]`): shapes of the adapter's weights, by name.
    """

    path: Path
    config: Mapping[str, Any]
    plan: ExtensionPlan
    base: BaseModel
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def read(cls, directory: str | Path) -> AdapterDirectory:
        """Read the directory of an adapter without loading its weights.

        Raises:
            CheckpointError: the directory is incomplete, corrupt or hostile.
            PlanError: the plan is missing, corrupt, or of a newer schema.
            PlanMismatchError: the directory contains two different plans.
        """
        path = Path(directory)
        check_directory(path, WEIGHTS_FILE)
        entries = read_json(path / CONFIG_FILE)
        replaced = entries.get(REPLACED_KEY) or {}
        if not isinstance(replaced, Mapping):
            raise CheckpointError(
                f"Expected entries of PEFT under {REPLACED_KEY} in {path / CONFIG_FILE}, got {short(replaced)}."
            )
        config = {key: value for key, value in entries.items() if key not in OUR_KEYS} | dict(replaced)
        plan = ExtensionPlan.load(path)
        if PLAN_KEY in entries and ExtensionPlan.from_dict(entries[PLAN_KEY]) != plan:
            raise PlanMismatchError(f"{path} contains two plans, in {PLAN_FILE} and in {CONFIG_FILE}. Save it again.")
        adapter = cls(path, config, plan, BaseModel.load(path), _file_shapes(path / WEIGHTS_FILE))
        adapter._check_config()
        return adapter

    @property
    def base_name(self) -> str | None:
        """Folder or Hub id of the base model, as PEFT wrote it; `None` if the config does not contain it."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    def _check_config(self) -> None:
        """Refuse entries that PEFT would act on before any weights are compared."""
        where = self.path / CONFIG_FILE
        if self.config.get("megatron_config") is not None:
            raise CheckpointError(f"{where} has a megatron_config, for which PEFT imports a module that it names")
        named, patterns = self.config.get("modules_to_save") or [], self.config.get("rank_pattern") or {}
        if not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
            raise CheckpointError(f"{where} has modules_to_save {short(named)}; a list of names belongs there")
        if not isinstance(patterns, Mapping):
            raise CheckpointError(f"{where} has rank_pattern {short(patterns)}; a rank for each module belongs there")
        largest = max((shape[0] for name, shape in self.shapes.items() if ".lora_A." in name), default=None)
        ranks = patterns.values() or [self.config.get("r")]  # with patterns, the general rank may apply to no module
        if largest is not None and not all(isinstance(rank, int) and 0 < rank <= largest for rank in ranks):
            raise CheckpointError(
                f"{where} has rank {short(max(ranks, key=str))}, its weights {largest}; one is wrong"
            )
        for name in named:
            if not any(f".{name}." in key for key in self.shapes):
                raise CheckpointError(
                    f"{self.path / WEIGHTS_FILE} lacks {name!r}, which {CONFIG_FILE} lists in modules_to_save. Save "
                    "the adapter again by save_adapter(model, path), which keeps all that was trained."
                )


def _file_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error


def same_effect(plan: ExtensionPlan, other: ExtensionPlan) -> bool:
    """Return whether two plans give every token the same positions, even if they describe them differently."""

    def effect(of: ExtensionPlan) -> Any:
        edits = [replace(edit, rope_parameters=None) if isinstance(edit, RotaryPlan) else edit for edit in of.edits]
        return of.trained_length, of.target_length, sorted(edits, key=lambda edit: getattr(edit, "name", ""))

    return bool(effect(plan) == effect(other))


def computes(config: PreTrainedConfig, plan: ExtensionPlan) -> bool:
    """Return whether transformers computes the plan's positions from a config, without this package."""
    match plan.edits:
        case (BucketPlan(factor=1) as buckets,):
            return bool(getattr(text_config(config), "relative_attention_max_distance", None) == buckets.max_distance)
    native = [isinstance(edit, RotaryPlan) and bool(edit.rope_parameters) and not edit.growth for edit in plan.edits]
    if not native or not all(native):
        return False
    parameters: Any = getattr(text_config(config), "rope_parameters", None) or {}
    return all(
        _plain(parameters.get(entry.name) if entry.name else parameters) == _plain(entry.rope_parameters)
        for entry in plan.rotaries
    )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


Shapes = dict[str, tuple[int, ...]]

BUILDING = (ValueError, KeyError, TypeError, AttributeError, RuntimeError, NotImplementedError, ImportError)
"""Errors that PEFT raises if a config does not fit a model. PEFT has no dedicated error for that."""

_PREFIX = "base_model.model."


def peft_config(adapter: AdapterDirectory) -> PeftConfig:
    """Return the config of an adapter as PEFT's own class.

    Raises:
        CheckpointError: this version of PEFT does not support the type of the adapter, or does not accept the entries.
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
        adapter (`AdapterDirectory`): adapter whose weights are compared.
        model (`PreTrainedModel`): patched base model without an adapter. It is not changed.

    Raises:
        CheckpointError: the adapter lacks weights that its config requires.
    """
    config = peft_config(adapter)
    try:
        with unchanged(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = _build(model, config)
            trained, all_saved = saved_shapes(built), saved_shapes(built, embeddings=True)
    except BUILDING as error:
        return f"PEFT cannot put it on a {type(model).__name__}: {error}"
    missing = sorted(trained.keys() - adapter.shapes.keys())
    if missing:
        raise CheckpointError(
            f"{adapter.path} lacks {len(missing)} weights of its own config, {missing[0]} among them. Save the "
            "adapter again by save_adapter(model, path)."
        )
    for key, shape in adapter.shapes.items():
        place = trained.get(key, all_saved.get(key))
        name = key.removeprefix(_PREFIX)
        if place is None:
            return f"it has no place for {name}"
        if place != shape:
            return f"its {name} has shape {place}, the adapter's {shape}"
    return None


def _build(model: PreTrainedModel, config: PeftConfig) -> Any:
    """Put an untrained adapter on a model, with its weights on the meta device."""
    from peft import get_peft_model

    config = copy.deepcopy(config)
    if isinstance(getattr(config, "init_lora_weights", None), str):
        config.init_lora_weights = True  # PiSSA and others would write into the base weights
    return get_peft_model(model, config, low_cpu_mem_usage=True)


def saved_shapes(model: Any, name: str = "default", *, embeddings: bool = False) -> Shapes:
    """Return the shapes of the weights that PEFT saves for an adapter, by their names in the file."""
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=embeddings)
    return {key: tuple(weight.shape) for key, weight in weights.items()}


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put an adapter on a model for a trial: the model is as before on exit, and the adapter is not the patch's."""
    restore = restorer(model)
    patch = vars(model).pop(MARK, None)
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            restore()
            if patch is not None:
                setattr(model, MARK, patch)


def restorer(model: nn.Module) -> Callable[[], None]:
    """Return a function that undoes what PEFT and training do to a model except for the values of its weights.

    It restores modules and their hooks, the dtype, the flag and the gradient of every weight, and removes attributes
    that the model did not have.
    """
    modules = [(m, dict(m._modules), dict(m._forward_hooks), set(vars(m))) for m in model.modules()]
    # by name, since FSDP2 replaces the weights, and would not free what is held here
    weights = [
        (module, name, weight.requires_grad, weight.dtype, weight.grad)
        for module, *_ in modules
        for name, weight in module.named_parameters(recurse=False)
    ]

    def restore() -> None:
        for module, children, hooks, attributes in modules:
            module._modules.clear()
            module._modules.update(children)
            module._forward_hooks.clear()
            module._forward_hooks.update(hooks)
            for name in vars(module).keys() - attributes:
                delattr(module, name)
        for module, name, trained, dtype, gradient in weights:
            weight = getattr(module, name)
            weight.grad = None  # its dtype would not fit
            weight.data = weight.data.to(dtype)
            weight.grad = gradient
            weight.requires_grad_(trained)

    return restore


def blank_twin(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model's modules on the meta device, without weights and without the changes of a patch."""
    config = plain_class(model.config).from_dict(model.config.to_dict())  # type: ignore[attr-defined]
    with torch.device("meta"):
        twin: PreTrainedModel = type(model)(config)
    return twin
