"""Patching: `patch_model` applies a plan and returns a `Patch`."""

from __future__ import annotations

import logging
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import (
    AlreadyPatchedError,
    InvalidParameterError,
    NoEffectError,
    NotPatchedError,
    PlanMismatchError,
    UnsupportedModelError,
    renamed_arguments,
)
from ..escaping import html_table
from ..methods import Method, as_method
from ..plan import Band, BucketPlan, Edit, ExtensionPlan, QueryScale, RotaryPlan, Sinusoids, Slopes, TablePlan
from .biases import apply_buckets, apply_slopes
from .checkpoint import open_saved, refuse_adapter, save_patched, upload
from .detect import detect_scheme
from .effect import refuse_idle_components
from .frequencies import apply_frequencies
from .modes import without_autocast
from .remap.probe import apply_late_rotation
from .saved_config import carry, saved_plan
from .sites import is_offloaded
from .tables import apply_sinusoids, apply_table, follow_tables, raise_limits, replaced_tables, tables_of
from .undo import InForce, UndoLog, Weak, mark_model, mark_of, own_configs, unmark, unwrap

logger = logging.getLogger(__name__)

_lock = threading.RLock()
"""Held while any model is patched or undone: two handles of one model are two objects, and their threads must meet."""


class Patch:
    """Plan in force on a live model, until [`~Patch.undo`].

    Made by [`patch_model`] or [`Patch.from_pretrained`]. As a context manager it is undone on exit, also after an
    exception. The patch stays in force when this object is dropped: the model carries it.

    Attributes:
        model (`PreTrainedModel`): the patched model, without PEFT or DDP wrappers.
    """

    def __init__(self, model: PreTrainedModel, state: InForce) -> None:
        self.model = model
        self._state = state

    @property
    def plan(self) -> ExtensionPlan:
        """Plan in force."""
        return self._state.plan

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Tokenizer passed to `patch_model`."""
        return self._state.tokenizer

    @property
    def native_obstacle(self) -> str | None:
        """Reason why a checkpoint needs this package; `None` if plain transformers opens it with equal logits."""
        return self._state.native_obstacle

    @property
    def active(self) -> bool:
        """`True` while the patch is in force."""
        return self._state.active

    def __repr__(self) -> str:
        state = "in force" if self.active else "undone"
        return f"Patch({type(self.model).__name__}, {self.plan.describe()}, {state})"

    def _repr_html_(self) -> str:
        scheme, plan, state = self.describe().splitlines()
        return html_table({"model": type(self.model).__name__, "scheme": scheme, "plan": plan, "state": state})

    def describe(self) -> str:
        """Return three lines: the scheme, the plan, and how the patched model can be saved."""
        if self.plan.changes_nothing:
            saved = "nothing was changed"
        elif self.native_obstacle is None:
            saved = "saves as a checkpoint that plain transformers opens"
        else:
            saved = f"saves with its plan beside the weights: {self.native_obstacle}"
        state = "in force" if self.active else "undone"
        return f"{self.plan.scheme.describe()}\n{self.plan.describe()}\n{state}; {saved}"

    def undo(self) -> None:
        """Restore the model, bit for bit.

        Undo is exact whoever has wrapped or hooked the model since, and complete: a change that cannot be put back
        does not stop the others, and is tried again by the next call.

        Raises:
            NotPatchedError: the patch is not in force any more.
            UnsupportedModelError: an adapter trains a copy of a table that was stretched; merge or drop it first. Or
                FSDP2 has sharded it, accelerate has offloaded it, or the table before the patch was not saved with the
                model.
            UndoError: some changes could not be put back; names them.
        """
        with _lock:
            if not self.active:
                raise NotPatchedError(f"the patch {self.plan.method!r} is undone already")
            if self._state.lost_tables:
                raise UnsupportedModelError(
                    f"the patch {self.plan.method!r} cannot be undone: what saved the model did not keep the table "
                    "before the patch, only patch.save_pretrained(path) does. Open the original model."
                )
            follow_tables(self.model, self._state.tables, self._state.log)
            if self._state.tables:
                _refuse_sharded_tables(self.model, "Undo the patch before the model is wrapped.")
                _refuse_offloaded_tables(self.model, self._state.log)
            self._state.log.undo()
            unmark(self._state)  # not before all is undone, so that a second try finds the patch

    def save_pretrained(self, directory: str | Path) -> None:
        """Save the patched model, its plan, and the tokenizer if `patch_model` was given one.

        Safetensors and JSON only. Where `native_obstacle` is `None`, `AutoModelForCausalLM.from_pretrained` opens the
        directory without this package, with equal logits; [`load_patched`] opens it in any case.

        Args:
            directory (`str` or `Path`): must not exist yet, or be empty.

        Raises:
            NotPatchedError: the patch is undone already.
            FileExistsError: the directory holds files.
            UnsupportedModelError: the model has an adapter; merge it first, or save it with [`save_adapter`].
        """
        if not self.active:
            raise NotPatchedError(f"the patch {self.plan.method!r} is undone; patch again before saving")
        refuse_adapter(self.model)
        follow_tables(self.model, self._state.tables, self._state.log)
        replaced = {} if self._state.lost_tables else replaced_tables(self.model, self._state.log)
        save_patched(self.model, self.plan, self._state.tokenizer, replaced, directory)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the output of [`~Patch.save_pretrained`] in one commit.

        Args:
            repo_id (`str`): `user/name`; the repository is made if it does not exist.
            options: `private`, `revision`, `commit_message` and `token`, as [`~hf_posext.adapters.push_to_hub`] takes
                them.

        Returns:
            `str`: URL of the commit.

        Raises:
            NotPatchedError, UnsupportedModelError: as [`~Patch.save_pretrained`].
        """
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            return upload(directory, repo_id, self.plan, **options)

    @classmethod
    def from_pretrained(cls, directory: str | Path, **kwargs: Any) -> Patch:
        """Open a saved patched model with [`load_patched`], and return its patch."""
        model, plan, rows, reversible = open_saved(directory, **kwargs)
        patch = patch_model(model, plan)
        if plan.table:
            patch._state.lost_tables = not reversible
            for path, weight in rows.items():
                tables_of(model)[path].weight.data = weight.data  # as saved: it may have been trained since
        return patch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            self.undo()


