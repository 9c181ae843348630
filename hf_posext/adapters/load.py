"""Puts base, patch and adapter together, or says why they do not belong together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import CheckpointError, PlanMismatchError, UnsupportedModelError
from ..packages import require
from ..patching import Patch, detect_scheme, find_patch, load_patched, patch_model, unwrap
from ..patching.checkpoint import model_class
from ..patching.loading import locate, open_config, open_weights
from ..patching.untrusted import check_directory
from ..plan import PLAN_FILE, ExtensionPlan
from .directory import AdapterDirectory
from .hub import local_directory
from .match import computes, same_effect

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class AdapterFit:
    """Whether a model is what an adapter was trained on; true where it is.

    Attributes:
        reasons (`tuple[str, ...]`): why it is not; empty where it is.
        plan (`ExtensionPlan`): the positions that the adapter was trained with.
        in_force (`ExtensionPlan`, *optional*): the plan that the model carries.
    """

    reasons: tuple[str, ...]
    plan: ExtensionPlan
    in_force: ExtensionPlan | None

    def __bool__(self) -> bool:
        return not self.reasons


def verify_adapter(model: nn.Module, directory: str | Path) -> AdapterFit:
    """Whether an adapter belongs on a model: the same base, the same positions, a place for every weight.

    Nothing is changed.

    Args:
        model (`PreTrainedModel`): the base, patched or not, or a `PeftModel` of it.
        directory (`str` or `Path`): of the adapter; or its Hub id.

    Returns:
        [`AdapterFit`]: true where they fit, else with all reasons.

    Raises:
        CheckpointError: a directory that is incomplete, corrupt or hostile.
        PlanError: no plan there, a corrupt one, or one of a newer schema.
    """
    adapter = AdapterDirectory.read(local_directory(directory))
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
    other = adapter.base.differs(model)
    if other:
        reasons.append(f"it is another base model: {other}")
    if not reasons and not getattr(unwrap(model), "peft_config", None):
        homeless = adapter.misfit(unwrap(model))
        if homeless:
            reasons.append(f"the adapter does not fit its weights: {homeless}")
    return AdapterFit(tuple(reasons), adapter.plan, in_force)


def load_adapter(
    directory: str | Path,
    base: PreTrainedModel | None = None,
    *,
    is_trainable: bool = False,
    tokenizer: Any | None = None,
    **kwargs: Any,
) -> PeftModel:
    """Open what [`save_adapter`] saved: the base, the patch that the adapter was trained under, and the adapter.

    Args:
        directory (`str` or `Path`): of the adapter; or its Hub id.
        base (`PreTrainedModel`, *optional*): the base model, loaded already; plain, or under the same plan. By default
            the one that the adapter names. It becomes part of what is returned.
        is_trainable (`bool`, *optional*, defaults to `False`): to train the adapter on.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): its `model_max_length` is raised.
        kwargs: passed to `from_pretrained` of the base (`dtype`, `device_map`, ...).

    Returns:
        `PeftModel`: with the patch in force; `merge_and_unload()` keeps it, `unpatch_model` undoes it.

    Raises:
        PlanMismatchError: another base model, or one under another plan, which is shown beside the adapter's.
        CheckpointError: a directory that is incomplete, corrupt or hostile, or a base that cannot be opened.
        PlanError: no plan there, a corrupt one, or one of a newer schema.
        UnsupportedModelError: the base has an adapter already.
    """
    require("train")
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    path = local_directory(directory)
    adapter = AdapterDirectory.read(path)
    if base is None:
        base = _open_base(adapter, kwargs)
    elif getattr(base, "peft_config", None) or not hasattr(base, "config"):
        raise UnsupportedModelError(f"base is a {type(base).__name__}; give the base model alone, without an adapter")
    patch = _apply(base, adapter, tokenizer)
    try:
        fit = verify_adapter(base, path)
        if not fit:
            raise PlanMismatchError(
                f"the adapter in {directory} does not belong on this model: {'; '.join(fit.reasons)}"
            )
    except BaseException:
        if patch is not None:
            patch.undo()
        raise
    config = PeftConfig.from_peft_type(**adapter.config)
    model: PeftModel = PeftModel.from_pretrained(base, str(path), is_trainable=is_trainable, config=config)
    missing = sorted(get_peft_model_state_dict(model).keys() - adapter.shapes.keys())
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} weights of its own config, {missing[0]} among them; save the adapter again "
            "by save_adapter(model, path)"
        )
    return model


def _apply(base: PreTrainedModel, adapter: AdapterDirectory, tokenizer: Any | None) -> Patch | None:
    """The adapter's plan on a base that has no positions of its own making; `None` where nothing was to be done."""
    if find_patch(base) is not None or computes(base.config, adapter.plan):
        return None
    if not detect_scheme(base).same_positions(adapter.plan.scheme):
        return None  # what is wrong, `verify_adapter` tells
    return patch_model(base, adapter.plan, tokenizer=tokenizer)


def _open_base(adapter: AdapterDirectory, kwargs: dict[str, Any]) -> PreTrainedModel:
    """The base model that an adapter names; with its own plan in force where it was saved with one."""

    name = adapter.base_name
    if name is None:
        raise CheckpointError(f"{adapter.path} does not name its base model; give it: load_adapter(path, base=model)")
    if Path(name).is_dir():
        check_directory(name)
        if (Path(name) / PLAN_FILE).is_file():
            return load_patched(name, **kwargs)
    revision = adapter.config.get("revision") or adapter.base.revision
    try:
        source = locate(name)
        config = open_config(source, revision=revision)
        return open_weights(model_class(config, name), source, config, revision=revision, **kwargs)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"the base model of the adapter, {name}, cannot be opened ({reason}); give it: "
            "load_adapter(path, base=model)"
        ) from error


def _both_plans(in_force: ExtensionPlan, wanted: ExtensionPlan) -> str:
    """Two plans side by side, and what to do about it."""
    said = f"the adapter was trained under ({wanted.describe()}), the model carries ({in_force.describe()})"
    if in_force.method == wanted.method and in_force.factor != wanted.factor:
        return f"{said}; an adapter keeps the factor that it was trained with: give the model without a patch"
    return f"{said}; undo that first, unpatch_model(model), or train an adapter under it"
