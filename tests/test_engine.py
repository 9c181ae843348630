"""The engine alone, on units that need no model: what is dealt to whom, what fails, what a journal saves."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_posext.errors import InvalidParameterError, JournalError, NonFiniteError
from hf_posext.evaluation.running.engine import Outcome, State, Unit, measure
from hf_posext.evaluation.running.run_journal import RunJournal
from hf_posext.evaluation.scoring.distribution import deal, everywhere, processes_of, rank_of


def raising(error: BaseException) -> Any:
    def run() -> Any:
        raise error

    return run


def states(*methods: str, documents: int = 3, ran: list[Any] | None = None) -> list[State]:
    """Each unit gives its own name back, and says in which order it ran."""
    ran = [] if ran is None else ran

    def unit(*key: Any) -> Unit:
        return Unit(key, 1.0, lambda: ran.append(key) or {"sum": len(ran) and hash(key) % 7})

    return [State(name, nullcontext, [unit(name, d) for d in range(documents)]) for name in methods]


def test_work_is_dealt_longest_first_to_who_has_least() -> None:
    assert deal([1, 5, 2, 2], 2) == [1, 0, 1, 1]
    assert deal([3, 3, 3], 5) == [0, 1, 2] and deal([], 2) == [] and deal([0.5] * 4, 1) == [0] * 4
    draw = random.Random(0)
    for _ in range(50):
        costs, processes = [draw.uniform(0, 9) for _ in range(draw.randint(1, 30))], draw.randint(1, 5)
        loads = [0.0] * processes
        for cost, owner in zip(costs, deal(costs, processes), strict=True):
            loads[owner] += cost
        assert max(loads) - min(loads) <= max(costs), "else the last piece of the longest belonged elsewhere"


def test_one_process_is_alone() -> None:
    assert (rank_of(None), processes_of(None)) == (0, 1)
    assert everywhere(lambda: "mine", None) == ["mine"]
    with pytest.raises(ZeroDivisionError):
        everywhere(lambda: 1 / 0, None)


def test_each_state_is_entered_once_and_left_also_after_an_error() -> None:
    told: list[str] = []

    @contextmanager
    def enter(name: str) -> Iterator[None]:
        told.append(f"enter {name}")
        try:
            yield
        finally:
            told.append(f"leave {name}")

    def say(text: str) -> Any:
        return lambda: told.append(text)

    broken = [
        State("a", lambda: enter("a"), [Unit(("a", 1), 1, say("a1")), Unit(("a", 2), 9, say("a2"))]),
        State("b", lambda: enter("b"), [Unit(("b", 1), 1, raising(InvalidParameterError("no such thing")))]),
    ]
    with pytest.raises(InvalidParameterError, match="no such thing"):
        measure(broken)
    assert told == ["enter a", "a1", "a2", "leave a", "enter b", "leave b"]
    told.clear()
    with pytest.raises(KeyboardInterrupt):
        measure([State("c", lambda: enter("c"), [Unit(("c",), 1, raising(KeyboardInterrupt()))])])
    assert told == ["enter c", "leave c"]


def test_a_unit_that_fails_is_an_outcome_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    failing = {
        "nan": NonFiniteError("logits are not finite in document 'a'"),
        "memory": torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
        "bug": ZeroDivisionError("division by zero"),
        "silent": RuntimeError(),
    }
    units = [Unit((name,), 1, raising(error)) for name, error in failing.items()] + [Unit(("good",), 1, lambda: 7)]
    with caplog.at_level(logging.WARNING, logger="hf_posext"):
        outcomes = measure([State("x", nullcontext, units)])
    assert outcomes == {
        ("nan",): Outcome(failure="logits are not finite in document 'a'"),
        ("memory",): Outcome(failure="CUDA out of memory."),
        ("bug",): Outcome(failure="ZeroDivisionError: division by zero"),
        ("silent",): Outcome(failure="RuntimeError: RuntimeError"),
        ("good",): Outcome(7),
    }
    traced = {record.args[0] for record in caplog.records if record.exc_info}
    assert traced == {'["bug"]', '["silent"]'}, "a bug is told with its place, foreseen weather in one line"


def test_a_run_with_a_journal_measures_nothing_twice(tmp_path: Path) -> None:
    path, ran = tmp_path / "journal.jsonl", []  # type: tuple[Path, list[Any]]
    whole = measure(states("a", "b"))
    with RunJournal(path, {}) as journal:
        measure(states("a"), journal=journal)
    with RunJournal(path, {}) as journal:
        again = measure(states("a", "b", ran=ran), journal=journal)
    assert {key[0] for key in ran} == {"b"} and list(again) == list(whole)
    ran.clear()
    with RunJournal(path, {}) as journal:
        last = measure(states("a", "b", ran=ran), journal=journal)
    assert ran == [] and last == again and len(path.read_text().splitlines()) == 7


def test_what_failed_is_tried_again_by_the_run_that_continues(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with RunJournal(path, {}) as journal:
        first = measure(
            [
                State(
                    "a", nullcontext, [Unit(("a", 1), 1, raising(RuntimeError("busy"))), Unit(("a", 2), 1, lambda: 2)]
                )
            ],
            journal=journal,
        )
    assert first[("a", 1)].failure == "RuntimeError: busy"
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()[1:]] == [["a", 2]]
    units = [Unit(("a", 1), 1, lambda: 1), Unit(("a", 2), 1, raising(AssertionError("must not run again")))]
    with RunJournal(path, {}) as journal:
        assert measure([State("a", nullcontext, units)], journal=journal) == {
            ("a", 1): Outcome(1),
            ("a", 2): Outcome(2),
        }


def test_the_outcomes_so_far_are_told_after_each_state() -> None:
    told: list[int] = []
    measure(states("a", "b"), on_state=lambda outcomes: told.append(len(outcomes)))
    assert told == [3, 6]


def test_a_disk_that_is_full_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="cannot write"):
        measure(states("a"), journal=RunJournal(tmp_path / "file" / "journal.jsonl", {}))
