"""Loading of an adapter: base, patch, and adapter are combined, or the mismatch is reported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import CheckpointError, PlanMismatchError, UnsupportedModelError
from ..packages import require
from ..patching import Patch, detect_scheme, find_patch, load_patched, patch_model, unwrap
from ..patching.checkpoint import local_directory, model_class
from ..patching.loading import locate, open_weights
from ..patching.saved_config import open_patched_config
from ..patching.untrusted import check_directory
from ..plan import ExtensionPlan, has_plan
from .directory import CARD_FILE, FILES, AdapterDirectory, computes, misfit, peft_config, same_effect, saved_shapes
from .save import tell_adapters

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class AdapterFit:
    """Match between a model and the base of an adapter. Each field is `True` if they agree.

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
    """Check that an adapter belongs on a model: the same base, the same positions, a place for every weight.

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
    other = adapter.base.differs(model, adapter.shapes)
    if other:
        reasons.append(f"it is another base model: {other}")
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
    """Open an adapter that was trained under a patch: load the base, apply the patch, and attach the adapter.

    It does not matter what saved it: [`save_adapter`], `save_pretrained` of PEFT or transformers, or a `Trainer`.

    Args:
        directory (`str` or `Path`): of the adapter; or its Hub id.
        base (`PreTrainedModel` or `PeftModel`, *optional*): the base model, loaded already; plain, or under the same
            plan. By default the one that the adapter names. It becomes part of what is returned. A `PeftModel` gets
            the adapter beside those that it has.
        adapter_name (`str`, *optional*, defaults to `"default"`): the name that the adapter gets.
        is_trainable (`bool`, *optional*, defaults to `False`): to train the adapter on.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): its `model_max_length` is raised.
        kwargs: passed to `from_pretrained` of the base (`dtype`, `device_map`, ...).

    Returns:
        `PeftModel`: with the patch in force; `merge_and_unload()` keeps it, `unpatch_model` undoes it.

    Raises:
        PlanMismatchError: another base model, or one under another plan, which is shown beside the adapter's.
        CheckpointError: a directory that is incomplete, corrupt or hostile, or a base that cannot be opened.
        PlanError: no plan there, a corrupt one, or one of a newer schema.
        UnsupportedModelError: no transformers model, or one that has an adapter of this name already.
    """
    require("train")
    from peft import PeftModel

    adapter = _read(directory)
    path = adapter.path
    held = _held(base)
    if base is None:
        base = _open_base(adapter, kwargs)
        _fit_vocabulary(base, adapter)
    elif held and (adapter_name in held or not isinstance(base, PeftModel)):
        raise UnsupportedModelError(
            f"the model has the adapters {', '.join(held)}. Pass another adapter_name to load one beside those of a "
            "PeftModel, or the base without an adapter"
        )
    patch = _apply(unwrap(base), adapter, tokenizer)
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
    config = peft_config(adapter)
    model: PeftModel = base
    if not held:
        model = PeftModel.from_pretrained(
            base, str(path), adapter_name=adapter_name, is_trainable=is_trainable, config=config
        )
    else:
        config.inference_mode = not is_trainable
        model.add_adapter(adapter_name, config)  # else PEFT would read the config, whose type it does not know
        if saved_shapes(model, adapter_name) != adapter.shapes:
            model.delete_adapter(adapter_name)
            raise PlanMismatchError(f"the adapter in {directory} does not fit the weights of this model")
        model.load_adapter(str(path), adapter_name, is_trainable=is_trainable)
    in_force = find_patch(model)
    if in_force is not None:
        tell_adapters(model, in_force)
    return model


def _read(directory: str | Path) -> AdapterDirectory:
    patterns = [pattern for pattern in FILES if pattern != CARD_FILE]
    return AdapterDirectory.read(local_directory(directory, patterns))


def _held(base: nn.Module | None) -> list[str]:
    """Return the names of a model's adapters."""
    return list(getattr(base, "peft_config", None) or getattr(base and unwrap(base), "peft_config", None) or ())


def _fit_vocabulary(base: PreTrainedModel, adapter: AdapterDirectory) -> None:
    """Give a base the rows of a vocabulary that was resized before the adapter was trained, where the adapter contains
    all of them."""
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
    """Apply the adapter's plan to an unpatched base; return `None` if nothing had to be done."""
    if find_patch(base) is not None or computes(base.config, adapter.plan):
        return None
    if not detect_scheme(base).same_positions(adapter.plan.scheme):
        return None  # what is wrong, `verify_adapter` tells
    return patch_model(base, adapter.plan, tokenizer=tokenizer)


def _open_base(adapter: AdapterDirectory, kwargs: dict[str, Any]) -> PreTrainedModel:
    """Open the base model of an adapter, with its own plan in force if it was saved with one."""
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
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"the base model of the adapter, {name}, cannot be opened ({reason}). Pass it: "
            "load_adapter(path, base=model)"
        ) from error


def _both_plans(in_force: ExtensionPlan, wanted: ExtensionPlan) -> str:
    """Describe two conflicting plans and the remedy."""
    said = f"the adapter was trained under ({wanted.describe()}), the model carries ({in_force.describe()})"
    if in_force.method == wanted.method and in_force.factor != wanted.factor:
        return f"{said}; an adapter keeps the factor that it was trained with: give the model without a patch"
    return f"{said}; undo that first, unpatch_model(model), or train an adapter under it"
