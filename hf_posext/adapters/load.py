"""Adapters: their directory, read without loading the weights, their fit to a model, and loading with the patch."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..decode import short
from ..errors import CheckpointError, InvalidParameterError, PlanMismatchError, UnsupportedModelError, first_line
from ..packages import require
from ..patching import Patch, detect_scheme, find_patch, load_patched, patch_model, unwrap
from ..patching.checkpoint import local_directory, locate, model_class, open_weights
from ..patching.detect import text_config
from ..patching.saved_config import BASE_FILE, BASE_KEY, REPLACED_KEY, BaseModel, open_patched_config, tell_adapters
from ..patching.undo import MARK
from ..patching.untrusted import check_directory, read_json
from ..plan import PLAN_FILE, PLAN_KEY, BucketPlan, ExtensionPlan, RotaryPlan, has_plan

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
FILES = (CONFIG_FILE, WEIGHTS_FILE, PLAN_FILE, BASE_FILE, CARD_FILE, "config.json", "*.png", "tokenizer*", "*.jinja")
"""Patterns of the files that are uploaded to the Hub. All except the card are downloaded again."""

OUR_KEYS = (PLAN_KEY, BASE_KEY, REPLACED_KEY, "needs_the_positions_of_posext_plan_see_README")
"""Entries of `adapter_config.json` that PEFT does not know. The last one occurs in directories from before 0.2."""


@dataclass(frozen=True)
class AdapterDirectory:
    """Content of an adapter's directory: PEFT's config, plan and base of the training, and shapes of the weights."""

    path: Path
    config: Mapping[str, Any]
    plan: ExtensionPlan
    base: BaseModel
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def read(cls, directory: str | Path) -> AdapterDirectory:
        """Read the directory of an adapter without loading its weights."""
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
        try:
            with safe_open(path / WEIGHTS_FILE, framework="pt") as weights:
                shapes = {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(f"{path / WEIGHTS_FILE} is not a safetensors file: {error}") from error
        adapter = cls(path, config, plan, BaseModel.load(path), shapes)
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
            raise CheckpointError(f"Expected modules_to_save in {where} to be a list of names, got {short(named)}.")
        if not isinstance(patterns, Mapping):
            raise CheckpointError(
                f"Expected rank_pattern in {where} to be a rank for each module, got {short(patterns)}."
            )
        largest = max((shape[0] for name, shape in self.shapes.items() if ".lora_A." in name), default=None)
        ranks = patterns.values() or [self.config.get("r")]  # with patterns, the general rank may apply to no module
        if largest is not None and not all(isinstance(rank, int) and 0 < rank <= largest for rank in ranks):
            raise CheckpointError(
                f"Expected a rank of 1 to {largest} in {where}, as the weights have, got {short(max(ranks, key=str))}."
            )
        for name in named:
            if not any(f".{name}." in key for key in self.shapes):
                raise CheckpointError(
                    f"{self.path / WEIGHTS_FILE} lacks {name!r}, which {CONFIG_FILE} lists in modules_to_save. Save "
                    "the adapter again by save_adapter(model, path), which keeps all that was trained."
                )


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


BUILDING = (ValueError, KeyError, TypeError, AttributeError, RuntimeError, NotImplementedError, ImportError)
"""Errors that PEFT raises if a config does not fit a model. PEFT has no dedicated error for that."""


def peft_config(adapter: AdapterDirectory) -> PeftConfig:
    """Return the config of an adapter as PEFT's own class."""
    from peft import PeftConfig

    try:
        return PeftConfig.from_peft_type(**adapter.config)
    except BUILDING as error:
        raise CheckpointError(
            f"{adapter.path / CONFIG_FILE} is of no adapter that this version of PEFT knows: {error}"
        ) from error


def misfit(adapter: AdapterDirectory, model: PreTrainedModel) -> str | None:
    """Return the mismatch between the weights of an adapter and a base model; `None` if there is none.

    An untrained adapter is put on the model for a moment, with its weights on the meta device.

    Raises:
        CheckpointError: the adapter lacks weights that its config requires.
    """
    from peft import get_peft_model

    config = peft_config(adapter)
    if isinstance(getattr(config, "init_lora_weights", None), str):
        config.init_lora_weights = True  # PiSSA and others would write into the base weights
    restore, mark = restorer(model), vars(model).pop(MARK, None)  # the adapter does not belong to the patch
    try:
        for on_meta in (True, False):  # a few kinds compute with their weights when they are built
            try:
                with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    built = get_peft_model(model, copy.deepcopy(config), low_cpu_mem_usage=on_meta)
                    trained, all_saved = saved_shapes(built), saved_shapes(built, embeddings=True)
                break
            except BUILDING as error:
                reason = f"PEFT cannot put it on a {type(model).__name__}: {error}"
            finally:
                restore()
        else:
            return reason
    finally:
        if mark is not None:
            setattr(model, MARK, mark)
    missing = sorted(trained.keys() - adapter.shapes.keys())
    if missing:
        raise CheckpointError(
            f"{adapter.path} lacks {len(missing)} weights of its own config, {missing[0]} among them. Save the "
            "adapter again by save_adapter(model, path)."
        )
    for key, shape in adapter.shapes.items():
        place = trained.get(key, all_saved.get(key))
        name = key.removeprefix("base_model.model.")
        if place is None:
            return f"it has no place for {name}"
        if place != shape:
            return f"its {name} has shape {place}, the adapter's {shape}"
    return None


