"""What there is to measure: all documents, read once by each method and once by the control."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from ...plan import ExtensionPlan
from ..contrast.key_tokens import KeyTokens
from ..contrast.longppl import key_sums
from ..protocols.control import CONTROL, control_stride
from ..protocols.protocol import Measurement, window_cost
from ..questions.retrieval import Questions
from ..results.rows import Record, document_record
from ..scoring.boundaries import Boundaries, boundaries_of
from .asking import Asked
from .engine import Key, Outcomes, Unit
from .setup import Setup


@dataclass(frozen=True, eq=False)
class Reading:
    """
    All documents, read once: by a model with a method in force, or by the control.

    Args:
        setup ([`Setup`]): the documents, and how they are read.
        label (`str`): of the method.
        factor (`float`): of the method.
        scorer (`Any`): of the model.
        boundaries ([`Boundaries`], *optional*): where its positions depend on the length of the input.
        truncated (`int`, *optional*): tokens of context that each token gets at most; of the control only.
        asked ([`Asked`], *optional*): what the model is asked beside.
        keys ([`KeyTokens`], *optional*): the tokens whose NLL is told for itself, at the longest length.
    """

    setup: Setup
    label: str
    factor: float
    scorer: Any
    boundaries: Boundaries = Boundaries()
    truncated: int | None = None
    asked: Asked | None = None
    keys: KeyTokens | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.label if self.factor == 1 else f"{self.label} x{self.factor:g}"

    @property
    def documents(self) -> list[str]:
        """Ids, in their order."""
        return self.setup.documents.ids

    def units(self) -> list[Unit]:
        """A unit for each pass over each document, then those of what is asked."""
        units = []
        for lengths in self._passes():
            cost = self._cost(lengths)
            for index, id in enumerate(self.documents):
                units.append(Unit(self._key(id, lengths), cost, partial(self._records, index, lengths)))
        return units + (self.asked.units() if self.asked else [])

    def is_finished(self, outcomes: Outcomes) -> bool:
        """Whether all of its units have an outcome."""
        return all(unit.key in outcomes for unit in self.units())

    def by_document(self, outcomes: Outcomes) -> tuple[dict[str, list[Record]], dict[str, str]]:
        """The records of each document by ascending length, and the reasons of those that failed."""
        records: dict[str, list[Record]] = {}
        reasons: dict[str, str] = {}
        for id in self.documents:
            passes = [outcomes[self._key(id, lengths)] for lengths in self._passes()]
            failures = [outcome.failure for outcome in passes if outcome.failure is not None]
            if failures:
                reasons[id] = failures[0]
            else:
                records[id] = [record for outcome in passes for record in outcome.value]
        return records, reasons

    def _key(self, document: str, lengths: list[int]) -> Key:
        return ("nll", self.label, self.factor, document, tuple(lengths))

    def _passes(self) -> list[list[int]]:
        """The lengths, ascending, by the pass that measures them."""
        lengths = self.setup.lengths
        return [lengths] if self.truncated else self.setup.protocol.passes(lengths, self.boundaries)

    def _cost(self, lengths: list[int]) -> float:
        longest = self.setup.documents.length
        if self.truncated is None:
            return self.setup.protocol.cost(lengths, longest)
        windows = 1 + max(0, longest - self.truncated) // control_stride(self.truncated)
        return windows * window_cost(min(self.truncated, longest))

    def _records(self, index: int, lengths: list[int]) -> list[Record]:
        """Of one document at the lengths of one pass."""
        protocol, documents, longest = self.setup.protocol, self.setup.documents, self.setup.lengths[-1]
        if self.truncated is None:
            found = protocol.measure(self.scorer, documents, index, lengths)
        else:
            found = protocol.measure_control(self.scorer, documents, index, lengths, self.truncated)
        return [
            document_record(one, documents, index, self.label, self.factor, with_positions=one.length == longest)
            | self._key_sums(index, one)
            for one in found
        ]

    def _key_sums(self, index: int, measured: Measurement) -> Record:
        """What the key tokens of a document give; nothing where none were looked for."""
        if self.keys is None:
            return {}
        indices = self.keys.indices.get(self.documents[index])
        if indices is None or measured.length < self.setup.lengths[-1]:
            return {"key_nll_sum": None, "key_tokens": None}
        return key_sums(measured.nll, indices)


def control_reading(setup: Setup, scorer: Any, trained_length: int) -> Reading:
    """Of an unpatched model, with its context truncated."""
    return Reading(setup, CONTROL, 1.0, scorer, truncated=trained_length)


def method_reading(setup: Setup, plan: ExtensionPlan, passkey: int, questions: Questions) -> Reading:
    """Of the model with a plan in force."""
    factor = 1.0 if plan.changes_nothing else plan.factor
    asked = Asked(setup, plan.method, factor, passkey, questions)
    return Reading(setup, plan.method, factor, setup.scorer, boundaries_of(plan.scheme, plan), asked=asked)