@renamed_arguments(original_length="trained_length")
def patch_model(
    model: nn.Module,
    method: str | Method | ExtensionPlan,
    *,
    factor: float | None = None,
    target_length: int | None = None,
    trained_length: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **hyper_parameters: Any,
) -> Patch:
    """Change how a model encodes position, in place, so that it reads beyond its trained length.

    Weights are neither changed nor copied, except for tables of positions, which are replaced by longer ones. Limits
    that would cap the longer input are raised (`max_position_embeddings`, generation, and the tokenizer's if given).
    `undo` restores all of it to the bit. Patching and undoing are atomic, also across threads.

    Args:
        model (`PreTrainedModel`): or a PEFT, DDP or `torch.compile` wrapper of one.
        method (`str`, `Method` or `ExtensionPlan`): a name in any case (`"yarn"`, or several joined by `+`:
            `"yarn+resonance"`), a method object with its hyper-parameters (`YaRN(factor=8, beta_fast=32)`), or a plan
            made before.
        factor (`float`, *optional*): how many times the length that the model was pre-trained at. A factor of the
            method itself (`"yarn(factor=8)"`) has to be the same.
        target_length (`int`, *optional*): the same, in tokens.
        trained_length (`int`, *optional*): trained length in tokens, overriding what the config says.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): its `model_max_length` is raised, and `save_pretrained`
            saves it with the model.
        hyper_parameters: of the method, where it is a name: `patch_model(model, "yarn", factor=8, beta_fast=16)`.

    Returns:
        [`Patch`]: with `plan`, `describe()`, `undo()`, `save_pretrained(path)`; a context manager.

    Raises:
        UnknownMethodError: no such method; names the nearest.
        MethodNotApplicableError: the method is for another scheme. The message lists those that apply.
        InvalidParameterError: a factor, length or hyper-parameter out of bounds, or given twice with different values,
            or a target below the trained or shipped length.
        AlreadyPatchedError: the model, or a part of it, carries a patch, or was saved with one.
        NoEffectError: the positions of the model would not change, or a component of a composition changes nothing.
        PlanError: a plan that asks for more than can be made.
        PlanMismatchError: a plan made for a model with another scheme.
        UnsupportedModelError: not a transformers model, or one that cannot be patched; says why.
    """
    given = {"factor": factor, "target_length": target_length, "trained_length": trained_length}
    inner = unwrap(model)
    # not the default device of the process, which may be another than the model's; probes compare in full precision
    with _lock, torch.device("cpu"), without_autocast(inner):
        in_force = find_patch(inner)
        if in_force is not None:
            raise AlreadyPatchedError(
                f"the model carries the patch {in_force.plan.describe()!r}. Undo it first: unpatch_model(model)."
            )
        saved = saved_plan(inner.config)
        if saved is not None:
            raise AlreadyPatchedError(
                f"Expected a model without a patch, got one whose config carries the patch {saved.describe()!r}: it "
                "was saved under it, or made from the config of a patched model. Open a saved directory by "
                "load_patched(path) and undo its patch. Copy a config before patching the model that it belongs to."
            )
        _refuse_meta(inner)
        scheme = detect_scheme(inner)
        if isinstance(method, ExtensionPlan):
            plan = method
            named = [name for name, value in (given | hyper_parameters).items() if value is not None]
            if named:
                raise InvalidParameterError(
                    f"a plan has its lengths already, got {', '.join(named)}. Pass a method to choose others."
                )
            plan.check()
            if not scheme.same_positions(plan.scheme):
                raise PlanMismatchError(
                    f"the plan is for ({plan.scheme.describe()}); the model is ({scheme.describe()}); "
                    f"plan again for this model: patch_model(model, {plan.method!r}, factor={plan.factor:g})"
                )
        else:
            plan = as_method(method, **hyper_parameters).plan(scheme, **given)  # type: ignore[arg-type]
        patch = Patch(inner, _apply(model, inner, plan, tokenizer))
        try:
            refuse_idle_components(inner, plan)
        except NoEffectError as error:
            if not isinstance(method, ExtensionPlan):
                patch.undo()
                raise
            logger.warning("%s", error)  # what was saved under such a plan still opens
    patch._state.handle = weakref.ref(patch)
    logger.info("patched: %s", plan.describe())
    return patch