def saved_shapes(model: Any, name: str = "default", *, embeddings: bool = False) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights that PEFT saves for an adapter, by their names in the file."""
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=embeddings)
    return {key: tuple(weight.shape) for key, weight in weights.items()}


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
            weight.grad = None  # its dtype may not fit
            if weight.dtype != dtype:  # quantized weights never change theirs, and may not be cast
                weight.data = weight.data.to(dtype)
            weight.grad = gradient
            weight.requires_grad_(trained)

    return restore


@dataclass(frozen=True)
class AdapterFit:
    """Result of comparing a model with the one that an adapter was trained on; true if they match.

    Attributes:
        reasons (`tuple[str, ...]`): differences; empty if they match.
        plan (`ExtensionPlan`): positions that the adapter was trained with.
        in_force (`ExtensionPlan`, *optional*): plan in force on the model; `None` without a patch.
    """

    reasons: tuple[str, ...]
    plan: ExtensionPlan
    in_force: ExtensionPlan | None

    def __bool__(self) -> bool:
        return not self.reasons


def verify_adapter(model: nn.Module, directory: str | Path) -> AdapterFit:
    """Check that an adapter fits a model: the same base, the same positions, a place for every weight.

    The model is not changed.

    Args:
        model (`PreTrainedModel`): base model, patched or not, or a `PeftModel` of it.
        directory (`str` or `Path`): directory of the adapter, or its Hub id.

    Returns:
        [`AdapterFit`]: true if they fit, otherwise false with all reasons.

    Raises:
        CheckpointError: the directory is incomplete, corrupt or hostile.
        PlanError: the plan is missing, corrupt, or of a newer schema.
    """
    adapter = _read(directory)
    patch = find_patch(model)
    in_force = None if patch is None else patch.plan
    scheme = detect_scheme(model)
    reasons = []
    if not scheme.same_positions(adapter.plan.scheme):
        reasons.append(f"the adapter is for ({adapter.plan.scheme.describe()}), the model is ({scheme.describe()})")
    elif in_force is None and not computes(unwrap(model).config, adapter.plan):
        reasons.append(f"the adapter was trained under ({adapter.plan.describe()}), the model carries no patch")
    elif in_force is not None and not same_effect(in_force, adapter.plan):
        reasons.append(_both_plans(in_force, adapter.plan))
    difference = adapter.base.differs(model, adapter.shapes)
    if difference:
        reasons.append(f"it is another base model: {difference}")
    if not reasons and not getattr(unwrap(model), "peft_config", None):
        difference = misfit(adapter, unwrap(model))
        if difference:
            reasons.append(f"the adapter does not fit its weights: {difference}")
    return AdapterFit(tuple(reasons), adapter.plan, in_force)


def load_adapter(
    directory: str | Path,
    base: nn.Module | None = None,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **kwargs: Any,
) -> PeftModel:
    """Load an adapter that was trained under a patch, with its base model and the patch.

    The adapter may come from [`save_adapter`], `save_pretrained` of PEFT or transformers, or a `Trainer`.

    Args:
        directory (`str` or `Path`): directory of the adapter, or its Hub id.
        base (`PreTrainedModel` or `PeftModel`, *optional*): loaded base model, unpatched or under the same plan. By
            default, the model that the adapter names is loaded. It becomes part of the returned model. A `PeftModel`
            gets the adapter in addition to those that it has.
        adapter_name (`str`, *optional*, defaults to `"default"`): name of the adapter in the model.
        is_trainable (`bool`, *optional*, defaults to `False`): whether the adapter can be trained further.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): tokenizer whose `model_max_length` is raised.
        kwargs: passed to `from_pretrained` of the base (`dtype`, `device_map`, ...), if it is loaded here.

    Returns:
        `PeftModel`: the model with the patch in force. `merge_and_unload()` keeps the patch, `unpatch_model` undoes
        it.

    Raises:
        PlanMismatchError: the base model is another one, or its plan is. The message shows both plans.
        CheckpointError: the directory is incomplete, corrupt or hostile, or the base cannot be opened.
        PlanError: the plan is missing, corrupt, or of a newer schema.
        InvalidParameterError: `kwargs` are given with a base.
        UnsupportedModelError: the model is not a transformers model, already has an adapter of this name, or has
            adapters without being a `PeftModel`.
    """
    require("train")
    from peft import PeftModel

    if base is not None and kwargs:  # they would be ignored
        raise InvalidParameterError(
            f"Expected no arguments of from_pretrained beside a base, got {', '.join(kwargs)}. Load the base with them"
        )
    adapter = _read(directory)
    path = adapter.path
    names = _adapter_names(base)
    if base is None:
        base = _open_base(adapter, kwargs)
        _fit_vocabulary(base, adapter)
    elif names and (adapter_name in names or not isinstance(base, PeftModel)):
        raise UnsupportedModelError(
            f"the model has the adapters {', '.join(names)}. Pass another adapter_name to load one beside those of a "
            "PeftModel, or the base without an adapter"
        )
    patch = _apply(unwrap(base), adapter, tokenizer)
    restore = restorer(unwrap(base))
    model: Any = base
    try:
        fit = verify_adapter(base, path)
        if not fit:
            raise PlanMismatchError(
                f"the adapter in {directory} does not belong on this model: {'; '.join(fit.reasons)}"
            )
        config = peft_config(adapter)
        if not names:
            model = PeftModel.from_pretrained(
                base, str(path), adapter_name=adapter_name, is_trainable=is_trainable, config=config
            )
        else:
            config.inference_mode = not is_trainable
            # otherwise PEFT would read the saved config, whose type it does not know
            model.add_adapter(adapter_name, config)
            if saved_shapes(model, adapter_name) != adapter.shapes:
                raise PlanMismatchError(f"the adapter in {directory} does not fit the weights of this model")
            model.load_adapter(str(path), adapter_name, is_trainable=is_trainable)
        tell_adapters(model)
    except BaseException:
        if not names:
            restore()
        elif adapter_name in model.peft_config:
            model.delete_adapter(adapter_name)
        if patch is not None:
            patch.undo()
        raise
    opened: PeftModel = model
    return opened


def _read(directory: str | Path) -> AdapterDirectory:
    patterns = [pattern for pattern in FILES if pattern != CARD_FILE]
    return AdapterDirectory.read(local_directory(directory, patterns))


def _adapter_names(base: nn.Module | None) -> list[str]:
    """Return the names of the adapters on a model."""
    return list(getattr(base, "peft_config", None) or getattr(base and unwrap(base), "peft_config", None) or ())


def _fit_vocabulary(base: PreTrainedModel, adapter: AdapterDirectory) -> None:
    """Resize the embeddings of a base to the vocabulary of the adapter, if the adapter contains all of their rows."""
    embedding: Any = base.get_input_embeddings()
    head: Any = base.get_output_embeddings()
    names = {id(module): f"base_model.model.{path}." for path, module in base.named_modules()}
    rows = {
        shape[0]
        for key, shape in adapter.shapes.items()
        if key.startswith(names[id(embedding)]) and key.endswith("weight") and len(shape) == 2
    }
    if len(rows) != 1 or rows == {embedding.weight.shape[0]}:
        return
    tied = head is None or head.weight is embedding.weight
    if not tied and not any(key.startswith(names[id(head)]) for key in adapter.shapes):
        raise CheckpointError(
            f"{adapter.path} has embeddings of {rows.pop()} tokens and no output weights for them. Pass the base with "
            "those that it was trained with: load_adapter(path, base=model)"
        )
    base.resize_token_embeddings(rows.pop(), mean_resizing=False)


def _apply(
    base: PreTrainedModel, adapter: AdapterDirectory, tokenizer: PreTrainedTokenizerBase | None
) -> Patch | None:
    """Apply the plan of an adapter to an unpatched base. Return `None` if there is nothing to apply."""
    if find_patch(base) is not None or computes(base.config, adapter.plan):
        return None
    if not detect_scheme(base).same_positions(adapter.plan.scheme):
        return None  # `verify_adapter` reports the mismatch
    return patch_model(base, adapter.plan, tokenizer=tokenizer)


def _open_base(adapter: AdapterDirectory, kwargs: dict[str, Any]) -> PreTrainedModel:
    """Open the base model that an adapter names. A base that was saved with a plan is opened under it."""
    name = adapter.base_name
    if name is None:
        raise CheckpointError(f"{adapter.path} does not name its base model. Pass it: load_adapter(path, base=model)")
    if Path(name).is_dir():
        check_directory(name)
        if has_plan(name):
            return load_patched(name, **kwargs)
    revision = adapter.config.get("revision") or adapter.base.revision
    trusted = bool(kwargs.pop("trust_remote_code", False))
    try:
        config = open_patched_config(name, revision, trusted)
        source = locate(name, trust_remote_code=trusted)
        return open_weights(model_class(config, name, trusted), source, config, revision=revision, **kwargs)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the base model of the adapter, {name}, cannot be opened ({first_line(error)}). Pass it: "
            "load_adapter(path, base=model)"
        ) from error


def _both_plans(in_force: ExtensionPlan, trained: ExtensionPlan) -> str:
    """Describe two plans side by side, with advice."""
    comparison = f"the adapter was trained under ({trained.describe()}), the model carries ({in_force.describe()})"
    if in_force.method == trained.method and in_force.factor != trained.factor:
        return f"{comparison}; an adapter keeps the factor that it was trained with: give the model without a patch"
    return f"{comparison}; undo that first, unpatch_model(model), or train an adapter under it"
