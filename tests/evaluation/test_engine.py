"""The runner alone, on tasks that need no model: what is dealt to whom, what fails, what a journal saves."""

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
from hf_posext.evaluation.runner import RunJournal, measure
from hf_posext.evaluation.tasks import Outcome, Stage, Task
from hf_posext.processes import deal, everywhere, processes_of, rank_of


def task(method: str, document: object = "1") -> Task:
    return Task("nll", method, 1.0, (64,), str(document))


def raising(error: BaseException) -> Any:
    def run(task: Task) -> Any:
        raise error

    return run


def stages(*methods: str, documents: int = 3, ran: list[Any] | None = None) -> list[Stage]:
    """The value of a task is its own name; `ran` gets the tasks in the order in which they ran."""
    ran = [] if ran is None else ran

    def run(task: Task) -> Any:
        ran.append(task)
        return {"name": str(task)}

    return [Stage(name, nullcontext, [task(name, d) for d in range(documents)], run) for name in methods]


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


def test_each_stage_is_entered_once_and_left_also_after_an_error() -> None:
    events: list[str] = []

    @contextmanager
    def enter(name: str) -> Iterator[None]:
        events.append(f"enter {name}")
        try:
            yield
        finally:
            events.append(f"leave {name}")

    def say(task: Task) -> None:
        events.append(f"{task.method}{task.document}")

    broken = [
        Stage("a", lambda: enter("a"), [task("a", 1), task("a", 2)], say),
        Stage("b", lambda: enter("b"), [task("b")], raising(InvalidParameterError("no such thing"))),
    ]
    with pytest.raises(InvalidParameterError, match="no such thing"):
        measure(broken)
    assert events == ["enter a", "a1", "a2", "leave a", "enter b", "leave b"]
    events.clear()
    with pytest.raises(KeyboardInterrupt):
        measure([Stage("c", lambda: enter("c"), [task("c")], raising(KeyboardInterrupt()))])
    assert events == ["enter c", "leave c"]


def test_a_task_that_fails_is_an_outcome_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    failing = {
        "nan": NonFiniteError("Expected finite logits in document 'a'"),
        "memory": torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
        "bug": ZeroDivisionError("division by zero"),
        "silent": RuntimeError(),
    }

    def run(task: Task) -> int:
        if task.method in failing:
            raise failing[task.method]
        return 7

    tasks = [task(name) for name in (*failing, "good")]
    with caplog.at_level(logging.WARNING, logger="hf_posext"):
        outcomes = measure([Stage("x", nullcontext, tasks, run)])
    assert [outcomes[task] for task in tasks] == [
        Outcome(failure="Expected finite logits in document 'a'"),
        Outcome(failure="CUDA out of memory."),
        Outcome(failure="ZeroDivisionError: division by zero"),
        Outcome(failure="RuntimeError: RuntimeError"),
        Outcome(7),
    ]
    traced = {str(record.args[0]) for record in caplog.records if record.exc_info}  # type: ignore[index]
    assert traced == {"bug, document '1', 64 tokens", "silent, document '1', 64 tokens"}, "weather takes one line"


def test_a_run_with_a_journal_measures_nothing_twice(tmp_path: Path) -> None:
    path, ran = tmp_path / "journal.jsonl", []  # type: tuple[Path, list[Any]]
    outcomes = measure(stages("a", "b"))
    with RunJournal(path, {}) as journal:
        measure(stages("a"), journal=journal)
    with RunJournal(path, {}) as journal:
        again = measure(stages("a", "b", ran=ran), journal=journal)
    assert {task.method for task in ran} == {"b"} and list(again) == list(outcomes)
    ran.clear()
    with RunJournal(path, {}) as journal:
        last = measure(stages("a", "b", ran=ran), journal=journal)
    assert ran == [] and last == again == outcomes and len(path.read_text().splitlines()) == 7


def test_what_failed_is_tried_again_by_the_run_that_continues(tmp_path: Path) -> None:
    path, tasks = tmp_path / "journal.jsonl", [task("a", 1), task("a", 2)]

    def busy(task: Task) -> int:
        if task.document == "1":
            raise RuntimeError("busy")
        return 2

    with RunJournal(path, {}) as journal:
        first = measure([Stage("a", nullcontext, tasks, busy)], journal=journal)
    assert first[tasks[0]].failure == "RuntimeError: busy"
    assert [json.loads(line)["task"]["document"] for line in path.read_text().splitlines()[1:]] == ["2"]
    with RunJournal(path, {}) as journal:  # the second must not run again
        outcomes = measure(
            [Stage("a", nullcontext, tasks, lambda task: {"1": 1}[str(task.document)])], journal=journal
        )
    assert outcomes == {tasks[0]: Outcome(1), tasks[1]: Outcome(2)}


def test_the_outcomes_so_far_are_told_after_each_stage() -> None:
    counts: list[int] = []
    measure(stages("a", "b"), on_stage=lambda outcomes: counts.append(len(outcomes)))
    assert counts == [3, 6]


def test_a_disk_that_is_full_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="can be written"):
        measure(stages("a"), journal=RunJournal(tmp_path / "file" / "journal.jsonl", {}))
