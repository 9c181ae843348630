"""Tasks: one document or one question, one method, one pass of the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

from ..errors import EvaluationError
from ..patching import patch_model
from ..patching.frequencies import forget_length
from ..plan import ExtensionPlan
from .forwards import boundaries_of
from .questions import NO_QUESTIONS, Questions
from .results import Results
from .rows import DocumentRecord, RetrievalRow, Row, document_record, key_sums, longppl_cells, make_rows, title
from .setup import Setup
from .windows import CONTROL, Measurement, control_windows

REMEDY = "Pass smaller lengths, another dtype (--dtype float32), or leave out the methods that failed."

Kind = Literal["nll", "keys", "passkey", "retrieval"]


@dataclass(frozen=True)
class Task:
    """Unit of work: one document or one question, one method, one pass.

    Tasks are distributed over processes, written to journals, and assembled into results. The value of a task must not
    depend on earlier tasks, because results would then depend on the number of processes.

    Args:
        kind (`str`): `"nll"` of a document, `"keys"` (key tokens of a document), `"passkey"`, or `"retrieval"`.
        method (`str`): label of the method, of the control, or of the evaluator of key tokens.
        factor (`float`): factor of the method.
        lengths (`tuple[int, ...]`): lengths in tokens, ascending, measured together.
        document (`str`, *optional*): id of the document.
        question (`str`, *optional*): name of the retrieval task.
        tokens (`int`, *optional*, defaults to 0): tokens that the model reads, for progress.
        cost (`float`, *optional*, defaults to 1.0): time relative to other tasks, for distributing them.
    """

    kind: Kind
    method: str
    factor: float
    lengths: tuple[int, ...]
    document: str | None = None
    question: str | None = None
    tokens: int = field(default=0, compare=False)
    cost: float = field(default=1.0, compare=False)

    @property
    def key(self) -> dict[str, Any]:
        """Identity of the task, in plain JSON types, without fields that are `None`."""
        parts: dict[str, Any] = {"kind": self.kind, "method": self.method, "factor": self.factor}
        parts |= {"lengths": list(self.lengths), "document": self.document, "question": self.question}
        return {name: value for name, value in parts.items() if value is not None}

    def __str__(self) -> str:
        subjects = {"nll": f"document {self.document!r}", "keys": f"key tokens of document {self.document!r}"}
        subject = subjects.get(self.kind, f"{self.kind} {self.question or ''}".strip())
        return f"{title(self.method, self.factor)}, {subject}, {' and '.join(map(str, self.lengths))} tokens"


LINEAR_COST = 16_384
"""Tokens of context at which attention costs as much as all work linear in the length: four to twelve times the width
of a model. The estimate only balances work between processes."""


def cost_of(reads: Iterable[int]) -> float:
    """Return the relative cost of forwards that read these numbers of tokens."""
    return float(sum(size * (size + LINEAR_COST) for size in reads))


def task_of(kind: Kind, method: str, factor: float, lengths: Iterable[int], reads: list[int], **subject: Any) -> Task:
    """Return a task whose forwards read `reads` tokens each. `subject` is its document or question."""
    return Task(kind, method, factor, tuple(lengths), tokens=sum(reads), cost=cost_of(reads), **subject)


class Outcome(NamedTuple):
    """Value of a task, or the reason for its failure."""

    value: Any = None
    failure: str | None = None


Outcomes = dict[Task, Outcome]


class Stage(NamedTuple):
    """Tasks measured in one state of the model.

    `enter` puts the model into that state. `measure` returns the value of a task, in plain JSON types.
    """

    label: str
    enter: Callable[[], AbstractContextManager[Any]]
    tasks: Sequence[Task]
    measure: Callable[[Task], Any]


@dataclass(frozen=True, eq=False)
class MethodRun:
    """Tasks of one method or of the control: documents at all lengths, and questions.

    Args:
        setup ([`Setup`]): setup of the measurement.
        label (`str`): label of the method or the control.
        factor (`float`): factor of the method.
        scorer: scorer of the model, see [`PerplexityProtocol.scorer`].
        plan ([`ExtensionPlan`], *optional*): plan in force during the run.
        enter (`Callable`, *optional*): returns the context in which the plan is in force.
        truncated (`int`, *optional*): most tokens of context per token, for the control only.
        questions ([`Questions`], *optional*): questions to answer; none by default.
        keys (`Mapping`, *optional*): indices of the key tokens in the row of each document. Their NLL is also reported
            separately, at the longest length.
    """

    setup: Setup
    label: str
    factor: float
    scorer: Any
    plan: ExtensionPlan | None = None
    enter: Callable[[], AbstractContextManager[Any]] = nullcontext
    truncated: int | None = None
    questions: Questions = NO_QUESTIONS
    keys: Mapping[str, Sequence[int]] | None = None

    @property
    def name(self) -> str:
        """Name in messages."""
        return title(self.label, self.factor)

    @property
    def documents(self) -> list[str]:
        """Ids of the documents, in order."""
        return self.setup.documents.ids

    @cached_property
    def passes(self) -> list[list[int]]:
        """Lengths of each pass, ascending."""
        lengths = self.setup.lengths
        if self.truncated:
            return [lengths]
        return self.setup.protocol.passes(lengths, boundaries_of(self.setup.scheme, self.plan))

    @cached_property
    def tasks(self) -> list[Task]:
        """A task per pass and document, followed by a task per question."""
        return [*(task for lengths in self.passes for task in self._document_tasks(lengths)), *self._questions]

    def stage(self, label: str | None = None) -> Stage:
        """Return the stage of all tasks."""
        return Stage(label or self.name, self.enter, self.tasks, self.measure)

    def measure(self, task: Task) -> Any:
        """Return the value of a task: records of its document by length, or the accuracy at each depth."""
        if task.kind != "nll":
            forget_length(self.scorer.model)
            return self.questions.ask(self.scorer.model, self.setup.tokenizer, task.question, task.lengths[0])
        documents, longest = self.setup.documents, self.setup.lengths[-1]
        index = documents.ids.index(str(task.document))
        measurements = self.setup.protocol.measure(self.scorer, documents, index, list(task.lengths), self.truncated)
        return [
            document_record(
                measurement, documents, index, self.label, self.factor, with_positions=measurement.length == longest
            )
            | self._key_sums(index, measurement)
            for measurement in measurements
        ]

    def by_document(self, outcomes: Outcomes) -> tuple[dict[str, list[DocumentRecord]], dict[str, str]]:
        """Return the records of each document by ascending length, and the reasons why documents failed."""
        records: dict[str, list[DocumentRecord]] = {}
        reasons: dict[str, str] = {}
        for id in self.documents:
            tasks = [Task("nll", self.label, self.factor, tuple(lengths), id) for lengths in self.passes]
            passes = [outcomes[task] for task in tasks]
            failures = [outcome.failure for outcome in passes if outcome.failure is not None]
            if failures:
                reasons[id] = failures[0]
            else:
                records[id] = [DocumentRecord(record) for outcome in passes for record in outcome.value]
        return records, reasons

    def passkey_cells(self, length: int, outcomes: Outcomes) -> dict[str, Any]:
        """Return the passkey cells in the row of a length; empty if no passkeys were requested."""
        if not self.questions.passkey:
            return {}
        value = outcomes[Task("passkey", self.label, self.factor, (length,))].value
        return {"passkey": value and value[0], "passkey_trials": self.questions.passkey}

    def retrieval_rows(self, outcomes: Outcomes) -> list[RetrievalRow]:
        """Return a row per retrieval task, length, and depth. The accuracy of failed tasks is `None`."""
        rows = []
        for task in (task for task in self._questions if task.kind == "retrieval"):
            places = self.questions.places(str(task.question))
            accuracies = outcomes[task].value or [None] * len(places)
            of_task = {"method": self.label, "factor": self.factor, "task": task.question, "length": task.lengths[0]}
            rows += [
                RetrievalRow(of_task, depth=depth, accuracy=accuracy, trials=self.questions.trials)
                for depth, accuracy in zip(places, accuracies, strict=True)
            ]
        return rows

    def unanswered(self, outcomes: Outcomes) -> list[dict[str, Any]]:
        """Return the failed questions, each with its reason."""
        entries = []
        for task in self._questions:
            if task in outcomes and (failure := outcomes[task].failure) is not None:
                question = f" on {task.question}" if task.question else ""
                entries.append({task.kind: f"{self.name}{question} at {task.lengths[0]}", "reason": failure})
        return entries

    def _document_tasks(self, lengths: list[int]) -> list[Task]:
        longest = self.setup.documents.length
        if self.truncated is None:
            reads = self.setup.protocol.reads(lengths, longest)
        else:
            reads = [min(self.truncated, longest)] * control_windows(longest, self.truncated)
        return [task_of("nll", self.label, self.factor, lengths, reads, document=id) for id in self.documents]

    @cached_property
    def _questions(self) -> list[Task]:
        """A passkey task per length, followed by each retrieval task per length."""
        kinds: list[tuple[Kind, list[str | None]]] = [
            ("passkey", [None] if self.questions.passkey else []), ("retrieval", [*self.questions.tasks])
        ]  # fmt: skip
        return [
            task_of(kind, self.label, self.factor, [length], [length] * self.questions.count(name), question=name)
            for kind, names in kinds
            for length in self.setup.lengths
            for name in names
        ]

    def _key_sums(self, index: int, measurement: Measurement) -> dict[str, Any]:
        """Return the NLL sum and number of a document's key tokens; empty if key tokens were not requested."""
        if self.keys is None:
            return {}
        indices = self.keys.get(self.documents[index])
        if indices is None or measurement.length < self.setup.lengths[-1]:
            return {"key_nll_sum": None, "key_tokens": None}
        assert measurement.first is not None  # the protocols of LongPPL score every token
        return key_sums(measurement.nll, indices, measurement.first)


