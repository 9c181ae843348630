"""Results of a measurement: provenance, rows, and sums per document, with files and trackers."""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from ..decode import Record, Rules, decode, required_keys, short
from ..errors import EvaluationError, InvalidParameterError
from ..escaping import csv_cell, visible
from .config import checked
from .reading import write_atomically
from .rows import STRETCHES, DocumentRecord, RetrievalRow, Row, title
from .windows import is_legacy

if TYPE_CHECKING:
    import pandas

SCHEMA = 2

ROW_KEYS = required_keys(Row)
"""Keys of every row, in order. The keys of LongPPL and passkeys follow if requested."""

RETRIEVAL_KEYS = required_keys(RetrievalRow)
TABLES: dict[str, type[Record]] = {"rows": Row, "per_document": DocumentRecord, "retrieval": RetrievalRow}
"""Record type of each list in a results file."""

INTERVALS = ("ci95", "gain_ci95", "change_ci95", "longppl_ci95")
SIZES = {**dict.fromkeys(INTERVALS, 2), "position_nll_sums": STRETCHES}
"""Required length of each list in a record."""

RULES = Rules(EvaluationError, "measure again with this version", sys.float_info.max)


@dataclass
class Results:
    """Perplexity of one model by method and context length.

    Args:
        provenance (`dict`): versions, model, data, seed, protocol, and lengths, as needed to repeat the measurement.
        rows (`list[Row]`): one per method and length; see the table in [`compare`]. The entries of a row are also
            attributes: `row.gain`, `row["gain"]`.
        per_document (`list[DocumentRecord]`): NLL sums and token counts per document, method, and length, including
            the control (`"truncated"`). Every perplexity and interval can be recomputed from them. Records of the
            longest length also contain the NLL of sixteen equally long stretches of the document, for the gain by
            position.
        retrieval (`list[RetrievalRow]`): one per method, task, length, and depth, if requested: `accuracy` from 0 to 1
            (`None` if the task failed) and `trials`, as [`retrieval`] returns them.
    """

    provenance: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    per_document: list[DocumentRecord] = field(default_factory=list)
    retrieval: list[RetrievalRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Plain dictionaries are accepted and converted.
        self.rows = list(map(Row, self.rows))
        self.per_document = list(map(DocumentRecord, self.per_document))
        self.retrieval = list(map(RetrievalRow, self.retrieval))

    def __repr__(self) -> str:
        methods = dict.fromkeys(title(row.method, row.factor) for row in self.rows)
        lengths = sorted({row["length"] for row in self.rows})
        protocols = dict.fromkeys(row["protocol"] for row in self.rows)
        documents = max((row["documents"] for row in self.rows), default=0)
        parts = (
            visible(str(self.provenance.get("model", "a model"))),
            f"methods {', '.join(methods) or 'none measured'}",
            f"lengths {', '.join(map(str, lengths))}",
            f"protocol {', '.join(protocols)}",
            f"{documents} documents",
        )
        return f"Results({'; '.join(parts)})"

    def _repr_html_(self) -> str:
        """Return the rows as an HTML table for notebooks."""
        return str(self.to_frame().to_html(index=False, na_rep="-"))

    def row(self, method: str, length: int, factor: float | None = None) -> Row:
        """Return the row of a method at a length.

        Args:
            method (`str`): label of the method, such as `"yarn"`.
            length (`int`): context length in tokens.
            factor (`float`, *optional*): required only if the method was measured at several factors.

        Raises:
            InvalidParameterError: there is no such row, or there are several.
        """
        matches = [
            row
            for row in self.rows
            if row["method"] == method and row["length"] == length and factor in (None, row["factor"])
        ]
        if len(matches) != 1:
            rows = ", ".join(f"{row['method']} x{row['factor']:g} at {row['length']}" for row in matches or self.rows)
            raise InvalidParameterError(
                f"Expected one row of {method!r} at {length} (factor {factor}), got {len(matches)}. Choose one of: "
                f"{rows or 'none'}."
            )
        return matches[0]

    def short_context(self) -> list[dict[str, Any]]:
        """Return the change by each method at the longest measured length within the trained length.

        The model needs no extension there. The list is empty if no measured length is within the trained length.

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
        """Return plain JSON types, with `short_context` before the rows. Non-finite numbers become `None`."""
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
        """Return the results from the output of `to_dict`.

        Raises:
            EvaluationError: another schema, missing or unknown keys, or values of the wrong type.
        """
        if not isinstance(data, Mapping) or "schema" not in data:
            raise EvaluationError(
                "Expected results of hf_posext, which have the key 'schema', got others. Pass a results.json that "
                "compare wrote."
            )
        if data["schema"] != SCHEMA:
            raise EvaluationError(
                f"Expected results of schema {SCHEMA}, got {data['schema']!r}. Upgrade hf_posext, or measure again."
            )
        missing = [key for key in ("provenance", "rows", "per_document") if key not in data]
        unknown = sorted(set(data) - {"schema", "provenance", "short_context", *TABLES})
        if missing or unknown:
            raise EvaluationError(
                f"Expected the keys of results, got none of {missing} and unknown {unknown}. "
                f"{RULES.remedy.capitalize()}."
            )
        _check_provenance(data["provenance"])
        tables = {name: _table(name, data.get(name, [])) for name in TABLES}
        return cls(dict(data["provenance"]), **tables)

    def save_json(self, path: str | Path) -> Path:
        """Write the results as JSON, replacing an existing file atomically."""
        return write_atomically(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load_json(cls, path: str | Path) -> Results:
        """Read results from a file.

        Raises:
            EvaluationError: no such file, not JSON, or not results of this schema.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise EvaluationError(
                f"Expected results at {path}, got {error.strerror}. Pass a results.json that compare wrote."
            ) from error
        except (ValueError, RecursionError) as error:
            raise EvaluationError(f"Expected results as JSON in {path}, got {error}. Measure again.") from error
        try:
            return cls.from_dict(data)
        except EvaluationError as error:
            raise EvaluationError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> Path:
        """Write all results to a `.json` file, or only the rows to a `.csv` file.

        Raises:
            InvalidParameterError: another extension.
        """
        writers = {".json": self.save_json, ".csv": self.save_csv}
        suffix = Path(path).suffix.lower()
        if suffix not in writers:
            raise InvalidParameterError(f"Expected a file that ends in .json or .csv, got {path}.")
        return writers[suffix](path)

    def save_report(self, directory: str | Path) -> Path:
        """Write a report of tables, figures, and text to a directory; see [`write_report`].

        Returns:
            `Path`: the `README.md` of the report.
        """
        written: Path = _reporting().write_report(self, directory)
        return written

    def describe(self) -> str:
        """Return a sentence per method: usable length, cost, benefit of the longer context, and passkeys."""
        return "\n".join(_reporting().describe_methods(self))

    def save_csv(self, path: str | Path) -> Path:
        """Write the rows as CSV. An interval takes two columns, `_low` and `_high`."""
        rows = self._flat_rows()
        return _save_table(path, rows, dict.fromkeys(key for row in rows or [dict.fromkeys(ROW_KEYS)] for key in row))

    def save_retrieval_csv(self, path: str | Path) -> Path:
        """Write the retrieval rows as CSV."""
        return _save_table(path, self.retrieval, RETRIEVAL_KEYS)

    def to_frame(self) -> pandas.DataFrame:
        """Return the rows as a `pandas.DataFrame` with the columns of `save_csv`."""
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


def _reporting() -> Any:
    """Import the reporting package late, because it imports this one."""
    return importlib.import_module("hf_posext.reporting")


def _save_table(path: str | Path, rows: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> Path:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: csv_cell(value) for key, value in row.items()} for row in rows)
    return write_atomically(path, text.getvalue())


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, by `None`."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_provenance(provenance: Any) -> None:
    """Check the types of the provenance entries that reports read."""
    if not isinstance(provenance, Mapping):
        raise EvaluationError(
            f"Expected a JSON object as the provenance of the results, got {type(provenance).__name__}. Measure again."
        )
    kinds = {"model": str, "trained_length": int, "seed": int, "not_applicable": dict, "documents": list}
    for key, kind in kinds.items():
        value = provenance.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            raise EvaluationError(
                f"Expected {key} of the provenance to be {kind.__name__}, got {short(value)}. Measure again."
            )


