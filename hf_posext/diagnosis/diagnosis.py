"""What a diagnosis says."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.texts.files import write_atomically
from ..scheme import PositionalScheme
from ..visible import visible

if TYPE_CHECKING:
    import pandas as pd

    from .signals import Signal

DIGITS = 6
"""Significant digits of the numbers in a file."""


@dataclass(frozen=True)
class Diagnosis:
    """How a model encodes position, how far that was trained, and what becomes of longer input.

    Made by [`diagnose`].

    Args:
        model (`str`): its name.
        scheme (`PositionalScheme`): what it has.
        reason (`str`): why it generalizes as it does.
        trained_length (`int`, *optional*): tokens per sequence in training; `None` where nothing tells.
        trained_length_source (`str`): where that number comes from.
        target_length (`int`): tokens that the diagnosis looks up to.
        remedies (`tuple[str, ...]`): names of the methods that bring the target back to what training has shown.
        untrained (`tuple[int, int]`, *optional*): first and last row of a learned table that look untrained, counted
            from position 0.
        critical_dimension (`int`, *optional*): rotary channels of a head that make a whole turn within training.
        departure (`int`, *optional*): index of the first token from which on the loss is above its level for good;
            `None` where it is not, and without documents.
        departure_interval (`tuple[int, int]`, *optional*): 95 %, over documents.
        rise (`float`, *optional*): mean from there on, in nats per token.
        tables (`Mapping[str, pandas.DataFrame]`): whichever there are of `rows` (learned tables), `frequencies` and
            `phases` (rotary), `reach` (ALiBi), `buckets` (relative), and with documents `losses` and `attention`.
        signals (`tuple[Signal, ...]`): what `plot` draws: the model as it is, then each method.
        notes (`tuple[str, ...]`): what could not be found, and why.
        provenance (`Mapping`): versions, and what was read.
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
        facts = "; ".join(f"{name} {value}" for name, value in self._facts().items() if name != "verdict")
        return f"Diagnosis({visible(facts)})"

    def _repr_html_(self) -> str:
        """The facts as a table, for notebooks."""
        rows = (f"<tr><th>{name}</th><td>{escape(value)}</td></tr>" for name, value in self._facts().items())
        return f"<table>{''.join(rows)}</table>"

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
        """Plain JSON types: everything but the signals. Tables are lists of rows; what is not finite is `None`."""
        scalars = (
            "model",
            "generalization",
            "reason",
            "trained_length",
            "trained_length_source",
            "target_length",
            "remedies",
            "untrained",
            "critical_dimension",
            "departure",
            "departure_interval",
            "rise",
            "verdict",
            "notes",
        )
        tables = {name: [_plain(row) for row in table.to_dict("records")] for name, table in self.tables.items()}
        said = {name: getattr(self, name) for name in scalars}
        whole = {**said, "scheme": self.scheme.to_dict(), "provenance": dict(self.provenance), "tables": tables}
        plain: dict[str, Any] = json.loads(json.dumps(whole, allow_nan=False))
        return plain

    def save_json(self, path: str | Path) -> Path:
        """Write `to_dict` into a file, a row of a table to a line."""
        found = self.to_dict()
        tables = found.pop("tables")
        lines = [
            f"  {json.dumps(name)}: [\n   " + ",\n   ".join(json.dumps(row) for row in rows) + "\n  ]"
            for name, rows in tables.items()
        ]
        head = json.dumps(found, indent=1)[:-2]
        return write_atomically(path, f'{head},\n "tables": {{\n' + ",\n".join(lines) + "\n }\n}\n")

    def plot(self, path: str | Path) -> None:
        """Draw the signals, and the loss by position where it was measured.

        Args:
            path (`str` or `Path`): the PNG to write, 1800 pixels wide; replaced in one step.
        """
        from ..reporting.signals import plot_diagnosis

        plot_diagnosis(self, path)


def _plain(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Numbers of a row as Python's, rounded; NaN and infinity as `None`."""
    return {str(key): _number(getattr(value, "item", lambda value=value: value)()) for key, value in row.items()}


def _number(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
