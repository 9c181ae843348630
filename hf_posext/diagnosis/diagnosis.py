"""The diagnosis of a model, and its verdict in two sentences."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..deprecation import RenamedAttribute
from ..escaping import html_table, visible
from ..evaluation.reading import write_atomically
from ..scheme import PositionalScheme
from .weights import ALIKE

if TYPE_CHECKING:
    import pandas as pd

    from .signals import Signal

DIGITS = 6
"""Significant digits of the numbers in a file."""

EARLY = 0.9
"""Share of the trained length before which a departure means that the model was trained on less."""

REASONS = {
    "learned": "a vector was learned for every position, and none exists for positions that training did not reach",
    "alibi": "a distance costs a fixed price per token, which is defined however far, trusted or not",
    "relative": "every distance falls into a learned bucket, the last of which has no end",
    "sinusoidal": "a formula gives the sines of any position, trusted or not",
    "rotary": "positions are angles, and longer inputs can be squeezed back into angles that training has shown",
    "none": "the model has no positions that could be carried further",
}


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
        whole = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "signals"}
        whole |= {"generalization": self.generalization, "scheme": self.scheme.to_dict()}
        whole |= {"provenance": dict(self.provenance), "tables": tables}
        plain: dict[str, Any] = json.loads(json.dumps(whole, allow_nan=False))
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
        smooth = lines.cosine.max() > ALIKE
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
    count, read = len(diagnosis.provenance["documents"]), diagnosis.provenance["read"]
    where = f"; on {count} document{'s' if count > 1 else ''} the loss "
    if diagnosis.departure is None:
        return f"{where}keeps its level up to the {read} tokens that were read"
    return f"{where}rises by {diagnosis.rise:.2f} nats per token from token {diagnosis.departure} on"


def _advice(diagnosis: Diagnosis) -> str:
    keep, read = _limit(diagnosis), diagnosis.provenance.get("read", 0)
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
        return (
            f"Documents would show whether it can be trusted there; if not, compare {names} with truncating the input"
        )
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