def _table(name: str, entries: Any) -> list[Any]:
    """Return the decoded and checked entries of a list of results."""
    if not isinstance(entries, list):
        raise EvaluationError(
            f"Expected {name} of the results to be a list, got {type(entries).__name__}. Measure again."
        )
    records = []
    for index, entry in enumerate(entries):
        record = decode(TABLES[name], entry, f"{name}.{index}", RULES)
        records.append(record)
        for key, value in record.items():
            if isinstance(value, int) and value < 0:  # the other numbers are floats
                raise EvaluationError(f"Expected {name}.{index}.{key} to be 0 or more, got {value}. Measure again.")
            if isinstance(value, list) and len(value) != SIZES[key]:
                raise EvaluationError(
                    f"Expected {SIZES[key]} numbers in {name}.{index}.{key}, got {short(value)}. Measure again."
                )
    return records


QUANTITIES = ("perplexity", "gain", "change", "passkey")


@checked
def log_results(results: Results, accelerator: Accelerator) -> None:
    """Log the rows as one curve per method over the context length. The step is the length in tokens.

    Curves are named `perplexity/yarn-x8`, `gain/yarn-x8`, and so on, or `perplexity-legacy-yarn/yarn-x8` for a legacy
    protocol. Missing values are skipped. All methods of one length are logged together, and lengths in ascending
    order, because some trackers drop decreasing steps.

    ```python
    accelerator = Accelerator(log_with="tensorboard", project_dir="runs")
    accelerator.init_trackers("hf_posext")
    log_results(compare(model, tokenizer, documents, ["none", "yarn"], factor=8, lengths=[512, 4096]), accelerator)
    accelerator.end_training()
    ```

    Args:
        results ([`Results`]): results of a comparison or of one model.
        accelerator (`Accelerator`): accelerator after `init_trackers`. Only the main process logs.

    Raises:
        InvalidParameterError: the accelerator has no tracker.
    """
    if accelerator.is_main_process and not accelerator.trackers:
        raise InvalidParameterError(
            "Expected an accelerator with a tracker, got none. Make it as Accelerator(log_with='tensorboard', "
            "project_dir='runs') and call accelerator.init_trackers('hf_posext') first."
        )
    for length in sorted({row["length"] for row in results.rows}):
        values = {
            f"{_curves(quantity, row['protocol'])}/{row['method']}-x{row['factor']:g}": row[quantity]
            for row in results.rows
            for quantity in QUANTITIES
            if row["length"] == length and row.get(quantity) is not None and math.isfinite(row[quantity])
        }
        accelerator.log(values, step=length)


def _curves(quantity: str, protocol: str) -> str:
    """Return the curve name of a quantity. Passkeys do not depend on the protocol."""
    return f"{quantity}-{protocol}" if is_legacy(protocol) and quantity != "passkey" else quantity
