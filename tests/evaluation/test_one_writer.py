"""One output has one writer: a second run is refused at once, also where a file system has no locks."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from hf_posext.errors import InvalidParameterError, JournalError
from hf_posext.evaluation.runner import RunJournal
from hf_posext.evaluation.tasks import Task
from hf_posext.processes import SIZES, WriterLock, processes_of

from ..cli.helpers import NOVELS, compare, error_of, run
from ..helpers import ROOT

A, B = (Task("nll", "yarn", 8.0, (64,), document) for document in "ab")

HOLDER = """
import sys, time
from hf_posext.processes import WriterLock
lock = WriterLock(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
print("held", flush=True)
time.sleep(600)
"""


class Holder:
    """Another process that writes a journal."""

    def __init__(self, path: Path, rank: int = 0, processes: int = 1) -> None:
        words = [sys.executable, "-c", HOLDER, str(path), str(rank), str(processes)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert self.process.stdout is not None and self.process.stdout.readline() == "held\n"

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def test_a_journal_that_another_process_writes_is_refused_until_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "out" / "journal.jsonl"
    with Holder(path), pytest.raises(JournalError, match=r"journal\.jsonl, which is being written by another run"):
        RunJournal(path, {})
    with RunJournal(path, {}) as journal:  # the system has released the lock of the killed one
        journal[A] = 1
    assert [file.name for file in path.parent.iterdir()] == ["journal.jsonl"], "no lock file stays"


def test_a_worker_that_outlived_its_launcher_is_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with RunJournal(path, {}, rank=1, processes=2) as journal:
        journal[B] = 1
    with Holder(path, rank=1, processes=2):
        with pytest.raises(JournalError, match=r"journal-1\.jsonl, which is being written by another run"):
            RunJournal(path, {})
        with RunJournal(path, {}, rank=0, processes=2) as journal:
            journal[A] = 1  # of the same run
    with RunJournal(path, {}) as journal:
        assert A in journal and B in journal


def test_a_thread_is_a_writer_and_nested_locks_of_one_are_not(tmp_path: Path) -> None:
    path, refused = tmp_path / "journal.jsonl", []  # type: tuple[Path, list[str]]

    def second() -> None:
        try:
            RunJournal(path, {})
        except JournalError as error:
            refused.append(str(error))

    with WriterLock(path):
        with RunJournal(path, {}) as journal:
            journal[A] = 1
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refused) == 1
    RunJournal(path, {}).close()


def test_without_locks_the_size_of_the_file_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    path = tmp_path / "journal.jsonl"
    first, second = RunJournal(path, {"start": 0}), RunJournal(path, {"start": 3000})
    assert "cannot be locked" in caplog.text
    first[A] = 1
    with pytest.raises(JournalError, match=r"Expected 0 bytes in .* got \d+: another run writes it"):
        second[A] = 2
    third = RunJournal(path, {"start": 0})
    first[B] = 1
    with pytest.raises(JournalError, match="another run writes it"):
        third[B] = 1
    assert [line.count(b"task") for line in path.read_bytes().splitlines()] == [0, 1, 1]


def test_commands_refuse_an_output_that_is_being_written(tmp_path: Path) -> None:
    """Before anything is loaded: the models do not exist."""
    with Holder(tmp_path / "out" / "journal.jsonl"):
        assert "being written by another run" in error_of(compare(tmp_path / "out", model="./no/such"))
        assert "being written by another run" in error_of(compare(tmp_path / "out", "--resume", model="./no/such"))
        words = ["--model", "./no/such", "--dataset", NOVELS, "--lengths", 64, "--output", tmp_path / "out"]
        assert "being written by another run" in error_of(run("evaluate", *words))
    with Holder(tmp_path / "plan.journal.jsonl"):
        for command in ("recommend", "search"):
            words = ["./no/such", "--dataset", NOVELS, "--target-length", 512, "--output", tmp_path / "plan.json"]
            assert "being written by another run" in error_of(run(command, *words, "--resume"))


@pytest.mark.parametrize("variable", SIZES)
def test_processes_that_accelerate_has_not_joined_are_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Alone:
        process_index, num_processes = 0, 1

    for name in SIZES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "2")
    with pytest.raises(InvalidParameterError, match="joined the 2 processes of the launcher, got 1, so that each"):
        processes_of(Alone())  # type: ignore[arg-type]
    assert processes_of(None) == 1, "a process that shares nothing is alone"
