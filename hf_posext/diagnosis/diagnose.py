"""Diagnosis of a model from its weights and, if given, from documents."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..decode import MAX_TOKENS
from ..deprecation import renamed_arguments
from ..errors import AlreadyPatchedError, InvalidParameterError, NoEffectError, PosExtError, UnsupportedModelError
from ..evaluation.documents import Document, as_documents
from ..evaluation.reading import portable
from ..methods import Method, as_method, list_methods
from ..methods.frequencies import first_rotary
from ..packages import machine, versions_of
from ..patching import detect_scheme, find_patch, patch_model, unwrap
from ..patching.observe import attends_both_ways, frequencies_in_force, slope_scale, table_rows
from ..plan import ExtensionPlan
from ..scheme import PositionalScheme
from .diagnosis import REASONS, Diagnosis, verdict
from .reading import long_rows, read_documents
from .signals import critical_dimension, frequency_table, phase_table, position_signal
from .weights import bucket_table, has_pattern, reach_table, row_statistics, untrained_from

logger = logging.getLogger(__name__)

FACTOR = 4
"""Default target length, as a multiple of the trained length."""

UNKNOWN_TARGET = 2048
"""Default target length in tokens if the trained length is unknown."""

REFUSALS = (NoEffectError, UnsupportedModelError)
"""Refusals of a model to a method that applies to its scheme."""

Plans = Mapping[str, ExtensionPlan | None]
"""Plans by name; `None` is the model as it is."""


@renamed_arguments(original_length="trained_length")
def diagnose(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    documents: Sequence[Document] | str | None = None,
    *,
    methods: Sequence[str | Method] | None = None,
    target_length: int | None = None,
    trained_length: int | None = None,
    start: int = 0,
    seed: int = 0,
) -> Diagnosis:
    """Diagnose the positions of a model, its trained length, and the effect of longer input.

    Without documents no text runs through the model. The diagnosis then has the scheme, its kind of generalization,
    the trained length with its source, and the statistics of the scheme's own numbers. With documents it also has the
    loss by position, the token from which on the loss departs from its level, and the entropy of attention by
    position.

    The level is the loss of the same tokens in a short context: a quarter of the trained length, or a sixteenth of
    what is read. Hard and easy passages raise and lower both, and cancel, so that a few documents are enough.

    Args:
        model (`PreTrainedModel`): with weights and without a patch; or a PEFT or DDP wrapper of one. It is not
            changed.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): required with documents.
        documents (`list[Document]`, or an argument of [`load_documents`], *optional*): texts longer than training.
        methods (`Sequence[str | Method]`, *optional*): methods to draw beside the model as it is and, with documents,
            to measure. By default all that apply are drawn, and none is measured.
        target_length (`int`, *optional*): tokens to cover. Defaults to the length that the model ships for by its own
            scaling, or else to four times the trained length; less if documents are shorter. Without documents the
            cost does not grow with the target: signals are samples of at most 2,048 columns.
        trained_length (`int`, *optional*): trained length in tokens; overrides what the model states.
        start (`int`, *optional*, defaults to 0): tokens to leave out at the beginning of each document (front matter).
        seed (`int`, *optional*, defaults to 0): seed of the bootstrap intervals.

    Returns:
        [`Diagnosis`]: with `verdict`, `tables`, `describe()`, `to_dict()`, `save(path)` and `plot(path)`.

    Raises:
        AlreadyPatchedError: the model carries a patch.
        InvalidParameterError: documents without a tokenizer, or lengths out of bounds.
        MethodNotApplicableError: a method is for another scheme.
        DocumentError: no document is longer than training.
        EvaluationError: the loss is that of a guess.
        UnsupportedModelError: not a transformers model, a model on the meta device, or documents for a model that is
            not a causal language model.
    """
    inner = unwrap(model)
    patch = find_patch(inner)
    if patch is not None:
        raise AlreadyPatchedError(
            f"Expected a model without a patch, got one under {patch.plan.describe()!r}. "
            "Run unpatch_model(model) first."
        )
    if (tokenizer is None) != (documents is None):
        given, missing = ("documents", "tokenizer") if tokenizer is None else ("tokenizer", "documents")
        raise InvalidParameterError(f"{given} requires {missing}. Pass both or neither.")
    if trained_length is not None and trained_length < 1:
        raise InvalidParameterError(f"Expected a trained_length of at least 1 token, got {trained_length}.")
    scheme = detect_scheme(inner)
    with torch.device("cpu"):  # whatever the default device of the process is
        diagnosis = _structure(inner, scheme, trained_length)
    target = _target(diagnosis) if target_length is None else target_length
    if not 2 <= target <= MAX_TOKENS:
        raise InvalidParameterError(f"Expected a target_length of 2 to {MAX_TOKENS} tokens, got {target}.")
    diagnosis = replace(diagnosis, target_length=target)
    lengths = {"target_length": target, "trained_length": diagnosis.trained_length}
    planned = [as_method(method).plan(scheme, **lengths) for method in methods or ()]
    chosen = {plan.method: plan for plan in planned if not plan.changes_nothing}
    with torch.device("cpu"):
        diagnosis, applicable = _with_remedies(inner, diagnosis, chosen)
    if documents is not None:  # refusals of the model come before the minutes of reading
        texts = as_documents(documents)
        rows = long_rows(texts, tokenizer, diagnosis, start, exactly=target_length is not None)
        chosen, diagnosis = _accepted(inner, diagnosis, chosen)
    drawn: Plans = {"none": None, **(applicable if methods is None else chosen)}
    with torch.device("cpu"):
        diagnosis = _with_signals(inner, diagnosis, drawn)
    if documents is not None:
        diagnosis = read_documents(model, texts, rows, diagnosis, chosen, seed)
    return replace(diagnosis, verdict=verdict(diagnosis))


def _structure(model: PreTrainedModel, scheme: PositionalScheme, given: int | None) -> Diagnosis:
    """Return the diagnosis of the weights alone, without remedies and signals."""
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
            notes.append("no window of the table is smoother than random rows, so that it shows no trained length")
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
        REASONS[scheme.kind],
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


def _target(diagnosis: Diagnosis) -> int:
    trained, shipped = diagnosis.trained_length, diagnosis.scheme.shipped_length
    if trained is None:
        return UNKNOWN_TARGET
    scaled = diagnosis.scheme.kind == "rotary" and shipped is not None and shipped > trained
    return shipped if scaled and shipped else min(FACTOR * trained, MAX_TOKENS)


def _with_remedies(
    model: PreTrainedModel, diagnosis: Diagnosis, chosen: Mapping[str, ExtensionPlan]
) -> tuple[Diagnosis, dict[str, ExtensionPlan]]:
    """Add the methods that need no further parameters, and return their plans for the target.

    For rotary positions, add the phases under these and the chosen methods. A method that leaves phases unseen is
    dropped from the remedies.
    """
    scheme, trained, target = diagnosis.scheme, diagnosis.trained_length, diagnosis.target_length
    base = trained or UNKNOWN_TARGET // FACTOR
    goal = target if target > base else FACTOR * base
    causal = scheme.kind != "rotary" or not attends_both_ways(model)
    plans: dict[str, ExtensionPlan] = {}
    for name in (info.name for info in list_methods(scheme.kind) if not scheme.obstacle):
        method = as_method(name)
        if not method.needs_factor:
            continue
        try:
            plan = method.plan(scheme, target_length=goal, trained_length=base)
        except PosExtError as error:
            logger.info("left out of the diagnosis: %s", error)
        else:
            if causal or not plan.bands:  # remapping is defined for causal attention
                plans[name] = plan
    diagnosis = replace(diagnosis, remedies=tuple(plans))
    drawn = plans if trained and goal == target else {}
    if scheme.kind != "rotary" or scheme.obstacle or not scheme.rotaries or trained is None:
        return diagnosis, drawn
    in_force = frequencies_in_force(model, target)
    phases = phase_table(scheme, in_force, {"none": None, **drawn, **chosen}, trained, target)
    tables = {"frequencies": frequency_table(scheme, in_force, trained), "phases": phases}
    unseen = set(phases[phases.new].method)
    kept = tuple(name for name in plans if name not in unseen)
    return replace(diagnosis, tables={**diagnosis.tables, **tables}, remedies=kept), drawn


def _accepted(
    model: PreTrainedModel, diagnosis: Diagnosis, plans: Mapping[str, ExtensionPlan]
) -> tuple[dict[str, ExtensionPlan], Diagnosis]:
    """Return the plans that the model accepts, and the diagnosis with a note for each other one."""
    refused: dict[str, str] = {}
    for name, plan in plans.items():
        try:
            with patch_model(model, plan):
                pass
        except REFUSALS as error:
            refused[name] = str(error)
    return {name: plan for name, plan in plans.items() if name not in refused}, _without(diagnosis, refused)


def _with_signals(model: PreTrainedModel, diagnosis: Diagnosis, plans: Plans) -> Diagnosis:
    """Add the signals under the plans that the model accepts."""
    signals, refused = [], {}
    for name, plan in plans.items():
        try:
            signal = position_signal(model, diagnosis.scheme, plan, diagnosis.target_length, diagnosis.trained_length)
        except REFUSALS as error:
            refused[name] = str(error)
        else:
            signals += [] if signal is None else [signal]
    return replace(_without(diagnosis, refused), signals=tuple(signals))


def _without(diagnosis: Diagnosis, refused: Mapping[str, str]) -> Diagnosis:
    """Drop the refused methods from the remedies, and note the reasons."""
    kept = tuple(name for name in diagnosis.remedies if name not in refused)
    return replace(
        diagnosis, remedies=kept, notes=(*diagnosis.notes, *(f"{name}: {why}" for name, why in refused.items()))
    )
