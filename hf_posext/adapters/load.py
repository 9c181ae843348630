"""Loading of adapters together with base and patch, and the check that they fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import CheckpointError, PlanMismatchError, UnsupportedModelError, first_line
from ..packages import require
from ..patching import Patch, detect_scheme, find_patch, load_patched, patch_model, unwrap
from ..patching.checkpoint import local_directory, model_class
from ..patching.loading import locate, open_weights
from ..patching.saved_config import open_patched_config
from ..patching.untrusted import check_directory
from ..plan import ExtensionPlan, has_plan
from .directory import (
    CARD_FILE,
    FILES,
    AdapterDirectory,
    computes,
    misfit,
    peft_config,
    restorer,
    same_effect,
    saved_shapes,
)
from .save import tell_adapters

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
        homeless = misfit(adapter, unwrap(model))
        if homeless:
            reasons.append(f"the adapter does not fit its weights: {homeless}")
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
        kwargs: passed to `from_pretrained` of the base (`dtype`, `device_map`, ...).

    Returns:
        `PeftModel`: the model with the patch in force. `merge_and_unload()` keeps the patch, `unpatch_model` undoes
        it.

    Raises:
        PlanMismatchError: the base model is another one, or its plan is. The message shows both plans.
        CheckpointError: the directory is incomplete, corrupt or hostile, or the base cannot be opened.
        PlanError: the plan is missing, corrupt, or of a newer schema.
        UnsupportedModelError: the model is not a transformers model, already has an adapter of this name, or has
            adapters without being a `PeftModel`.
    """
    require("train")
    from peft import PeftModel

    adapter = _read(directory)
    path = adapter.path
    names = _held(base)
    if base is None:
        base = _open_base(adapter, kwargs)
        _fit_vocabulary(base, adapter)
    elif names and (adapter_name in names or not isinstance(base, PeftModel)):
        raise UnsupportedModelError(
            f"the model has the adapters {', '.join(names)}. Pass another adapter_name to load one beside those of a "
            "PeftModel, or the base without an adapter"
        )
    patch = _apply(unwrap(base), adapter, tokenizer)
    restore, model = restorer(unwrap(base)), base
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
        in_force = find_patch(model)
        if in_force is not None:
            tell_adapters(model, in_force)
    except BaseException:
        if not names:
            restore()
        elif adapter_name in model.peft_config:
            model.delete_adapter(adapter_name)
        if patch is not None:
            patch.undo()
        raise
    return model  # type: ignore[no-any-return]


def _read(directory: str | Path) -> AdapterDirectory:
    patterns = [pattern for pattern in FILES if pattern != CARD_FILE]
    return AdapterDirectory.read(local_directory(directory, patterns))


def _held(base: nn.Module | None) -> list[str]:
    """Return the names of the adapters on a model."""
    return list(getattr(base, "peft_config", None) or getattr(base and unwrap(base), "peft_config", None) or ())


def _fit_vocabulary(base: PreTrainedModel, adapter: AdapterDirectory) -> None:
    """Resize the embeddings of a base to the vocabulary of the adapter, if the adapter contains all of their rows.

    Raises:
        CheckpointError: the adapter lacks the output weights of its vocabulary.
    """
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


def _both_plans(in_force: ExtensionPlan, wanted: ExtensionPlan) -> str:
    """Describe two plans side by side, with advice."""
    comparison = f"the adapter was trained under ({wanted.describe()}), the model carries ({in_force.describe()})"
    if in_force.method == wanted.method and in_force.factor != wanted.factor:
        return f"{comparison}; an adapter keeps the factor that it was trained with: give the model without a patch"
    return f"{comparison}; undo that first, unpatch_model(model), or train an adapter under it"
