"""Results of a measurement: provenance, rows, and what each document gave; to and from files."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...decode import short
from ...errors import EvaluationError, InvalidParameterError
from ..texts.files import write_atomically
from .positions import STRETCHES

if TYPE_CHECKING:
    import pandas

SCHEMA = 2

ROW_KEYS = (
    "method",
    "factor",
    "protocol",
    "bos",
    "dtype",
    "length",
    "perplexity",
    "perplexity_tail",
    "bits_per_byte",
    "nll_sum",
    "tokens",
    "documents",
    "ci95",
    "perplexity_truncated",
    "perplexity_truncated_tail",
    "gain",
    "gain_ci95",
    "change",
    "change_ci95",
)
"""What every row has, in this order; those of LongPPL and of pass keys follow where they were asked for."""

LONGPPL_KEYS = ("longppl", "longppl_ci95", "longppl_truncated", "key_tokens")
PASSKEY_KEYS = ("passkey", "passkey_trials")
DOCUMENT_KEYS = (
    "document",
    "method",
    "factor",
    "length",
    "first",
    "nll_sum",
    "tokens",
    "bytes",
    "tail_nll_sum",
    "tail_tokens",
    "groups",
    "group_mean_sum",
    "position_nll_sums",
)
KEY_TOKEN_KEYS = ("key_nll_sum", "key_tokens")
"""What documents have beside, where LongPPL was asked for."""

RETRIEVAL_KEYS = ("method", "factor", "task", "length", "depth", "accuracy", "trials")
TABLES = {
    "rows": (ROW_KEYS, (*LONGPPL_KEYS, *PASSKEY_KEYS)),
    "per_document": (DOCUMENT_KEYS, KEY_TOKEN_KEYS),
    "retrieval": (RETRIEVAL_KEYS, ()),
}
"""What the entries of each list have, and may have."""

INTERVALS = ("ci95", "gain_ci95", "change_ci95", "longppl_ci95")
TEXTS = ("document", "method", "protocol", "bos", "dtype", "task")
COUNTS = ("length", "tokens", "documents", "tail_tokens", "passkey_trials", "trials")
OPTIONAL_COUNTS = ("first", "bytes", "groups", "key_tokens")


@dataclass
class Results:
    """
    Perplexity of one model by method and context length.

    Args:
        provenance (`dict`): versions, model, data, seed, protocol, lengths: what is needed to measure again.
        rows (`list[dict]`): one per method and length; see the table in [`compare`].
        per_document (`list[dict]`): sums of NLL and counts of tokens of every document, method and length, the control
            (`"truncated"`) included, so that every perplexity and interval can be computed again; at the longest
            length also the NLL of sixteen equally long stretches of the document, for the gain by position.
        retrieval (`list[dict]`): one per method, task, length and depth, where that was asked for: `accuracy` from 0
            to 1 (`None` where it failed) and `trials`, as [`retrieval`] gives them.
    """

    provenance: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    per_document: list[dict[str, Any]] = field(default_factory=list)
    retrieval: list[dict[str, Any]] = field(default_factory=list)

    def row(self, method: str, length: int, factor: float | None = None) -> dict[str, Any]:
        """
        The row of a method at a length.

        Args:
            method (`str`): label of the method, such as `"yarn"`.
            length (`int`): context length in tokens.
            factor (`float`, *optional*): needed only where the method was measured at several factors.

        Raises:
            InvalidParameterError: there is no such row, or there are several.
        """
        found = [
            row
            for row in self.rows
            if row["method"] == method and row["length"] == length and factor in (None, row["factor"])
        ]
        if len(found) != 1:
            there = ", ".join(f"{row['method']} x{row['factor']:g} at {row['length']}" for row in found or self.rows)
            raise InvalidParameterError(
                f"{len(found)} rows are {method!r} at {length} (factor {factor}); choose one of: {there or 'none'}"
            )
        return found[0]

    def short_context(self) -> list[dict[str, Any]]:
        """
        What each method changes where the model needed no extension: at the longest length that was measured and is
        not above the trained one. Empty where there is none.

        Returns:
            `list[dict]`: `method`, `factor`, `length`, `change` and `change_ci95` of the rows.
        """
        trained = self.provenance.get("trained_length") or 0
        longest = max((row["length"] for row in self.rows if row["length"] <= trained), default=None)
        return [
            {key: row[key] for key in ("method", "factor", "length", "change", "change_ci95")}
            for row in self.rows
            if row["length"] == longest and row["method"] != "none" and row["change"] is not None
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, what happens inside the trained length first; a number that is not finite is `None`."""
        content = {
            "provenance": self.provenance,
            "short_context": self.short_context(),
            "rows": self.rows,
            "per_document": self.per_document,
            **({"retrieval": self.retrieval} if self.retrieval else {}),
        }
        plain: dict[str, Any] = {"schema": SCHEMA, **_finite(content)}
        return plain

    @classmethod
    def from_dict(cls, data: Any) -> Results:
        """
        The results that `to_dict` gave.

        Raises:
            EvaluationError: another schema, keys missing or unknown, or values of another type.
        """
        if not isinstance(data, Mapping) or "schema" not in data:
            raise EvaluationError(
                "no results of hf_posext, which have the key 'schema'; give a results.json that compare wrote"
            )
        if data["schema"] != SCHEMA:
            raise EvaluationError(
                f"results have schema {data['schema']!r}; this version of hf_posext reads {SCHEMA}: "
                "upgrade it, or measure again"
            )
        _check_keys("results", data, ("schema", "provenance", "rows", "per_document"), ("short_context", "retrieval"))
        _check_provenance(data["provenance"])
        tables = {name: data.get(name, []) for name in ("rows", "per_document", "retrieval")}
        for name, table in tables.items():
            if not isinstance(table, list):
                raise EvaluationError(f"{name} of the results is {type(table).__name__}, not a list")
            keys, optional = TABLES[name]
            for index, entry in enumerate(table):
                _check_keys(f"{name}[{index}]", entry, keys, optional)
                for key, value in entry.items():
                    if not _fits(key, value):
                        raise EvaluationError(f"{name}[{index}] has {key} {short(value)}; measure again")
        return cls(dict(data["provenance"]), **{name: [dict(row) for row in table] for name, table in tables.items()})

    def save_json(self, path: str | Path) -> Path:
        """Write the results; a file that is there stays whole until the new one is (atomic replacement)."""
        return write_atomically(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load_json(cls, path: str | Path) -> Results:
        """
        Read results from a file.

        Raises:
            EvaluationError: no such file, not JSON, or not results of this schema.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise EvaluationError(f"cannot read results at {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise EvaluationError(f"{path} is not JSON, so it holds no results: {error}; measure again") from error
        try:
            return cls.from_dict(data)
        except EvaluationError as error:
            raise EvaluationError(f"{path}: {error}") from error

    def save_csv(self, path: str | Path) -> Path:
        """Write the rows as a table; an interval takes two columns, `_low` and `_high`."""
        rows = self._flat_rows()
        return _save_table(path, rows, dict.fromkeys(key for row in rows or [dict.fromkeys(ROW_KEYS)] for key in row))

    def save_retrieval_csv(self, path: str | Path) -> Path:
        """Write what was retrieved as a table."""
        return _save_table(path, self.retrieval, RETRIEVAL_KEYS)

    def to_frame(self) -> pandas.DataFrame:
        """The rows as a `pandas.DataFrame`, with the columns of `save_csv`."""
        import pandas

        return pandas.DataFrame(self._flat_rows())

    def _flat_rows(self) -> list[dict[str, Any]]:
        flat = []
        for row in _finite(self.rows):
            cells: dict[str, Any] = {}
            for key, value in row.items():
                if key in INTERVALS:
                    cells[f"{key}_low"], cells[f"{key}_high"] = value or (None, None)
                else:
                    cells[key] = value
            flat.append(cells)
        return flat


def _save_table(path: str | Path, rows: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> Path:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_atomically(path, text.getvalue())


def _finite(value: Any) -> Any:
    """The same, without NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_provenance(provenance: Any) -> None:
    """Refuse what the reports could not read; they need no more of it than these."""
    if not isinstance(provenance, Mapping):
        raise EvaluationError("provenance of the results is no JSON object")
    wanted = {"model": str, "trained_length": int, "seed": int, "not_applicable": dict, "documents": list}
    for key, kind in wanted.items():
        value = provenance.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            raise EvaluationError(f"provenance has {key} {short(value)}; measure again")


def _fits(key: str, value: Any) -> bool:
    """Whether a row or a document may have this value."""
    if key in TEXTS:
        return isinstance(value, str)
    if value is None and key not in COUNTS:
        return True
    if key in (*COUNTS, *OPTIONAL_COUNTS):
        return isinstance(value, int) and _is_number(value)
    if key in INTERVALS:  # an end that is not finite was written as null
        return isinstance(value, list) and len(value) == 2 and all(end is None or _is_number(end) for end in value)
    if key == "position_nll_sums":
        return isinstance(value, list) and len(value) == STRETCHES and all(map(_is_number, value))
    return _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_keys(name: str, entry: Any, keys: Iterable[str], optional: Iterable[str] = ()) -> None:
    if not isinstance(entry, Mapping):
        raise EvaluationError(f"{name} is {type(entry).__name__}, not a JSON object")
    missing = [key for key in keys if key not in entry]
    unknown = sorted(set(entry) - {*keys, *optional})
    if missing or unknown:
        raise EvaluationError(f"{name} lacks {missing} and has unknown {unknown}; measure again with this version")
