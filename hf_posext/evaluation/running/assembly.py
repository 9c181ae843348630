"""From the outcomes of all units to results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import EvaluationError
from ..contrast.longppl import longppl_cells
from ..results.results import Results
from ..results.rows import Record, make_rows
from .engine import Outcomes
from .readings import Reading

REMEDY = "give smaller lengths, another dtype (--dtype float32), or leave out the methods that failed"


@dataclass(frozen=True)
class Assembly:
    """
    Makes results of outcomes: of the documents that every reading could measure.

    A document that failed in one reading is left out of all of them, at every length, since rows compare only over the
    same documents; a method that failed on every document is left out as a whole. Both are told, with the reason.

    Args:
        methods (`list[Reading]`): in the order of the rows.
        control ([`Reading`], *optional*): what gains are counted against, and changes inside its length where there is
            no `unpatched`.
        unpatched ([`Reading`], *optional*): the first of the methods, if changes are counted from it.
        provenance (`dict`, *optional*): beyond that of the setup.
    """

    methods: list[Reading]
    control: Reading | None = None
    unpatched: Reading | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    _rows: dict[Any, list[dict[str, Any]]] = field(default_factory=dict, repr=False)

    def results(self, outcomes: Outcomes) -> Results:
        """
        What there is to say of the readings that are finished.

        Raises:
            EvaluationError: the control failed on every document, every method did, or no document is left.
        """
        readings = [*([self.control] if self.control else []), *self.methods]
        found = {reading: reading.by_document(outcomes) for reading in readings if reading.is_finished(outcomes)}
        failed = {
            reading: next(iter(reasons.values())) for reading, (records, reasons) in found.items() if not records
        }
        if self.control in failed or all(reading in failed for reading in self.methods):
            told = "; ".join(f"{reading.name}: {reason}" for reading, reason in failed.items())
            raise EvaluationError(f"nothing can be told, since every document failed: {told}; {REMEDY}")
        left_out: dict[str, str] = {}
        for reading, (_, reasons) in found.items():
            for id, reason in reasons.items() if reading not in failed else ():
                left_out.setdefault(id, f"{reading.name}: {reason}")
        kept = [id for id in self.methods[0].documents if id not in left_out]
        if not kept:
            told = "; ".join(f"{id} ({reason})" for id, reason in left_out.items())
            raise EvaluationError(f"no document is left that all could measure: {told}; {REMEDY}")

        records = {
            reading: [record for id in kept for record in by_id[id]]
            for reading, (by_id, _) in found.items()
            if reading not in failed
        }
        results = Results(self._provenance(failed, left_out, outcomes))
        results.per_document = [record for of_one in records.values() for record in of_one]
        for reading in self.methods:
            if reading in records:
                results.rows += self._rows_of(reading, records, outcomes)
                results.retrieval += reading.asked.retrieval_rows(outcomes) if reading.asked else []
        return results

    def _rows_of(
        self, reading: Reading, records: Mapping[Reading, list[Record]], outcomes: Outcomes
    ) -> list[dict[str, Any]]:
        key = (reading, *dict.fromkeys(record["document"] for record in records[reading]))
        if key not in self._rows:  # bootstraps take longest, and results are asked for after each method
            setup = reading.setup
            trained_length = (self.control and self.control.truncated) or 0
            control = records[self.control] if self.control else []
            # Inside the trained length the control is the unpatched model itself, whether or not `none` is asked for.
            inside = [record for record in control if record["length"] <= trained_length]
            baseline = records.get(self.unpatched, inside) if self.unpatched else inside
            self._rows[key] = make_rows(
                records[reading],
                conditions=setup.conditions,
                control=control,
                baseline=baseline,
                seed=setup.options.seed,
            )
            if reading.keys is not None:
                for row in self._rows[key]:
                    row |= longppl_cells(records[reading], control, row["length"], setup.options.seed)
        asked = reading.asked
        return [{**row, **(asked.passkey_cells(row["length"], outcomes) if asked else {})} for row in self._rows[key]]

    def _provenance(
        self, failed: Mapping[Reading, str], left_out: Mapping[str, str], outcomes: Outcomes
    ) -> dict[str, Any]:
        whole = {**self.methods[0].setup.provenance, **self.provenance}
        tokens = {entry["document"]: entry["tokens"] for entry in whole["documents"]}
        unanswered = [
            failure
            for reading in self.methods
            if reading.asked
            for failure in reading.asked.unanswered(reading.name, outcomes)
        ]
        return {
            **whole,
            "not_applicable": {
                **whole.get("not_applicable", {}),
                **{reading.name: f"failed on every document: {reason}" for reading, reason in failed.items()},
            },
            "documents": [entry for entry in whole["documents"] if entry["document"] not in left_out],
            "left_out": [
                *whole["left_out"],
                *({"document": id, "tokens": tokens[id], "reason": reason} for id, reason in left_out.items()),
                *unanswered,
            ],
        }
