"""Measures contenders on documents, each cell once, and knows what it cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import EvaluationError
from ..evaluation.protocols.control import CONTROL, control_stride
from ..evaluation.questions.retrieval import NO_QUESTIONS
from ..evaluation.results.statistics import bootstrap_interval, pooled_perplexity
from ..evaluation.running.asking import Asked
from ..evaluation.running.engine import Outcomes, State, measure
from ..evaluation.running.readings import Reading, control_reading, method_reading
from ..evaluation.running.run_journal import RunJournal
from ..evaluation.running.setup import Setup
from ..patching import patch_model
from ..plan import ExtensionPlan
from .schedule import Prices

if TYPE_CHECKING:
    from accelerate import Accelerator

SHORT = "unpatched"
"""The reading of the trained length by the model as it is."""

Name = tuple[str, float]
"""Label and factor, by which contenders are told apart."""


class Ratio(NamedTuple):
    """Of two perplexities on the same tokens, with its 95 % interval over documents (`None` of one document)."""

    value: float
    ci95: list[float] | None


@dataclass(eq=False)
class Sweep:
    """
    A model, documents, and contenders of which as many cells are measured as somebody asks for.

    Args:
        model (`PreTrainedModel`): without a patch.
        setup ([`Setup`]): the documents at the trained and at the target length.
        plans (`Sequence[ExtensionPlan]`): the contenders.
        passkey (`int`): pass-key trials at the target length; 0 for none.
        seed (`int`): of intervals.
        journal ([`RunJournal`], *optional*): has what was measured before, and gets what is.
        accelerator (`Accelerator`, *optional*): of the processes that share the readings.
    """

    model: Any
    setup: Setup
    plans: Sequence[ExtensionPlan]
    passkey: int
    seed: int = 0
    journal: RunJournal | None = None
    accelerator: Accelerator | None = None
    tokens: int = 0
    outcomes: Outcomes = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.trained, self.target = self.setup.lengths
        self.by_name = {name_of(plan): plan for plan in self.plans}
        self.readings = {
            name: method_reading(self.setup, plan, 0, NO_QUESTIONS) for name, plan in self.by_name.items()
        }
        short = replace(self.setup, lengths=[self.trained])
        self.short = Reading(short, SHORT, 1.0, self.setup.scorer)
        self.control = control_reading(self.setup, self.setup.scorer, self.trained)

    @property
    def documents(self) -> list[str]:
        """Ids, in the order in which they are read."""
        return self.setup.documents.ids

    @cached_property
    def control_tokens(self) -> int:
        """What the control reads of a document."""
        windows = 1 + math.ceil((self.target - self.trained) / control_stride(self.trained))
        return (windows + 1) * self.trained

    def prices(self, names: Iterable[Name]) -> Prices:
        """What contenders cost, in tokens."""
        methods = tuple(sum(lengths[-1] for lengths in _passes(self.readings[name])) for name in names)
        return Prices(methods, self.trained, self.trained, self.control_tokens, self.passkey * self.target)

    @property
    def exhaustive_tokens(self) -> int:
        """What it costs that every contender, and the control, read every document."""
        methods = [self._tokens_of(reading, id) for reading in self.readings.values() for id in self.documents]
        return sum(methods) + len(self.documents) * (self.trained + self.control_tokens)

    def read(self, names: Iterable[Name], documents: Sequence[str], progress: str) -> None:
        """Contenders, and the unpatched model at the trained length, read documents; what was read is not read again.

        Args:
            names (`Iterable[tuple]`): of the contenders.
            documents (`Sequence[str]`): their ids.
            progress (`str`): what the bar says.
        """
        states = [self._state(progress, nullcontext, self.short, documents)]
        for name in names:
            enter = partial(patch_model, self.model, self.by_name[name])
            states.append(self._state(progress, enter, self.readings[name], documents))
        self._measure(states)

    def read_control(self, documents: Sequence[str]) -> None:
        """The unpatched model reads documents with its context truncated."""
        self._measure([self._state(CONTROL, nullcontext, self.control, documents)])

    def ask(self, names: Iterable[Name]) -> None:
        """Contenders are asked pass keys at the target length."""
        states = []
        for name in names:
            units = [unit for unit in self._asked(name).units() if unit.key not in self.outcomes]
            self.tokens += len(units) * self.passkey * self.target
            states.append(State("pass keys", partial(patch_model, self.model, self.by_name[name]), units))
        self._measure(states)

    def accuracy(self, name: Name) -> float | None:
        """Share of pass keys found; `None` where none were asked."""
        found = [self.outcomes[unit.key].value for unit in self._asked(name).units() if unit.key in self.outcomes]
        return found[0] if found else None

    def tail(self, name: Name, documents: Sequence[str]) -> float:
        """Perplexity of the second half of the target length; infinite where a document could not be read."""
        return self._pooled(self._sums(self.readings[name], documents, self.target, "tail_"))

    def change(self, name: Name, documents: Sequence[str]) -> Ratio:
        """Perplexity inside the trained length over the unpatched one's, less 1."""
        own = self._sums(self.readings[name], documents, self.trained)
        found = self._ratio(own, self._sums(self.short, documents, self.trained))
        return Ratio(found.value - 1, found.ci95 and [end - 1 for end in found.ci95])

    def gain(self, name: Name, documents: Sequence[str]) -> Ratio:
        """The control's tail perplexity over a contender's.

        Raises:
            EvaluationError: the control could not read a document.
        """
        control = self._sums(self.control, documents, self.target, "tail_")
        if control is None:
            raise EvaluationError("the unpatched model failed on the control; the log says why")
        return self._ratio(control, self._sums(self.readings[name], documents, self.target, "tail_"))

    def worse(self, name: Name, best: Name, documents: Sequence[str]) -> Ratio:
        """The tail perplexity of one contender over that of another."""
        one, other = (self._sums(self.readings[which], documents, self.target, "tail_") for which in (name, best))
        return self._ratio(one, other)

    def losses_inside(self, documents: Sequence[str]) -> list[float]:
        """Nats per token of each document inside the trained length, by the unpatched model.

        Raises:
            EvaluationError: it could not read a document.
        """
        sums = self._sums(self.short, documents, self.trained)
        if sums is None:
            raise EvaluationError("the unpatched model failed inside its trained length; the log says why")
        return [nll / tokens for nll, tokens in sums]

    def failure(self, name: Name) -> str | None:
        """Why a contender could not read a document, if so."""
        keys = (unit.key for unit in self.readings[name].units())
        return next((self.outcomes[key].failure for key in keys if key in self.outcomes and self._failed(key)), None)

    def seconds(self, name: Name | None) -> float | None:
        """Median time of a document: at the target length by a contender, or unpatched at the trained length."""
        reading = self.short if name is None else self.readings[name]
        times = sorted(
            outcome.value["seconds"]
            for unit in reading.units()
            if self.target in unit.key[4] or name is None
            if (outcome := self.outcomes.get(unit.key)) is not None and outcome.failure is None
        )
        return times[len(times) // 2] if times else None

    def _state(self, progress: str, enter: Callable[[], Any], reading: Reading, documents: Sequence[str]) -> State:
        units = [unit for unit in reading.units() if unit.key[3] in documents and unit.key not in self.outcomes]
        self.tokens += sum(self._tokens_of(reading, id) for id in dict.fromkeys(unit.key[3] for unit in units))
        return State(progress, enter, [unit._replace(run=partial(_timed, unit.run)) for unit in units])

    def _measure(self, states: list[State]) -> None:
        pending = [state for state in states if state.units]
        if pending:
            self.outcomes |= measure(pending, accelerator=self.accelerator, journal=self.journal)

    def _asked(self, name: Name) -> Asked:
        return Asked(replace(self.setup, lengths=[self.target]), *name, self.passkey, NO_QUESTIONS)

    def _tokens_of(self, reading: Reading, document: str) -> int:
        """That go through the model for one document; of the first, the guard of a shared pass reads some again."""
        if reading.truncated:
            return self.control_tokens
        guarded = [lengths for lengths in _passes(reading) if len(lengths) > 1 and document == self.documents[0]]
        return sum(lengths[-1] for lengths in _passes(reading)) + sum(lengths[0] for lengths in guarded)

    def _sums(
        self, reading: Reading, documents: Sequence[str], length: int, part: str = ""
    ) -> list[tuple[float, int]] | None:
        """NLL and tokens of each document; nothing where one failed."""
        found = {}
        for unit in reading.units():
            if unit.key[3] not in documents:
                continue
            if self._failed(unit.key):
                return None
            for record in self.outcomes[unit.key].value["records"]:
                if record["length"] == length:
                    found[record["document"]] = (record[f"{part}nll_sum"], record[f"{part}tokens"])
        return [found[id] for id in documents]

    def _failed(self, key: Any) -> bool:
        return self.outcomes[key].failure is not None

    @staticmethod
    def _pooled(sums: list[tuple[float, int]] | None) -> float:
        if sums is None:
            return math.inf
        nll, tokens = zip(*sums, strict=True)
        return float(pooled_perplexity(nll, tokens))

    def _ratio(self, one: list[tuple[float, int]] | None, other: list[tuple[float, int]] | None) -> Ratio:
        if one is None or other is None:
            return Ratio(math.nan if other is None else math.inf, None)
        difference = [a - b for (a, _), (b, _) in zip(one, other, strict=True)]
        tokens = [count for _, count in one]
        return Ratio(float(pooled_perplexity(difference, tokens)), bootstrap_interval(difference, tokens, self.seed))


def name_of(plan: ExtensionPlan) -> Name:
    """What a contender is called; as in a comparison, a plan that changes nothing has factor 1."""
    return plan.method, 1.0 if plan.changes_nothing else plan.factor


def _passes(reading: Reading) -> list[list[int]]:
    """The lengths of each forward over a document."""
    return [list(unit.key[4]) for unit in reading.units() if unit.key[3] == reading.documents[0]]


def _timed(run: Callable[[], Any]) -> dict[str, Any]:
    begin = time.perf_counter()
    records = run()
    return {"seconds": time.perf_counter() - begin, "records": records}
