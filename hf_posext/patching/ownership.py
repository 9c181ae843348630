"""Ownership: the model inside its wrappers, the patch in force, and the configs of its own."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UnsupportedModelError
from ..plan import ExtensionPlan
from .undo import UndoLog, Weak

MARK = "_posext_patch"
"""Attribute that marks every transformers model inside a patched one."""


@dataclass(eq=False)
class InForce:
    """State of a plan in force, stored in the mark of a patched model.

    It refers to the model weakly, since the model refers to it.
    """

    root: Weak  # the model that was given to `patch_model`, unwrapped
    plan: ExtensionPlan
    tokenizer: PreTrainedTokenizerBase | None  # the one whose limit was raised
    log: UndoLog = field(default_factory=UndoLog)
    tables: dict[str, nn.Embedding] = field(default_factory=dict)  # by path, those that got other weights
    native_obstacle: str | None = None  # why plain transformers does not open a checkpoint of the model
    lost_tables: bool = False  # loaded without the tables that the patch replaced
    knows_prompts: bool = False  # adapters of prompt learning, in which the model has no part, were told of the plan
    marked: list[Weak] = field(default_factory=list)  # the modules that carry the mark
    active: bool = False
    handle: weakref.ref[Any] | None = None  # the `Patch` that users hold

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"handle": None}


def unwrap(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a PEFT, DDP, FSDP or `torch.compile` wrapper.

    Raises:
        UnsupportedModelError: there is no transformers model inside.
    """
    wrapper: Any = model
    inner = getattr(wrapper, "_orig_mod", None)
    if inner is None and hasattr(wrapper, "get_base_model"):
        inner = wrapper.get_base_model()
    if inner is None and not isinstance(model, PreTrainedModel):
        inner = getattr(wrapper, "module", None)
    if isinstance(inner, nn.Module):
        return unwrap(inner)
    if isinstance(model, PreTrainedModel):
        return model
    embedder = isinstance(model, nn.Sequential) and len(model) and hasattr(model[0], "auto_model")
    raise UnsupportedModelError(
        f"Expected a `PreTrainedModel` (or a PEFT or DDP wrapper of one), got `{type(model).__name__}`."
        f"{' Pass model[0].auto_model.' if embedder else ''}"
    )


def mark_model(model: PreTrainedModel, state: InForce) -> None:
    """Mark every transformers model inside a model as patched."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            state.marked.append(Weak(module))
            setattr(module, MARK, state)
    state.active = True


def unmark(state: InForce) -> None:
    """Remove the mark of an undone patch."""
    for reference in state.marked:
        module = reference()
        if module is not None and vars(module).get(MARK) is state:
            delattr(module, MARK)
    state.active = False


def mark_of(model: nn.Module) -> InForce | None:
    """Return the patch in force on a model, or on a part of it."""
    for module in model.modules():
        state: InForce | None = vars(module).get(MARK)
        if state is not None:
            return state
    return None


def own_configs(model: nn.Module, log: UndoLog) -> None:
    """Give a model and its wrappers their own configs, because models may share a config object.

    Every module that held one gets the same copy. Undo puts the shared ones back, unless the copies were changed by
    others meanwhile; then the model keeps them, so that no setting is lost.
    """
    memo: dict[int, Any] = {}
    holders = [
        (Weak(module), name, config, copy.deepcopy(config, memo))
        for module in model.modules()
        for name, config in vars(module).items()
        if isinstance(config, PreTrainedConfig | GenerationConfig)
    ]
    log.on_undo(_share_again, holders, [copy.deepcopy(_contents(twin)) for *_, twin in holders])
    for holder, name, _, twin in holders:
        setattr(holder(), name, twin)


def _share_again(holders: list[tuple[Weak, str, Any, Any]], at_first: list[dict[str, Any]]) -> None:
    """Restore the original configs, unless a copy was changed."""
    if [_contents(twin) for *_, twin in holders] != at_first:
        return
    for reference, name, former, twin in holders:
        module = reference()
        if module is not None and vars(module).get(name) is twin:
            setattr(module, name, former)


def _contents(config: Any) -> dict[str, Any]:
    return {
        name: _contents(value) if isinstance(value, PreTrainedConfig) else value
        for name, value in vars(config).items()
    }