_ROOMS: dict[type[Edit], Callable[[PreTrainedModel, ExtensionPlan, UndoLog], str | None]] = {
    RotaryPlan: apply_frequencies,
    Band: apply_late_rotation,
    QueryScale: apply_late_rotation,
    TablePlan: apply_table,
    Slopes: apply_slopes,
    BucketPlan: apply_buckets,
    Sinusoids: apply_sinusoids,
}
"""Function that puts all edits of a type into a model. Each is called once, in the order of the edits."""


def _apply(
    outer: nn.Module, model: PreTrainedModel, plan: ExtensionPlan, tokenizer: PreTrainedTokenizerBase | None
) -> InForce:
    """Apply a plan to a model. On any error, the model is restored."""
    state = InForce(Weak(model), plan, tokenizer)
    if plan.changes_nothing and any(entry["name"] != "none" for entry in plan.parameters):
        raise NoEffectError(
            f"Expected a plan that changes the positions of {plan.scheme.model_type}, got {plan.describe()} without "
            f"effect: {_why_nothing(plan)}. Pass method 'none' to compare with the unpatched model."
        )
    if plan.rotates_late:
        _refuse_prefixes(outer, plan)
    if (plan.table or plan.sinusoids) and tables_of(model):
        _refuse_sharded_tables(outer, "Patch the model before it is wrapped.")
    try:
        if not plan.changes_nothing:
            own_configs(outer, state.log)
            rooms = [_ROOMS[type(edit)] for edit in plan.edits]
            if plan.rotates_late:  # also where frequencies grow with rows
                rooms.append(apply_late_rotation)
            for apply in dict.fromkeys(rooms):
                state.native_obstacle = apply(model, plan, state.log) or state.native_obstacle
            raise_limits(model, plan, tokenizer, state.log)
        tables = tables_of(model).items()
        state.tables = {path: module for path, module in tables if state.log.knows(module, "weight")}
        carry(model, state)
        mark_model(model, state)
    except BaseException:
        state.log.undo()
        raise
    return state


