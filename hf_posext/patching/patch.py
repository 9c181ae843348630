"""A plan goes in, a Patch comes out."""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import AlreadyPatchedError, InvalidParameterError, NotPatchedError, PlanMismatchError
from ..methods import Method, as_method
from ..plan import ExtensionPlan
from .alibi import apply_slopes
from .checkpoint import refuse_adapter, save_patched
from .detect import detect_scheme, unwrap
from .frequencies import apply_frequencies
from .journal import Journal
from .learned_table import apply_table, follow_tables, replaced_tables, tables_of
from .limits import raise_limits
from .relative_bias import apply_buckets
from .remap.probe import apply_late_rotation
from .sinusoidal import apply_sinusoids

logger = logging.getLogger(__name__)


class Patch:
    """A plan in force on a live model, until [`~Patch.undo`].

    Made by [`patch_model`]. As a context manager it is undone on exit, also after an exception.

    Attributes:
        model (`PreTrainedModel`): the patched model, without PEFT or DDP wrappers.
        plan (`ExtensionPlan`): what was done to it.
        native_obstacle (`str`, *optional*): why a checkpoint of the patched model needs this package to be opened;
            `None` where plain transformers opens it with equal logits.
    """

    def __init__(self, model: PreTrainedModel, plan: ExtensionPlan, tokenizer: Any | None = None) -> None:
        self.model = model
        self.plan = plan
        self.tokenizer = tokenizer
        self.native_obstacle: str | None = None
        self._journal = Journal()
        try:
            if not plan.changes_nothing:
                for planned, apply in (
                    (plan.rotaries, apply_frequencies),
                    (plan.rotates_late, apply_late_rotation),
                    (plan.table, apply_table),
                    (plan.slopes, apply_slopes),
                    (plan.buckets, apply_buckets),
                    (plan.sinusoids, apply_sinusoids),
                ):
                    if planned:
                        self.native_obstacle = apply(model, plan, self._journal) or self.native_obstacle
                raise_limits(model, plan.target_length, tokenizer, self._journal)
            tables = tables_of(model).items()
            self._tables = {path: module for path, module in tables if self._journal.knows(module, "weight")}
            self._journal.set(model, "_posext_patch", self)
        except BaseException:
            self._journal.undo()
            raise

    @property
    def active(self) -> bool:
        """Whether the patch is in force."""
        return vars(self.model).get("_posext_patch") is self

    def describe(self) -> str:
        """A few lines: the scheme, what was done, and how the patched model can be saved."""
        if self.plan.changes_nothing:
            saved = "nothing was changed"
        elif self.native_obstacle is None:
            saved = "saves as a checkpoint that plain transformers opens"
        else:
            saved = f"saves with its plan beside the weights: {self.native_obstacle}"
        state = "in force" if self.active else "undone"
        return f"{self.plan.scheme.describe()}\n{self.plan.describe()}\n{state}; {saved}"

    def undo(self) -> None:
        """Put the model back, to the bit.

        Raises:
            NotPatchedError: the patch is not in force any more.
            UnsupportedModelError: an adapter trains a copy of a table that was stretched; merge or drop it first.
        """
        if not self.active:
            raise NotPatchedError(f"the patch {self.plan.method!r} is undone already")
        follow_tables(self.model, self._tables, self._journal)
        self._journal.undo()

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
        follow_tables(self.model, self._tables, self._journal)
        save_patched(self.model, self.plan, self.tokenizer, replaced_tables(self.model, self._journal), directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            self.undo()


def patch_model(
    model: nn.Module,
    method: str | Method | ExtensionPlan,
    *,
    factor: float | None = None,
    target_length: int | None = None,
    original_length: int | None = None,
    tokenizer: Any | None = None,
) -> Patch:
    """Change how a model encodes position, in place, so that it reads longer than it was trained to.

    Weights are neither changed nor copied, but tables of positions, which are replaced by longer ones. Limits that
    would cap the longer input are raised (`max_position_embeddings`, generation, and the tokenizer's if given).
    `undo` restores all of it to the bit.

    Args:
        model (`PreTrainedModel`): or a PEFT, DDP or `torch.compile` wrapper of one.
        method (`str`, `Method` or `ExtensionPlan`): a name (`"yarn"`, or several joined by `+`: `"yarn+resonance"`),
            a method object with its hyper-parameters (`YaRN(factor=8, beta_fast=32)`), or a plan made before.
        factor (`float`, *optional*): how many times the length that the model was pre-trained at. A method object's
            own factor goes first.
        target_length (`int`, *optional*): the same, in tokens.
        original_length (`int`, *optional*): trained length in tokens, overriding what the config says.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): its `model_max_length` is raised, and `save_pretrained`
            saves it with the model.

    Returns:
        [`Patch`]: with `plan`, `describe()`, `undo()`, `save_pretrained(path)`; a context manager.

    Raises:
        UnknownMethodError: no such method; names the nearest.
        MethodNotApplicableError: the method is for another scheme; says what applies.
        InvalidParameterError: a factor or length that cannot be, or a target below the trained or shipped length.
        AlreadyPatchedError: the model carries a patch.
        NoEffectError: the positions of the model would not change.
        PlanMismatchError: a plan made for a model with another scheme.
        UnsupportedModelError: not a transformers model, or one that cannot be patched; says why.
    """
    inner = unwrap(model)
    in_force = find_patch(inner)
    if in_force is not None:
        raise AlreadyPatchedError(
            f"the model carries the patch {in_force.plan.describe()!r}; undo it first: unpatch_model(model)"
        )
    scheme = detect_scheme(inner)
    if isinstance(method, ExtensionPlan):
        if factor is not None or target_length is not None or original_length is not None:
            raise InvalidParameterError("a plan has its lengths already; give a method to choose others")
        if not scheme.same_positions(method.scheme):
            raise PlanMismatchError(
                f"the plan is for ({method.scheme.describe()}); the model is ({scheme.describe()}); "
                f"plan again for this model: patch_model(model, {method.method!r}, factor={method.factor:g})"
            )
        plan = method
    else:
        lengths = {"factor": factor, "target_length": target_length, "original_length": original_length}
        plan = as_method(method).plan(scheme, **lengths)  # type: ignore[arg-type]
    with torch.device("cpu"):  # not the default device of the process, which may be another than the model's, too
        patch = Patch(inner, plan, tokenizer)
    logger.info("patched: %s", plan.describe())
    return patch


def find_patch(model: nn.Module) -> Patch | None:
    """The patch in force on a model, whichever way it is wrapped; `None` where it carries none."""
    patch: Patch | None = vars(unwrap(model)).get("_posext_patch")
    return patch


def unpatch_model(model: nn.Module) -> None:
    """Undo the patch that a model carries, whichever way the model is wrapped now.

    Raises:
        NotPatchedError: the model carries none.
    """
    patch = find_patch(model)
    if patch is None:
        raise NotPatchedError("the model carries no patch; patch_model(model, ...) makes one")
    patch.undo()
