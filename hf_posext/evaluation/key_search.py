"""LongPPL in a comparison: key tokens are found once, before the methods are measured."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import EvaluationError, InvalidParameterError
from ..patching.modes import evaluation_mode
from .journal import RunJournal
from .key_tokens import Criterion, KeyTokens, check_criterion, check_reads, evaluator_name, find_in_row
from .parallel import token_scorer
from .runner import measure
from .scorer import TokenScorer
from .setup import Request, Setup
from .tasks import MethodRun, Stage, Task, task_of
from .tokens import TokensRead, read_by

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

Evaluator = str | nn.Module | tuple[nn.Module, Any]
"""Evaluator that finds key tokens: the label of a compared method, a model, or a model and its tokenizer."""

WHOLE = ("prefix", "sliding", "rolling")
"""Protocols that score every token given all earlier tokens at the longest length."""


@dataclass(frozen=True)
class KeySearch:
    """Search for key tokens by one evaluator. `enter` returns the context in which its patch is in force."""

    setup: Setup
    evaluator: str
    scorer: TokenScorer
    given: TokensRead
    criterion: Criterion
    enter: Callable[[], AbstractContextManager[Any]]

    @property
    def others(self) -> list[Any]:
        """Evaluator in a list, which is empty if the evaluator is the measured model."""
        return [] if self.scorer is self.setup.scorer else [self.scorer.model]

    @property
    def identity(self) -> dict[str, Any]:
        """Facts about the search that a run depends on, in addition to the evaluator's weights."""
        fingerprint = hashlib.sha256(repr([row.tolist() for row in self.given.rows]).encode()).hexdigest()
        return {"longppl": {"evaluator": self.evaluator, **self.criterion._asdict(), "tokens": fingerprint}}

    def run(self, accelerator: Accelerator | None, journal: RunJournal | None) -> tuple[KeyTokens, dict[str, Any]]:
        """Find the key tokens on all processes, and return them with their entry of the provenance.

        Raises:
            EvaluationError: the evaluator failed on every document.
        """
        ids = self.given.ids
        tasks = {id: self._task(index, id) for index, id in enumerate(ids)}
        stage = Stage(f"key tokens by {self.evaluator}", self.enter, list(tasks.values()), self._find)
        outcomes = measure([stage], accelerator=accelerator, journal=journal)
        by_id = {id: outcomes[task] for id, task in tasks.items()}
        failures = {id: outcome.failure for id, outcome in by_id.items() if outcome.failure is not None}
        if len(failures) == len(ids):
            raise EvaluationError(
                f"no key tokens: {self.evaluator} failed on every document: {failures[ids[0]]}. Pass another "
                "evaluator, as in --longppl org/name, or leave longppl out."
            )
        values = {id: outcome.value for id, outcome in by_id.items() if outcome.failure is None}
        total = sum(value["found"] for value in values.values())
        if not total:
            logger.warning(
                "no token is key, so there is no LongPPL: more than %d tokens of context do not help %s; use an "
                "evaluator that reads longer, or a smaller short_length",
                self.criterion.short_length,
                self.evaluator,
            )
        indices = {id: value["indices"] for id, value in values.items()}
        documents = self.setup.documents
        keys = KeyTokens(indices, documents.length, total, self.evaluator, self.criterion, documents.start)
        left_out = [{"document": id, "reason": reason} for id, reason in failures.items()]
        return keys, {"evaluator": self.evaluator, **self.criterion._asdict(), "left_out": left_out}

    def _find(self, task: Task) -> dict[str, Any]:
        result = find_in_row(self.scorer, self.given, self.given.ids.index(str(task.document)), self.criterion)
        return {"indices": result.indices, "found": result.found}

    def _task(self, index: int, id: str) -> Task:
        length, size = len(self.given.rows[index]), self.criterion.short_length + self.criterion.stride
        windows = 1 + max(0, length - size) // self.criterion.stride
        reads = [length, *[min(size, length)] * windows]
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
    if isinstance(config.longppl, tuple) and len(config.longppl) != 2:
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
    if isinstance(evaluator, str):
        run = runs[_find_label(evaluator, [run.name for run in runs])]
        evaluator_tokens = read_by(None, setup.tokenizer, setup.texts, setup.documents)
        search = KeySearch(setup, run.name, run.scorer, evaluator_tokens, criterion, run.enter)
    else:
        model, tokenizer = evaluator if isinstance(evaluator, tuple) else (evaluator, None)
        evaluator_tokens = read_by(tokenizer, setup.tokenizer, setup.texts, setup.documents)
        check_reads(model, evaluator_tokens.rows)
        scorer = token_scorer(model, setup.memory)
        name = evaluator_name(model)
        search = KeySearch(setup, name, scorer, evaluator_tokens, criterion, lambda: evaluation_mode(scorer.model))
    check_criterion(criterion, max(len(row) for row in evaluator_tokens.rows))
    return search


def _find_label(label: str, names: Sequence[str]) -> int:
    """Return the index of the method with this label or name."""
    matches = [index for index, name in enumerate(names) if label in (name, name.rsplit(" x", 1)[0])]
    if len(matches) != 1:
        raise InvalidParameterError(
            f"longppl is {label!r}, which {'several' if matches else 'none'} of the methods are: {', '.join(names)}. "
            "Pass one of these, or a model (on the command line its folder or Hub id, with a slash in it)."
        )
    return matches[0]


def default_criterion(asked: Mapping[str, Any], trained_length: int | None, longest: int) -> Criterion:
    """Return the requested criterion, with defaults from the paper and windows that fit.

    The paper's short context has 4096 tokens. All of its models were trained on that length, which is well below the
    measured lengths. The default here is half of the trained length, so that windows stay inside the trained length,
    or half of the longest length if that is less, and at most 4096. The stride is a quarter of it, as in the paper.
    """
    values = {name: value for name, value in asked.items() if value is not None}
    short = values.setdefault("short_length", min(4096, (trained_length or longest) // 2, longest // 2))
    return Criterion(**values, stride=max(1, short // 4))
