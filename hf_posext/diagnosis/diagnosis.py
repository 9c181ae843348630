"""Diagnosis of a model from its weights and, if given, from documents, with its verdict in two sentences."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..decode import MAX_TOKENS, Count, Index
from ..errors import (
    InvalidParameterError,
    NoEffectError,
    PosExtError,
    RenamedAttribute,
    UnsupportedModelError,
    renamed_arguments,
)
from ..escaping import html_table, visible
from ..evaluation.config import checked
from ..evaluation.documents import Document, as_documents
from ..evaluation.reading import portable, write_atomically
from ..methods import Method, as_method, list_methods
from ..methods.rotary import first_rotary
from ..packages import machine, versions_of
from ..patching import detect_scheme, patch_model
from ..patching.observe import attends_both_ways, frequencies_in_force, slope_scale, table_rows
from ..patching.patch import unpatched
from ..plan import ExtensionPlan
from ..scheme import KINDS, PositionalScheme
from . import weights
from .reading import long_rows, read_documents
from .weights import Signal

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

DIGITS = 6
"""Significant digits of the numbers in a file."""

EARLY = 0.9
"""Share of the trained length before which a departure means that the model was trained on less."""


@dataclass(frozen=True)
class Diagnosis:
    """Diagnosis of a model: its positions, its trained length, and the effect of longer input.

    Returned by [`diagnose`].

    Args:
        model (`str`): name of the model.
        scheme (`PositionalScheme`): positional scheme of the model.
        reason (`str`): reason for its kind of generalization.
        trained_length (`int`, *optional*): tokens per sequence in training; `None` if unknown.
        trained_length_source (`str`): source of that number.
        target_length (`int`): tokens that the diagnosis covers.
        remedies (`tuple[str, ...]`): names of the methods that bring the target back to what training has shown.
        untrained (`tuple[int, int]`, *optional*): first and last row of a learned table that look untrained, counted
            from position 0.
        critical_dimension (`int`, *optional*): rotary channels of a head that rotate fully within training.
        departure (`int`, *optional*): index of the token from which on the loss stays above its level; `None` if it
            does not, and without documents.
        departure_interval (`tuple[int, int]`, *optional*): 95 % interval over documents.
        rise (`float`, *optional*): mean rise from there on, in nats per token.
        tables (`Mapping[str, pandas.DataFrame]`): `rows` (learned tables), `frequencies` and `phases` (rotary),
            `reach` (ALiBi), `buckets` (relative), and with documents `losses` and `attention`.
        signals (`tuple[Signal, ...]`): signals that `plot` draws: the model as it is, then each method.
        notes (`tuple[str, ...]`): methods and tables that are missing, with the reason.
        provenance (`Mapping`): versions, and the documents that were read.
        verdict (`str`): two sentences.
    """

    model: str
    scheme: PositionalScheme
    reason: str
    trained_length: int | None
    trained_length_source: str
    target_length: int
    remedies: tuple[str, ...]
    untrained: tuple[int, int] | None = None
    critical_dimension: int | None = None
    departure: int | None = None
    departure_interval: tuple[int, int] | None = None
    rise: float | None = None
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    signals: tuple[Signal, ...] = ()
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    verdict: str = ""

    def __repr__(self) -> str:
        return f"Diagnosis({self.describe()})"

    def _repr_html_(self) -> str:
        return html_table(self._facts())

    def describe(self) -> str:
        """Return the facts without the verdict on one line."""
        return visible("; ".join(f"{name} {value}" for name, value in self._facts().items() if name != "verdict"))

    def _facts(self) -> dict[str, str]:
        return {
            "model": self.model,
            "positions": f"{self.scheme.kind} ({self.generalization})",
            "trained length": "unknown" if self.trained_length is None else str(self.trained_length),
            "target length": str(self.target_length),
            "remedies": ", ".join(self.remedies) or "none",
            "verdict": self.verdict,
        }

    @property
    def generalization(self) -> str:
        """`none`, `extrapolation` or `interpolation`."""
        return self.scheme.generalization

    def to_dict(self) -> dict[str, Any]:
        """Return everything except the signals in plain JSON types.

        Tables become lists of rows. Numbers that are not finite become `None`.
        """
        tables = {name: [_plain(row) for row in table.to_dict("records")] for name, table in self.tables.items()}
        content = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "signals"}
        content |= {"generalization": self.generalization, "scheme": self.scheme.to_dict()}
        content |= {"provenance": dict(self.provenance), "tables": tables}
        plain: dict[str, Any] = json.loads(json.dumps(content, allow_nan=False))
        return plain

    def save(self, path: str | Path) -> Path:
        """Write `to_dict()` to a JSON file, one row of a table to a line."""
        content = self.to_dict()
        tables = content.pop("tables")
        lines = [
            f"  {json.dumps(name)}: [\n   " + ",\n   ".join(json.dumps(row) for row in rows) + "\n  ]"
            for name, rows in tables.items()
        ]
        head = json.dumps(content, indent=1)[:-2]
        return write_atomically(path, f'{head},\n "tables": {{\n' + ",\n".join(lines) + "\n }\n}\n")

    save_json = RenamedAttribute("save")

    def plot(self, path: str | Path) -> None:
        """Draw the signals, and the loss by position where it was measured.

        Args:
            path (`str` or `Path`): the PNG to write, 1800 pixels wide; replaced in one step.
        """
        from ..reporting.signals import plot_diagnosis

        plot_diagnosis(self, path)


def _plain(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a row with numbers of Python, rounded; NaN and infinity become `None`."""
    return {str(key): _number(getattr(value, "item", lambda value=value: value)()) for key, value in row.items()}


