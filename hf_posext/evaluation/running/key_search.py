"""LongPPL in a comparison: the key tokens are found once, before the methods are measured on them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from ...errors import EvaluationError, InvalidParameterError
from ...patching.modes import evaluation_mode
from ..contrast.key_tokens import Criterion, KeyTokens, check_criterion, check_reads, evaluator_name, find_in_row
from ..protocols.protocol import window_cost
from ..scoring.context_parallel import token_scorer
from ..scoring.scorer import TokenScorer
from ..texts.alignment import TokensRead, read_by
from .engine import Key, State, Unit, measure
from .readings import Reading
from .run_journal import RunJournal
from .setup import Setup

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

Evaluator = str | nn.Module | tuple[nn.Module, Any]
"""What finds key tokens: the label of a method that is compared, a model, or a model and its tokenizer."""

Enter = Callable[[], AbstractContextManager[Any]]

WHOLE = ("prefix", "sliding", "rolling")
"""Protocols that, at the longest length, score every token given all tokens before it."""


class FoundKeys(NamedTuple):
    """The key tokens, and the reasons of the documents in which they could not be found."""

    keys: KeyTokens
    failures: dict[str, str]

    @property
    def facts(self) -> dict[str, Any]:
        """What results say of them."""
        left_out = [{"document": id, "reason": reason} for id, reason in self.failures.items()]
        return {"longppl": {"evaluator": self.keys.evaluator, **self.keys.criterion._asdict(), "left_out": left_out}}


@dataclass(frozen=True)
class KeySearch:
    """
    A search for key tokens.

    Args:
        setup ([`Setup`]): what is measured.
        evaluator (`str`): its name.
        scorer ([`TokenScorer`]): of the evaluator.
        given ([`TokensRead`]): what it reads.
        criterion ([`Criterion`]): what makes a token key.
        enter (`Callable`): gives the context in which the evaluator is what its name says.
    """

    setup: Setup
    evaluator: str
    scorer: TokenScorer
    given: TokensRead
    criterion: Criterion
    enter: Enter

    @property
    def others(self) -> list[Any]:
        """The evaluator, if it is another model than the one that is measured."""
        return [] if self.scorer is self.setup.scorer else [self.scorer.model]

    @property
    def identity(self) -> dict[str, Any]:
        """What a run depends on beside the weights of the evaluator."""
        read = hashlib.sha256(repr([row.tolist() for row in self.given.rows]).encode()).hexdigest()
        return {"longppl": {"evaluator": self.evaluator, **self.criterion._asdict(), "tokens": read}}

    def run(self, accelerator: Accelerator | None, journal: RunJournal | None) -> FoundKeys:
        """
        Find them, on all processes.

        Raises:
            EvaluationError: the evaluator failed on every document.
        """
        ids = self.given.ids
        names: dict[str, Key] = {id: ("keys", self.evaluator, id) for id in ids}
        units = [Unit(names[id], self._cost(index), partial(self._find, index)) for index, id in enumerate(ids)]
        state = State(f"key tokens by {self.evaluator}", self.enter, units)
        outcomes = measure([state], accelerator=accelerator, journal=journal)
        found = {id: outcomes[names[id]] for id in ids}
        failures = {id: one.failure for id, one in found.items() if one.failure is not None}
        if len(failures) == len(ids):
            raise EvaluationError(
                f"no key tokens: {self.evaluator} failed on every document: {failures[ids[0]]}; give another "
                "evaluator, as in --longppl org/name, or leave longppl out"
            )
        values = {id: one.value for id, one in found.items() if one.failure is None}
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
        return FoundKeys(keys, failures)

    def _find(self, index: int) -> dict[str, Any]:
        found = find_in_row(self.scorer, self.given, index, self.criterion)
        return {"indices": found.indices, "found": found.found}

    def _cost(self, index: int) -> float:
        length, size = len(self.given.rows[index]), self.criterion.short_length + self.criterion.stride
        windows = 1 + max(0, length - size) // self.criterion.stride
        return window_cost(length) + windows * window_cost(min(size, length))


def key_search(
    setup: Setup,
    evaluator: Evaluator | None,
    asked: Mapping[str, float | None],
    trained_length: int | None,
    methods: Sequence[tuple[Reading, Enter]],
) -> KeySearch | None:
    """
    The search that was asked for, checked.

    Args:
        setup ([`Setup`]): what is measured.
        evaluator (*optional*): as `longppl` of [`compare`]; there is no search without one.
        asked (`Mapping[str, float or None]`): `alpha`, `beta` and `short_length` of [`compare`], as far as given.
        trained_length (`int`, *optional*): of the measured model.
        methods (`Sequence[tuple[Reading, Callable]]`): what may be meant by a label, and what puts it in force.

    Raises:
        InvalidParameterError: a label that none has or several have, a protocol that does not score every token, or
            an evaluator or a criterion that cannot be.
    """
    if evaluator is None:
        for name, value in asked.items():
            if value is not None:
                raise InvalidParameterError(f"{name} is {value}, and there is no LongPPL; give longppl=, too")
        return None
    if setup.protocol.name not in WHOLE:
        raise InvalidParameterError(
            f"longppl needs the NLL of every token given all tokens before it, which protocol {setup.protocol.name!r} "
            f"does not give; choose {', '.join(WHOLE)}, or leave longppl out"
        )
    criterion = default_criterion(asked, trained_length, setup.documents.length)
    if isinstance(evaluator, str):
        reading, enter = _method(evaluator, methods)
        given = read_by(None, setup.tokenizer, setup.texts, setup.documents)
        search = KeySearch(setup, reading.name, reading.scorer, given, criterion, enter)
    else:
        model, tokenizer = evaluator if isinstance(evaluator, tuple) else (evaluator, None)
        given = read_by(tokenizer, setup.tokenizer, setup.texts, setup.documents)
        check_reads(model, given.rows)
        scorer = token_scorer(model, setup.options.memory)
        name = evaluator_name(model)
        search = KeySearch(setup, name, scorer, given, criterion, lambda: evaluation_mode(scorer.model))
    check_criterion(criterion, max(len(row) for row in given.rows))
    return search


def default_criterion(asked: Mapping[str, Any], trained_length: int | None, longest: int) -> Criterion:
    """
    What was asked for, else the paper's thresholds and windows that fit.

    The paper's short context of 4096 tokens is one that its models were all trained on, and well below the lengths
    that it measures. Here it is half of the trained length, so that windows lie inside that, or half of the longest
    length if that is less; at most 4096. It moves by a quarter of itself, as in the paper.

    Args:
        asked (`Mapping[str, float or None]`): as of [`key_search`].
        trained_length (`int`, *optional*): of the model, if there is one.
        longest (`int`): tokens of the rows.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    short = given.setdefault("short_length", min(4096, (trained_length or longest) // 2, longest // 2))
    return Criterion(**given, stride=max(1, short // 4))


def _method(label: str, methods: Sequence[tuple[Reading, Enter]]) -> tuple[Reading, Enter]:
    found = [(reading, enter) for reading, enter in methods if label in (reading.label, reading.name)]
    if len(found) != 1:
        names = ", ".join(reading.name for reading, _ in methods)
        raise InvalidParameterError(
            f"longppl is {label!r}, which {'several' if found else 'none'} of the methods are: {names}; give one of "
            "these, or a model (on the command line its folder or Hub id, with a slash in it)"
        )
    return found[0]