def control_run(setup: Setup, scorer: Any, trained_length: int) -> MethodRun:
    """Return the run of the unpatched model with truncated context."""
    return MethodRun(setup, CONTROL, 1.0, scorer, truncated=trained_length)


def method_run(setup: Setup, plan: ExtensionPlan) -> MethodRun:
    """Return the run of the model under a plan, which is in force for the time of its stage."""
    factor = 1.0 if plan.changes_nothing else plan.factor
    enter = partial(patch_model, setup.scorer.model, plan, tokenizer=setup.tokenizer)
    return MethodRun(setup, plan.method, factor, setup.scorer, plan, enter, questions=setup.questions)


def name_of(plan: ExtensionPlan) -> str:
    """Return the name of the run of a plan."""
    return title(plan.method, 1.0 if plan.changes_nothing else plan.factor)


@dataclass(frozen=True)
class Assembly:
    """Assembly of outcomes into results, over the documents that every run measured.

    A document that failed in one run is left out of all runs at every length, because rows are comparable only over
    the same documents. A method that failed on every document is left out. Results report both with reasons. Gains are
    relative to the control. Changes are relative to `unpatched`, or without it to the control within the trained
    length.
    """

    methods: Sequence[MethodRun]
    control: MethodRun | None = None
    unpatched: MethodRun | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    _rows: dict[Any, list[Row]] = field(default_factory=dict, repr=False)

    def results(self, outcomes: Outcomes) -> Results:
        """Return the results of the finished runs.

        Raises:
            EvaluationError: the control failed on every document, every method did, or no document is left.
        """
        runs = [*([self.control] if self.control else []), *self.methods]
        finished = [run for run in runs if all(task in outcomes for task in run.tasks)]
        measured = {run: run.by_document(outcomes) for run in finished}
        failed = {run: next(iter(reasons.values())) for run, (records, reasons) in measured.items() if not records}
        if self.control in failed or all(run in failed for run in self.methods):
            reasons = "; ".join(f"{run.name}: {reason}" for run, reason in failed.items())
            raise EvaluationError(f"Expected documents that can be measured, got failures of all: {reasons}. {REMEDY}")
        left_out: dict[str, str] = {}
        for run, (_, reasons_of) in measured.items():
            for id, reason in reasons_of.items() if run not in failed else ():
                left_out.setdefault(id, f"{run.name}: {reason}")
        common = [id for id in self.methods[0].documents if id not in left_out]
        if not common:
            reasons = "; ".join(f"{id} ({reason})" for id, reason in left_out.items())
            raise EvaluationError(f"Expected a document that all methods can measure, got none: {reasons}. {REMEDY}")

        records = {
            run: [record for id in common for record in by_id[id]]
            for run, (by_id, _) in measured.items()
            if run not in failed
        }
        methods = [run for run in self.methods if run in records]
        return Results(
            self._provenance(failed, left_out, outcomes),
            [row for run in methods for row in self._rows_of(run, records, outcomes)],
            [record for of_run in records.values() for record in of_run],
            [row for run in methods for row in run.retrieval_rows(outcomes)],
        )

    def _rows_of(
        self, run: MethodRun, records: Mapping[MethodRun, list[DocumentRecord]], outcomes: Outcomes
    ) -> list[Row]:
        key = (run, *dict.fromkeys(record["document"] for record in records[run]))
        if key not in self._rows:  # bootstraps are slow, and results are assembled after each method
            seed = run.setup.config.seed
            trained_length = (self.control and self.control.truncated) or 0
            control = records[self.control] if self.control else []
            # Within the trained length the control is the unpatched model, even if `none` is not requested.
            inside = [record for record in control if record["length"] <= trained_length]
            baseline = records.get(self.unpatched, inside) if self.unpatched else inside
            self._rows[key] = make_rows(
                records[run], conditions=run.setup.conditions, control=control, baseline=baseline, seed=seed
            )
            if run.keys is not None:
                for row in self._rows[key]:
                    row |= longppl_cells(records[run], control, row["length"], seed)
        return [Row(row, **run.passkey_cells(row.length, outcomes)) for row in self._rows[key]]

    def _provenance(
        self, failed: Mapping[MethodRun, str], left_out: Mapping[str, str], outcomes: Outcomes
    ) -> dict[str, Any]:
        whole = {**self.methods[0].setup.provenance, **self.provenance}
        tokens = {entry["document"]: entry["tokens"] for entry in whole["documents"]}
        return {
            **whole,
            "not_applicable": {
                **whole.get("not_applicable", {}),
                **{run.name: f"failed on every document: {reason}" for run, reason in failed.items()},
            },
            "documents": [entry for entry in whole["documents"] if entry["document"] not in left_out],
            "left_out": [
                *whole["left_out"],
                *({"document": id, "tokens": tokens[id], "reason": reason} for id, reason in left_out.items()),
                *(failure for run in self.methods for failure in run.unanswered(outcomes)),
            ],
        }


def key_text(task: Task) -> str:
    """Return the identity of a task as JSON text."""
    return json.dumps(task.key)
