"""From a model, and from documents where there are some, to a diagnosis."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedModel

from ..decode import MAX_NUMBER
from ..deprecation import renamed_arguments
from ..errors import AlreadyPatchedError, InvalidParameterError, NoEffectError, PosExtError, UnsupportedModelError
from ..evaluation.texts.documents import as_documents
from ..evaluation.texts.files import portable
from ..methods import Method, as_method, list_methods
from ..methods.frequencies import first_rotary
from ..packages import machine, versions_of
from ..patching import detect_scheme, find_patch, patch_model
from ..patching.detect import unwrap
from ..patching.observe import attends_both_ways, frequencies_in_force, slope_scale, table_rows
from ..plan import ExtensionPlan
from ..scheme import PositionalScheme
from .diagnosis import Diagnosis
from .distances import bucket_table, reach_table
from .phases import critical_dimension, frequency_table, phase_table
from .reading import long_rows, read_documents
from .signals import position_signal
from .table_rows import has_pattern, row_statistics, untrained_from
from .verdict import reason, verdict

logger = logging.getLogger(__name__)

FACTOR = 4
"""How many times the trained length is looked at where no target is given."""

UNKNOWN_TARGET = 2048
"""Tokens that are looked at where nothing tells the trained length either."""

REFUSALS = (NoEffectError, UnsupportedModelError)
"""What a model says to a method that extends its scheme, and yet cannot be put in force on it."""

Plans = Mapping[str, ExtensionPlan | None]
"""What to compare by name; `None` is the model as it is."""


@renamed_arguments(original_length="trained_length")
def diagnose(
    model: nn.Module,
    tokenizer: Any | None = None,
    documents: Any | None = None,
    *,
    methods: Sequence[str | Method] | None = None,
    target_length: int | None = None,
    trained_length: int | None = None,
    start: int = 0,
    seed: int = 0,
) -> Diagnosis:
    """
    Say how a model encodes position, how far that was trained, and what becomes of longer input.

    Without documents no text runs through the model: the scheme, its class, the trained length and where that number
    comes from, and what the numbers of the scheme tell. With documents also the loss by position, the token from which
    on it departs from its level, and how sharp attention is by position.

    The level is the loss of the same tokens when the model sees only the last few before each: a quarter of the
    trained length, or a sixteenth of what is read. What hard and easy passages do to both cancels, so that a few
    documents are enough.

    Args:
        model (`PreTrainedModel`): with weights and without a patch; or a PEFT or DDP wrapper of one. It is as before
            afterwards.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed with documents.
        documents (`list[Document]`, or what [`load_documents`] takes, *optional*): texts, longer than training.
        methods (`Sequence[str | Method]`, *optional*): to draw beside the model as it is, and to measure if there are
            documents. Without it, all that apply are drawn, and none is measured.
        target_length (`int`, *optional*): tokens to look at; by default the length that the model ships for by its own
            scaling, else four times the trained length, or less where documents are shorter. Without documents what it
            takes does not grow with the target: signals are samples of at most 2,048 columns.
        trained_length (`int`, *optional*): trained length in tokens; overrides what the model states.
        start (`int`, *optional*, defaults to 0): tokens to leave out at the beginning of each document (front matter).
        seed (`int`, *optional*, defaults to 0): of bootstrap intervals.

    Returns:
        [`Diagnosis`]: with `verdict`, `tables`, `to_dict()`, `plot(path)`.

    Raises:
        AlreadyPatchedError: the model carries a patch.
        InvalidParameterError: documents without tokenizer, or lengths that cannot be.
        MethodNotApplicableError: a method that was asked for is for another scheme.
        DocumentError: no documents, or none that is longer than training.
        EvaluationError: the loss is no better than a guess.
        UnsupportedModelError: not a transformers model, on the meta device, or documents for a model that is no
            causal language model.
    """
    inner = unwrap(model)
    patch = find_patch(inner)
    if patch is not None:
        raise AlreadyPatchedError(
            f"the model carries the patch {patch.plan.describe()!r}, and a diagnosis is of the model as it is; undo "
            "it first: unpatch_model(model)"
        )
    if (tokenizer is None) != (documents is None):
        missing = "tokenizer" if tokenizer is None else "documents"
        raise InvalidParameterError(f"{missing} is missing; give both tokenizer and documents, or neither")
    if trained_length is not None and trained_length < 1:
        raise InvalidParameterError(f"Expected a trained_length of at least 1 token, got {trained_length}.")
    scheme = detect_scheme(inner)
    with torch.device("cpu"):  # where numbers are drawn, whatever the default device of the process is
        found = _structure(inner, scheme, trained_length)
    target = target_length or _target(found)
    if not 2 <= target <= MAX_NUMBER:
        raise InvalidParameterError(f"target_length is {target}; give a number of tokens, 2 to {MAX_NUMBER}")
    found = replace(found, target_length=target)
    asked = [as_method(method) for method in methods or ()]
    lengths = {"target_length": target, "trained_length": found.trained_length}
    wanted = {plan.method: plan for method in asked if not (plan := method.plan(scheme, **lengths)).changes_nothing}
    with torch.device("cpu"):
        found, applicable = _with_remedies(inner, found, wanted)
    if documents is not None:  # no table is made that is longer; and reading takes long, so that refusals come before
        texts = as_documents(documents)
        rows = long_rows(texts, tokenizer, found, start, exactly=target_length is not None)
        wanted, found = _accepted(inner, found, wanted)
    drawn: Plans = {"none": None, **(applicable if methods is None else wanted)}
    with torch.device("cpu"):
        found = _with_signals(inner, found, drawn)
    if documents is not None:
        found = read_documents(model, texts, rows, found, wanted, seed)
    return replace(found, verdict=verdict(found))


def _structure(model: PreTrainedModel, scheme: PositionalScheme, given: int | None) -> Diagnosis:
    """What can be read from the weights alone."""
    tables: dict[str, pd.DataFrame] = {}
    notes: list[str] = []
    trained, source, untrained, critical = scheme.trained_length, scheme.trained_length_source, None, None
    if scheme.kind == "learned" and scheme.table is not None:
        rows = [table.numpy() for table in table_rows(model).values()]
        tables["rows"] = row_statistics(rows[0])
        ends = [first for table in rows if (first := untrained_from(table)) is not None]
        if ends:
            untrained, trained = (min(ends), scheme.table.usable - 1), min(ends)
            source = f"statistics of the table: rows from {trained} on are unlike their neighbours"
        elif not all(has_pattern(table) for table in rows):
            notes.append("no part of the table is smoother than random rows, so that it tells no trained length")
    if scheme.kind == "alibi":
        tables["reach"] = reach_table(scheme.slopes, slope_scale(model))
    if scheme.buckets is not None and not scheme.obstacle:
        tables["buckets"] = bucket_table(model, scheme.buckets)
    if given is not None:
        trained, source = given, "given"
    if scheme.kind == "rotary" and scheme.rotaries and trained:
        critical = critical_dimension(first_rotary(scheme), trained)
    name = portable(model.config.name_or_path) or type(model).__name__
    versions = versions_of("hf_posext", "transformers", "torch")
    return Diagnosis(
        name,
        scheme,
        reason(scheme),
        trained,
        source,
        target_length=0,
        remedies=(),
        untrained=untrained,
        critical_dimension=critical,
        tables=tables,
        notes=tuple(notes),
        provenance={"versions": versions, "machine": machine()},
    )


def _target(found: Diagnosis) -> int:
    trained, shipped = found.trained_length, found.scheme.shipped_length
    if trained is None:
        return UNKNOWN_TARGET
    scaled = found.scheme.kind == "rotary" and shipped is not None and shipped > trained
    return shipped if scaled and shipped else FACTOR * trained


def _with_remedies(
    model: PreTrainedModel, found: Diagnosis, wanted: Mapping[str, ExtensionPlan]
) -> tuple[Diagnosis, dict[str, ExtensionPlan]]:
    """The methods that extend, as far as they need no parameters, and their plans for the target; for rotary positions
    also what they and the methods wanted make of the phases. One that leaves phases new is no remedy."""
    scheme, trained, target = found.scheme, found.trained_length, found.target_length
    original = trained or UNKNOWN_TARGET // FACTOR
    goal = target if target > original else FACTOR * original
    causal = scheme.kind != "rotary" or not attends_both_ways(model)
    plans: dict[str, ExtensionPlan] = {}
    for name in (info.name for info in list_methods(scheme.kind) if not scheme.obstacle):
        method = as_method(name)
        if not method.needs_factor:
            continue
        try:
            plan = method.plan(scheme, target_length=goal, trained_length=original)
        except PosExtError as error:
            logger.info("left out of the diagnosis: %s", error)
        else:
            if causal or not plan.parts:  # remapping is defined for causal attention
                plans[name] = plan
    found = replace(found, remedies=tuple(plans))
    drawn = plans if trained and goal == target else {}
    if scheme.kind != "rotary" or scheme.obstacle or not scheme.rotaries or trained is None:
        return found, drawn
    in_force = frequencies_in_force(model, target)
    phases = phase_table(scheme, in_force, {"none": None, **drawn, **wanted}, trained, target)
    tables = {"frequencies": frequency_table(scheme, in_force, trained), "phases": phases}
    new = set(phases[phases.new].method)
    kept = tuple(name for name in plans if name not in new)
    return replace(found, tables={**found.tables, **tables}, remedies=kept), drawn


def _accepted(
    model: PreTrainedModel, found: Diagnosis, plans: Mapping[str, ExtensionPlan]
) -> tuple[dict[str, ExtensionPlan], Diagnosis]:
    """The plans that the model lets be put in force, and a note for each of the others."""
    refused: dict[str, str] = {}
    for name, plan in plans.items():
        try:
            with patch_model(model, plan):
                pass
        except REFUSALS as error:
            refused[name] = str(error)
    return {name: plan for name, plan in plans.items() if name not in refused}, _without(found, refused)


def _with_signals(model: PreTrainedModel, found: Diagnosis, plans: Plans) -> Diagnosis:
    """What is drawn, of the methods that the model does not refuse."""
    signals, refused = [], {}
    for name, plan in plans.items():
        try:
            signal = position_signal(model, found.scheme, plan, found.target_length, found.trained_length)
        except REFUSALS as error:
            refused[name] = str(error)
        else:
            signals += [] if signal is None else [signal]
    return replace(_without(found, refused), signals=tuple(signals))


def _without(found: Diagnosis, refused: Mapping[str, str]) -> Diagnosis:
    """A method that the model refuses is no remedy, and a note says why."""
    kept = tuple(name for name in found.remedies if name not in refused)
    return replace(found, remedies=kept, notes=(*found.notes, *(f"{name}: {why}" for name, why in refused.items())))