def _number(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


FACTOR = 4
"""Default target length, as a multiple of the trained length."""

UNKNOWN_TARGET = 2048
"""Default target length in tokens if the trained length is unknown."""

REFUSALS = (NoEffectError, UnsupportedModelError)
"""Refusals of a model to a method that applies to its scheme."""

Plans = Mapping[str, ExtensionPlan | None]
"""Plans by name; `None` is the model as it is."""


@renamed_arguments(original_length="trained_length")
@checked
def diagnose(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    documents: Sequence[Document] | Sequence[str] | datasets.Dataset | str | None = None,
    *,
    methods: Sequence[str | Method] | None = None,
    target_length: int | None = None,
    trained_length: Count | None = None,
    start: Index = 0,
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
    inner = unpatched(model)
    if (tokenizer is None) != (documents is None):
        argument, counterpart = ("documents", "tokenizer") if tokenizer is None else ("tokenizer", "documents")
        raise InvalidParameterError(f"{argument} requires {counterpart}. Pass both or neither.")
    scheme = detect_scheme(inner)
    with torch.device("cpu"):  # whatever the default device of the process is
        diagnosis = _structure(inner, scheme, trained_length)
    target = _target(diagnosis) if target_length is None else target_length
    if not 2 <= target <= MAX_TOKENS:
        raise InvalidParameterError(f"Expected a target_length of 2 to {MAX_TOKENS} tokens, got {target}.")
    diagnosis = replace(diagnosis, target_length=target)
    lengths = {"target_length": target, "trained_length": diagnosis.trained_length}
    planned = [as_method(method).plan(scheme, **lengths) for method in methods or ()]
    to_measure = {plan.method: plan for plan in planned if not plan.changes_nothing}
    with torch.device("cpu"):
        diagnosis, applicable = _with_remedies(inner, diagnosis, to_measure)
    if documents is not None:  # refusals of the model come before the minutes of reading
        texts = as_documents(documents)
        rows = long_rows(texts, tokenizer, diagnosis, start, exactly=target_length is not None)
        to_measure, diagnosis = _accepted(inner, diagnosis, to_measure)
    drawn: Plans = {"none": None, **(applicable if methods is None else to_measure)}
    with torch.device("cpu"):
        diagnosis = _with_signals(inner, diagnosis, drawn)
    if documents is not None:
        diagnosis = read_documents(model, texts, rows, diagnosis, to_measure, seed)
    return replace(diagnosis, verdict=verdict(diagnosis))


def _structure(model: PreTrainedModel, scheme: PositionalScheme, trained_length: int | None) -> Diagnosis:
    """Return the diagnosis of the weights alone, without remedies and signals."""
    tables: dict[str, pd.DataFrame] = {}
    notes: list[str] = []
    trained, source, untrained, critical = scheme.trained_length, scheme.trained_length_source, None, None
    if scheme.kind == "learned" and scheme.table is not None:
        rows = [table.numpy() for table in table_rows(model).values()]
        tables["rows"] = weights.row_statistics(rows[0])
        ends = [first for table in rows if (first := weights.untrained_from(table)) is not None]
        if ends:
            untrained, trained = (min(ends), scheme.table.usable - 1), min(ends)
            source = f"statistics of the table: rows from {trained} on are unlike their neighbours"
        elif not all(weights.has_pattern(table) for table in rows):
            notes.append("no window of the table is smoother than random rows, so that it shows no trained length")
    if scheme.kind == "alibi":
        tables["reach"] = weights.reach_table(scheme.slopes, slope_scale(model))
    if scheme.buckets is not None and not scheme.obstacle:
        tables["buckets"] = weights.bucket_table(model, scheme.buckets)
    if trained_length is not None:
        trained, source = trained_length, "given"
    if scheme.kind == "rotary" and scheme.rotaries and trained:
        critical = weights.critical_dimension(first_rotary(scheme), trained)
    name = portable(model.config.name_or_path) or type(model).__name__
    versions = versions_of("hf_posext", "transformers", "torch")
    return Diagnosis(
        name,
        scheme,
        KINDS[scheme.kind].why,
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
    model: PreTrainedModel, diagnosis: Diagnosis, to_measure: Mapping[str, ExtensionPlan]
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
    phases = weights.phase_table(scheme, in_force, {"none": None, **drawn, **to_measure}, trained, target)
    tables = {"frequencies": weights.frequency_table(scheme, in_force, trained), "phases": phases}
    unseen = set(phases[phases.new].method)
    remedies = tuple(name for name in plans if name not in unseen)
    return replace(diagnosis, tables={**diagnosis.tables, **tables}, remedies=remedies), drawn


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
            signal = weights.position_signal(
                model, diagnosis.scheme, plan, diagnosis.target_length, diagnosis.trained_length
            )
        except REFUSALS as error:
            refused[name] = str(error)
        else:
            signals += [] if signal is None else [signal]
    return replace(_without(diagnosis, refused), signals=tuple(signals))


def _without(diagnosis: Diagnosis, refused: Mapping[str, str]) -> Diagnosis:
    """Drop the refused methods from the remedies, and note the reasons."""
    remedies = tuple(name for name in diagnosis.remedies if name not in refused)
    return replace(
        diagnosis, remedies=remedies, notes=(*diagnosis.notes, *(f"{name}: {why}" for name, why in refused.items()))
    )


def verdict(diagnosis: Diagnosis) -> str:
    """Return two sentences: what breaks, where and why, and what to try."""
    return f"{_cause(diagnosis)}{_measured(diagnosis)}. {_advice(diagnosis)}."


def _cause(diagnosis: Diagnosis) -> str:
    kind, trained, target = diagnosis.scheme.kind, diagnosis.trained_length, diagnosis.target_length
    if kind == "learned" and diagnosis.scheme.table and trained:
        return _table(diagnosis, diagnosis.scheme.table.usable, trained)
    if kind == "rotary" and "phases" in diagnosis.tables:
        return _phases(diagnosis)
    if kind == "alibi":
        reach = diagnosis.tables["reach"].reach
        near = reach[reach < (trained or target)]
        far = "and every head sees as far back as in training"
        if len(near):
            heads = f"{len(near)} of {len(reach)} heads see no" if len(near) < len(reach) else "no head sees"
            far = f"though {heads} farther back than {near.max():.0f} tokens"
        return f"A distance costs a fixed price per token, so that no input is too long to be read, {far}"
    if kind == "relative" and "buckets" in diagnosis.tables:
        last = diagnosis.tables["buckets"]["first"].iloc[-1]
        return f"All distances of {last} tokens and more share one learned bias, so that far tokens look equally far"
    if kind == "sinusoidal":
        return f"The sines go on past the {_tokens(trained)} of training, where the model has never seen them"
    if kind == "none":
        return "Order comes from the causal mask or from a recurrent state, so that nothing ends at a length"
    return f"{diagnosis.scheme.model_type} has {kind} positions, of which nothing more can be read from the weights"


def _table(diagnosis: Diagnosis, rows: int, trained: int) -> str:
    lines = diagnosis.tables["rows"]
    if not diagnosis.untrained:
        smooth = lines.cosine.max() > weights.ALIKE
        state = "looks trained throughout" if smooth else "shows no trace of training, since no row is like the next"
        return (
            f"The table of learned positions ends at {rows} tokens and {state}; a longer input has no position to read"
        )
    first = diagnosis.untrained[0]
    before, after = lines[lines.end <= first].cosine.mean(), lines[lines.begin >= first].cosine.mean()
    return (
        f"Rows {first} to {diagnosis.untrained[1]} of the table of learned positions look untrained (neighbours have "
        f"a cosine of {after:.2f}, and of {before:.2f} before), so that text past {trained} tokens is placed by noise"
    )


def _phases(diagnosis: Diagnosis) -> str:
    lines = diagnosis.tables["phases"]
    as_is = lines[lines.method == "none"]
    trained, target = _tokens(diagnosis.trained_length), _tokens(diagnosis.target_length)
    if as_is.new.any():
        count, make = as_is.new.sum(), "make" if as_is.new.sum() > 1 else "makes"
        return (
            f"{count} of {len(as_is)} rotary pairs {make} less than one rotation within the {trained} of training, so "
            f"that an input of {target} needs phases that the model has never seen"
        )
    types = sorted({rotary.shipped_type for rotary in diagnosis.scheme.rotaries} - {"default"})
    shipped = f" with the {' and '.join(types)} scaling that it ships with" if types else ""
    return f"Every phase of an input of {target} is one that the {trained} of training have shown{shipped}"


def _measured(diagnosis: Diagnosis) -> str:
    if "losses" not in diagnosis.tables:
        return ""
    count, read, kept = (diagnosis.provenance[key] for key in ("documents", "read", "kept"))
    where = f"; on {len(count)} document{'s' if len(count) > 1 else ''} the loss "
    if diagnosis.departure is None and kept < read:
        rest = f"the {read - kept} tokens that were read after them are too few to tell"
        return f"{where}keeps its level in the first {kept} tokens, and {rest}"
    if diagnosis.departure is None:
        return f"{where}keeps its level up to the {read} tokens that were read"
    return f"{where}rises by {diagnosis.rise:.2f} nats per token from token {diagnosis.departure} on"


def _advice(diagnosis: Diagnosis) -> str:
    keep, read = _limit(diagnosis), diagnosis.provenance.get("kept", 0)
    if diagnosis.scheme.obstacle:
        return f"No method of hf_posext applies ({diagnosis.scheme.obstacle}); {keep}"
    names = ", ".join(diagnosis.remedies)
    if diagnosis.scheme.kind == "none" and diagnosis.departure is None:
        unread = "Documents would show how far the model can be trusted"
        return f"Nothing needs to be changed up to {read} tokens" if read else unread
    if not names:
        return f"No method of hf_posext applies; {keep}"
    if diagnosis.departure is not None:
        return f"Try {names}, or {keep}"
    if read > (diagnosis.trained_length or 0):
        return f"Nothing needs to be changed up to {read} tokens; to read farther, try {names}"
    if diagnosis.generalization == "extrapolation":
        texts = "More or longer documents" if "losses" in diagnosis.tables else "Documents"
        return f"{texts} would show whether it can be trusted there; if not, compare {names} with truncating the input"
    if "phases" in diagnosis.tables:
        phases = diagnosis.tables["phases"]
        if not phases[phases.method == "none"].new.any():
            return f"Up to there nothing needs to be changed; to read farther, try {names}"
    return f"Try {names}, or {keep}"


def _limit(diagnosis: Diagnosis) -> str:
    trained, departure = diagnosis.trained_length, diagnosis.departure
    early = departure is not None and departure < EARLY * (trained or departure + 1)
    limit = departure - 1 if departure is not None and (early or not trained) else trained
    return f"keep inputs within {_tokens(limit)}" if limit else "measure it on documents to see where it breaks"


def _tokens(length: int | None) -> str:
    return "unknown number of tokens" if length is None else f"{length} tokens"
