"""Runner of tasks on several processes: a finished task is on disk before the next one starts.

A journal contains one JSON object per line. The first line contains everything that the run depends on, and each later
line contains a task and its value:

    {"schema": 3, "configuration": {"model": "...", "lengths": [512, 4096], ...}}
    {"task": {"kind": "nll", "method": "yarn", "factor": 8.0, "lengths": [512], "document": "book-1"}, "value": [...]}

Process 0 writes `journal.jsonl`, and process n writes `journal-n.jsonl` next to it. A resumed run reads all of these
files, so it may have a different number of processes. A journal has one writer: a second run is refused while the
first one is active.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from tqdm.auto import tqdm

from ..decode import short
from ..errors import JournalError, NonFiniteError, OutOfMemoryError, PosExtError, first_line
from ..processes import (
    WriterLock,
    deal,
    everywhere,
    exchange,
    journal_file,
    journal_files,
    processes_of,
    rank_of,
    shares_texts,
)
from .scorer import LISTENER
from .tasks import Outcome, Outcomes, Stage, Task, key_text

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

HEARTBEAT = 1.0
"""Seconds between updates of the progress bar's clock, even during a long forward."""


def measure(
    stages: Sequence[Stage],
    *,
    accelerator: Accelerator | None = None,
    journal: RunJournal | None = None,
    on_stage: Callable[[Outcomes], Any] | None = None,
) -> Outcomes:
    """Measure every task of every stage, each on one process.

    All tasks are distributed over the processes by cost. Each process measures its tasks stage by stage. If a task
    fails, because logits are not finite, memory runs out, or another package raises an error, the remaining tasks
    continue. Any other error of this package ends the run on all processes. Tasks in the journal, which is the same on
    every process, are not measured again. Failed tasks are not written to the journal, so a resumed run retries them.

    `on_stage` is called with the outcomes so far after each stage. With several processes it is called once, at the
    end, because only then does each process have all outcomes. Outcomes are in the order of the stages and their
    tasks.
    """
    tasks = [task for stage in stages for task in stage.tasks]
    outcomes = {task: Outcome(journal[task]) for task in tasks if task in journal} if journal is not None else {}
    if outcomes:
        logger.info("%d of %d measurements are in the journal", len(outcomes), len(tasks))
    share = _share([task for task in tasks if task not in outcomes], accelerator)
    processes = processes_of(accelerator)
    ended: Exception | None = None
    try:
        with Progress(share, rank_of(accelerator), processes) as progress:
            for stage in stages:
                todo = [task for task in stage.tasks if task in share]
                if todo:
                    with stage.enter():
                        for task in todo:
                            progress.begin(stage.label, task)
                            try:
                                outcomes[task] = Outcome(stage.measure(task))
                            except Exception as error:
                                outcomes[task] = _failed(task, error)
                            else:
                                if journal is not None:
                                    journal[task] = outcomes[task].value
                            progress.end(task)
                if on_stage is not None and processes == 1:
                    on_stage(outcomes)
    except Exception as error:
        ended = error
    for outcomes_of_process in exchange(outcomes, ended, accelerator):
        outcomes |= outcomes_of_process
    outcomes = {task: outcomes[task] for task in tasks}
    if on_stage is not None and processes > 1:
        on_stage(outcomes)
    return outcomes


def _share(tasks: Sequence[Task], accelerator: Accelerator | None) -> set[Task]:
    """Return the tasks of this process; all tasks if processes share each text."""
    if shares_texts(accelerator):
        return set(tasks)
    owners = deal([task.cost for task in tasks], processes_of(accelerator))
    return {task for task, owner in zip(tasks, owners, strict=True) if owner == rank_of(accelerator)}


def _failed(task: Task, error: Exception) -> Outcome:
    """Return the outcome of a failed task, or raise an error that ends the run."""
    if isinstance(error, NonFiniteError | OutOfMemoryError | torch.OutOfMemoryError):
        logger.error("%s failed: %s", task, error)
        return Outcome(failure=first_line(error))
    if isinstance(error, PosExtError):
        raise error
    logger.error("%s failed", task, exc_info=error)
    return Outcome(failure=f"{type(error).__name__}: {first_line(error)}")


