"""LongPPL in a comparison: key tokens are found once, before the methods are measured."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import EvaluationError, InvalidParameterError
from ..patching.modes import evaluation_mode
from .journal import RunJournal
from .key_tokens import Criterion, KeyTokens, check_criterion, check_reads, evaluator_name, find_in_row
from .runner import measure
from .scorer import TokenScorer, token_scorer
from .setup import Request, Setup
from .tasks import MethodRun, Stage, Task, task_of
from .tokens import TokensRead, read_by

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

WHOLE = ("prefix", "sliding", "rolling")
"""Protocols that score every token given all earlier tokens at the longest length."""


@dataclass(frozen=True)
class KeySearch:
    """Search for key tokens by one evaluator. `enter` returns the context in which its patch is in force."""

    setup: Setup
    evaluator: str
    scorer: TokenScorer
    tokens: TokensRead
    criterion: Criterion
    enter: Callable[[], AbstractContextManager[Any]]

    @property
    def others(self) -> list[Any]:
        """Evaluator in a list, which is empty if the evaluator is the measured model."""
        return [] if self.scorer is self.setup.scorer else [self.scorer.model]

    @property
    def _facts(self) -> dict[str, Any]:
        return {"evaluator": self.evaluator, **self.criterion._asdict()}

    @property
    def identity(self) -> dict[str, Any]:
        """Facts about the search that a run depends on, in addition to the evaluator's weights."""
        fingerprint = hashlib.sha256(repr([row.tolist() for row in self.tokens.rows]).encode()).hexdigest()
        return {"longppl": {**self._facts, "tokens": fingerprint}}

    def run(self, accelerator: Accelerator | None, journal: RunJournal | None) -> tuple[KeyTokens, dict[str, Any]]:
        """Find the key tokens on all processes, and return them with their entry of the provenance.

        Raises:
            EvaluationError: the evaluator failed on every document.
        """
        tasks = [self._task(id, row) for id, row in zip(self.tokens.ids, self.tokens.rows, strict=True)]
        stage = Stage(f"key tokens by {self.evaluator}", self.enter, tasks, self._find)
        outcomes = measure([stage], accelerator=accelerator, journal=journal)
        failures = {str(task.document): reason for task in tasks if (reason := outcomes[task].failure) is not None}
        if len(failures) == len(tasks):
            raise EvaluationError(
                f"no key tokens: {self.evaluator} failed on every document: {next(iter(failures.values()))}. Pass "
                "another evaluator, as in --longppl org/name, or leave longppl out."
            )
        values = {str(task.document): outcomes[task].value for task in tasks if str(task.document) not in failures}
        total = sum(value["found"] for value in values.values())
        if not total:
            logger.warning(
                "no token is key, so there is no LongPPL: more than %d tokens of context do not help %s; use an "
                "evaluator that reads longer, or a smaller short_length",
                self.criterion.short_length,
                self.evaluator,
            )
        indices = {id: value["indices"] for id, value in values.items()}
        rows = self.setup.documents
        keys = KeyTokens(indices, rows.length, total, self.evaluator, self.criterion, rows.start)
        left_out = [{"document": id, "reason": reason} for id, reason in failures.items()]
        return keys, {**self._facts, "left_out": left_out}

    def _find(self, task: Task) -> dict[str, Any]:
        index = self.tokens.ids.index(str(task.document))
        indices, contrast = find_in_row(self.scorer, self.tokens, index, self.criterion)
        return {"indices": indices, "found": len(contrast.keys)}

    def _task(self, id: str, row: torch.Tensor) -> Task:
        size = self.criterion.short_length + self.criterion.stride
        windows = 1 + max(0, len(row) - size) // self.criterion.stride
        reads = [len(row), *[min(size, len(row))] * windows]
        return task_of("keys", self.evaluator, 1.0, self.setup.lengths[-1:], reads, document=id)


def check_key_search(request: Request, trained_length: int | None, labels: Sequence[str]) -> Criterion | None:
    """Return the checked criterion of key tokens; `None` without LongPPL. This needs no documents.

    Raises:
        InvalidParameterError: no method has the label, several methods have it (pass `"yarn x8"`), the protocol does
            not score every token, or the criterion is impossible.
    """
    config = request.config
    thresholds = {"alpha": config.alpha, "beta": config.beta, "short_length": config.short_length}
    if config.longppl is None:
        for name, value in thresholds.items():
            if value is not None:
                raise InvalidParameterError(f"{name} is {value}, and there is no LongPPL. Pass longppl=, too.")
        return None
    # The model of a label reads with the tokenizer of the documents.
    if isinstance(config.longppl, tuple) and (len(config.longppl) != 2 or isinstance(config.longppl[0], str)):
        raise InvalidParameterError("Expected longppl to be a label, a model, or (model, tokenizer).")
    if request.protocol.name not in WHOLE:
        raise InvalidParameterError(
            f"longppl needs the NLL of every token given all tokens before it, which protocol "
            f"{request.protocol.name!r} does not give. Choose {', '.join(WHOLE)}, or leave longppl out."
        )
    criterion = default_criterion(thresholds, trained_length, request.lengths[-1])
    if isinstance(config.longppl, str):
        _find_label(config.longppl, labels)
        check_criterion(criterion, request.lengths[-1])
    return criterion


def key_search(setup: Setup, criterion: Criterion | None, runs: Sequence[MethodRun]) -> KeySearch | None:
    """Return the search for key tokens; `None` without a criterion. A label refers to one of the runs.

    Raises:
        InvalidParameterError: the evaluator cannot read the documents, or the criterion is impossible.
    """
    if criterion is None:
        return None
    evaluator = setup.config.longppl
    model, tokenizer = evaluator if isinstance(evaluator, tuple) else (evaluator, None)
    tokens = read_by(tokenizer, setup.tokenizer, setup.texts, setup.documents)
    check_criterion(criterion, max(len(row) for row in tokens.rows))
    if isinstance(model, str):
        run = runs[_find_label(model, [run.name for run in runs])]
        return KeySearch(setup, run.name, run.scorer, tokens, criterion, run.enter)
    check_reads(model, tokens.rows)
    scorer = token_scorer(model, setup.memory)
    return KeySearch(setup, evaluator_name(model), scorer, tokens, criterion, lambda: evaluation_mode(scorer.model))


def _find_label(label: str, names: Sequence[str]) -> int:
    """Return the index of the method with this label or name."""
    matches = [index for index, name in enumerate(names) if label in (name, name.rsplit(" x", 1)[0])]
    if len(matches) != 1:
        raise InvalidParameterError(
            f"longppl is {label!r}, which {'several' if matches else 'none'} of the methods are: {', '.join(names)}. "
            "Pass one of these, or a model (on the command line its folder or Hub id, with a slash in it)."
        )
    return matches[0]


def default_criterion(thresholds: Mapping[str, Any], trained_length: int | None, longest: int) -> Criterion:
    """Return the requested criterion, with defaults from the paper and windows that fit.

    The paper's short context has 4096 tokens. All of its models were trained on that length, which is well below the
    measured lengths. The default here is half of the trained length, so that windows stay inside the trained length,
    or half of the longest length if that is less, and at most 4096. The stride is a quarter of it, as in the paper.
    """
    values = {name: value for name, value in thresholds.items() if value is not None}
    short = values.setdefault("short_length", min(4096, (trained_length or longest) // 2, longest // 2))
    return Criterion(**values, stride=max(1, short // 4))