def _why_nothing(plan: ExtensionPlan) -> str:
    windows = [rotary.window for rotary in plan.scheme.rotaries]
    if windows and all(window is not None and window <= plan.trained_length for window in windows):
        reach = max(window for window in windows if window is not None)
        return f"no layer that rotates sees farther back than {reach} tokens, within the trained {plan.trained_length}"
    return "the plan contains no edit"


def _refuse_meta(model: PreTrainedModel) -> None:
    """Refuse a model without weights. One that accelerate has offloaded gets them from its hooks."""
    if any(weight.is_meta for weight in model.parameters()) and not is_offloaded(model):
        raise UnsupportedModelError(
            f"Expected a model with weights, got {type(model).__name__} on the meta device. Load its weights, then "
            "patch."
        )


def _refuse_prefixes(model: nn.Module, plan: ExtensionPlan) -> None:
    """Refuse adapters whose keys come from no token. The first forward refuses one that was added after the patch."""
    configs = [getattr(module, "peft_config", None) or {} for module in model.modules()]
    kinds = {str(getattr(each.peft_type, "value", each.peft_type)) for config in configs for each in config.values()}
    if refused := kinds & {"PREFIX_TUNING", "CARTRIDGE"}:
        raise UnsupportedModelError(
            f"Expected keys of tokens for {plan.method}, which gives them positions in attention, got an adapter of "
            f"the type {refused.pop()}, whose keys have none. Pass a frequency method such as yarn."
        )


def _refuse_sharded_tables(model: nn.Module, advice: str) -> None:
    """Refuse to replace tables whose weights a wrapper manages: it would put its own back, or not reduce gradients."""
    for module in model.modules():
        if isinstance(module, DistributedDataParallel | FSDPModule | FullyShardedDataParallel):
            raise UnsupportedModelError(
                f"Expected a table of positions that no wrapper manages, got {type(module).__name__}. {advice}"
            )


def _refuse_offloaded_tables(model: PreTrainedModel, log: UndoLog) -> None:
    """Refuse to restore tables that accelerate's hooks bring from where they keep them: from the longer ones."""
    for path, module in tables_of(model).items():
        if module.weight.is_meta and log.knows(module, "weight"):
            raise UnsupportedModelError(
                f"Expected {path} in memory, got it offloaded. Call "
                "accelerate.hooks.remove_hook_from_submodules(model), then undo."
            )


def find_patch(model: nn.Module) -> Patch | None:
    """Return the patch in force on a model, its backbone, or a wrapper; `None` without a patch."""
    inner = unwrap(model)
    state = mark_of(inner)
    if state is None:
        return None
    known: Patch | None = None if state.handle is None else state.handle()
    if known is None:
        known = Patch(state.root() or inner, state)
        state.handle = weakref.ref(known)
    return known


def unpatched(model: nn.Module) -> PreTrainedModel:
    """Return the model inside wrappers.

    Raises:
        AlreadyPatchedError: it carries a patch.
    """
    patch = find_patch(model)
    if patch is not None:
        raise AlreadyPatchedError(
            f"Expected a model without a patch, got one under {patch.plan.describe()!r}. "
            "Run unpatch_model(model) first."
        )
    return unwrap(model)


def unpatch_model(model: nn.Module) -> None:
    """Undo the patch of a model, also through wrappers.

    Raises:
        NotPatchedError: the model carries none.
    """
    patch = find_patch(model)
    if patch is None:
        raise NotPatchedError("the model carries no patch; patch_model(model, ...) makes one")
    patch.undo()


def load_patched(directory: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Open a saved patched model with its patch in force, so that the patch can be described and undone.

    It does not matter what saved it: `patch.save_pretrained`, `model.save_pretrained`, a `Trainer`, or `push_to_hub`.

    Args:
        directory (`str` or `Path`): the saved directory, or a Hub id (`user/name`, `user/name@revision`).
        kwargs: passed to `from_pretrained` (`dtype`, `device_map`, ...).

    Returns:
        [`PreTrainedModel`]: patched; `unpatch_model` gives the model as it was before it was patched. A learned table
        that something other than `patch.save_pretrained` saved cannot be undone: the rows before the patch are lost.

    Raises:
        PlanError: no plan there, or a corrupt one.
        PlanMismatchError: the plan does not fit the weights beside it.
        CheckpointError: a directory that cannot be trusted.
    """
    return Patch.from_pretrained(directory, **kwargs).model