class Progress:
    """Progress bar over the tokens that this process reads, with the current task.

    Tokens are counted at the end of each forward, and at the latest at the end of their task. The clock is updated
    every second, to distinguish a long forward from a hanging process. Only the first process shows a bar, and only on
    a terminal.
    """

    def __init__(self, tasks: set[Task], rank: int, processes: int) -> None:
        total = sum(task.tokens for task in tasks)
        self.bar = tqdm(total=total, unit="tok", unit_scale=True, disable=True if rank else None)
        self.bar.set_postfix_str(f"{processes} process{'es' if processes > 1 else ''}", refresh=False)
        self._limit = 0.0  # tokens including those of the current task
        self._stop = threading.Event()
        self._clock = threading.Thread(target=self._tick, daemon=True)

    def begin(self, label: str, task: Task) -> None:
        """Show the current task."""
        self._limit = self.bar.n + task.tokens
        self.bar.set_description(label if task.document is None else f"{label}, {task.document}")

    def end(self, task: Task) -> None:
        """Count the remaining tokens of a finished or failed task."""
        self.bar.update(self._limit - self.bar.n)

    def __enter__(self) -> Self:
        self._listening = LISTENER.set(self._add)
        if not self.bar.disable:
            self._clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._clock.is_alive():
            self._clock.join()
        LISTENER.reset(self._listening)
        self.bar.close()

    def _add(self, tokens: int) -> None:
        self.bar.update(max(0, min(tokens, self._limit - self.bar.n)))

    def _tick(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            self.bar.refresh()


SCHEMA = 3

LISTED = 5
"""Most differences between two runs in a message. Two models differ in dozens of entries."""


class RunJournal:
    """Mapping from finished tasks to their values, kept in a file.

    `journal[task] = value` appends a line and waits until it is on disk (fsync). A run that is killed at any moment
    loses only the current task. A torn last line is cut off on resume. Nothing is written before the first task is
    finished. `values` contains the values finished by all processes, by `key_text`.

    Args:
        path (`str` or `Path`): file of process 0. The files of other processes are named after it.
        configuration (`Mapping`): everything that the measurements depend on, in plain JSON types.
        rank (`int`, *optional*, defaults to 0): index of this process.
        processes (`int`, *optional*, defaults to 1): number of processes of this run.

    Raises:
        JournalError: the journal has another configuration, another run is writing it, a line is corrupt, or a file
            cannot be read or written.
    """

    def __init__(self, path: str | Path, configuration: Mapping[str, Any], rank: int = 0, processes: int = 1) -> None:
        self.path = journal_file(path, rank)
        self._header = {"schema": SCHEMA, "configuration": json.loads(json.dumps(configuration))}
        self._file: FileIO | None = None
        self._size = 0  # bytes of the complete lines that this process has read or written
        self.values: dict[str, Any] = {}
        self._lock = WriterLock(path, rank, processes)
        try:
            for file in journal_files(path):
                self.values |= dict(self._read(file))
        except JournalError:
            self.close()
            raise

    def __contains__(self, task: Task) -> bool:
        return key_text(task) in self.values

    def __getitem__(self, task: Task) -> Any:
        return self.values[key_text(task)]

    def __setitem__(self, task: Task, value: Any) -> None:
        """Write the value of a finished task, in plain JSON types. If the disk is full, all earlier lines are kept."""
        try:
            if self._file is None:
                self._file = self._open()
            self._write(self._file, {"task": task.key, "value": value})
        except OSError as error:
            is_full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
            kept = " All that was finished before is kept there." if self.path.is_file() else ""
            raise JournalError(
                f"Expected a journal that can be written, got {self.path}: {error.strerror}.{kept} "
                f"{'Make room' if is_full else 'Mend that'}, then run the same again with --resume (in Python, with "
                "the same journal=)."
            ) from error

    def close(self) -> None:
        """Close the file and release the lock."""
        if self._file is not None:
            self._file.close()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> FileIO:
        """Open the file with its header, and cut off a torn last line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = FileIO(self.path, "a+")
        file.seek(0)
        self._require_unchanged(file.readall().rfind(b"\n") + 1)
        file.truncate(self._size)
        if not self._size:
            self._write(file, self._header)
        return file

    def _write(self, file: FileIO, entry: Mapping[str, Any]) -> None:
        status = os.fstat(file.fileno())
        self._require_unchanged(status.st_size)
        if not (self.path.exists() and os.path.samestat(status, self.path.stat())):  # another run may start there
            raise JournalError(
                f"Expected the journal {self.path}, got none: it was moved or deleted during the run, and what is "
                "finished with it. Start again in a directory that nothing else changes."
            )
        data = memoryview(json.dumps(entry).encode() + b"\n")
        self._size += len(data)
        while data:  # a disk that is nearly full accepts only part of it
            data = data[file.write(data) :]
        os.fsync(file.fileno())

    def _require_unchanged(self, size: int) -> None:
        """Refuse lines that this process neither read nor wrote, in case the file system has no locks."""
        if size != self._size:
            raise JournalError(
                f"Expected {self._size} bytes in {self.path}, as this run left it, got {size}: another run writes it. "
                "End that one and go on with --resume (in Python, with the same journal=), or pass another output."
            )

    def _read(self, file: Path) -> Iterator[tuple[str, Any]]:
        try:
            *lines, torn = (data := file.read_bytes()).split(b"\n")  # the rest after the last newline
        except OSError as error:
            raise JournalError(
                f"Expected a journal that can be read, got {file}: {error.strerror}. Pass another --output (in "
                "Python, journal=)."
            ) from error
        if file == self.path:
            self._size = len(data) - len(torn)
        for number, line in enumerate(lines, 1):
            entry = _parsed(line, ("task", "value") if number > 1 else ("schema", "configuration"))
            if entry is None:
                raise JournalError(
                    f"Expected a finished task in line {number} of {file}, got "
                    f"{short(line.decode(errors='replace'))}. Delete that line to go on without this measurement, or "
                    "the whole file to begin anew."
                )
            if number > 1:
                yield json.dumps(entry["task"]), entry["value"]
            elif entry != self._header:
                differences = list(_differences("", entry, self._header))
                more = f"; and {len(differences) - LISTED} more" if len(differences) > LISTED else ""
                raise JournalError(
                    f"Expected the journal of this run, got that of another run in {file}: "
                    f"{'; '.join(differences[:LISTED])}{more}. Pass another output, or the earlier settings."
                )


@contextmanager
def open_journal(
    path: str | Path | None, configuration: Mapping[str, Any], accelerator: Accelerator | None
) -> Iterator[RunJournal | None]:
    """Open the journal of this process, with the finished tasks of all processes; `None` without a path.

    Every process raises the [`JournalError`] of one.
    """
    if path is None:
        yield None
        return
    rank, processes = rank_of(accelerator), processes_of(accelerator)
    journals: list[RunJournal] = []  # not exchanged, because a lock belongs to its process

    def read() -> dict[str, Any]:
        journals.append(RunJournal(path, configuration, rank, processes))
        return journals[0].values

    try:
        for values in everywhere(read, accelerator):  # machines may not share a directory
            journals[0].values |= values
        yield journals[0]
    finally:
        for journal in journals:
            journal.close()


def _parsed(line: bytes, keys: tuple[str, ...]) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and tuple(entry) == keys else None


def _differences(path: str, earlier: Any, current: Any) -> Iterator[str]:
    """Describe the differences between two JSON values, such as `lengths.0 is 512 there and 1024 here`."""
    if isinstance(earlier, dict) and isinstance(current, dict):
        for key in earlier | current:
            yield from _differences(f"{path}.{key}", earlier.get(key), current.get(key))
    elif isinstance(earlier, list) and isinstance(current, list) and len(earlier) == len(current):
        for index, pair in enumerate(zip(earlier, current, strict=True)):
            yield from _differences(f"{path}.{index}", *pair)
    elif earlier != current:
        name = path.removeprefix(".").removeprefix("configuration.")
        yield f"{name} is {short(earlier)} there and {short(current)} here"
