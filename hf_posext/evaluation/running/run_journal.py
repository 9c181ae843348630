"""The journal of a run: what is finished is on the disk before anything else is measured.

One JSON object a line. The first says what is being measured, all others hold a finished measurement each:

    {"schema": 1, "configuration": {"model": "...", "lengths": [512, 4096], ...}}
    {"key": ["nll", "yarn", 8.0, "book-1", [512, 4096]], "value": [...]}

Process 0 writes `journal.jsonl`, process n `journal-n.jsonl` beside it. A run that continues reads all of them, so
that it may have another number of processes. A journal has one writer: while a run lives, a second one is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ...decode import short
from ...errors import JournalError
from ...locks import WriterLock, journal_file, journal_files
from ..scoring.distribution import everywhere, processes_of, rank_of

if TYPE_CHECKING:
    from accelerate import Accelerator

SCHEMA = 1


class RunJournal:
    """
    Appends finished measurements to a file, and knows those of before.

    Nothing is written before the first measurement is finished. Each is one line, on the disk (fsync) before `append`
    returns, so that a run that is killed at any moment loses what it was at and nothing else. A last line that was
    torn by that is cut off.

    Args:
        path (`str` or `Path`): the file of process 0; those of others are named after it.
        configuration (`Mapping`): plain JSON types; all that the measurements depend on.
        rank (`int`, *optional*, defaults to 0): the index of this process.
        processes (`int`, *optional*, defaults to 1): how many processes the run has.

    Attributes:
        finished (`dict[str, Any]`): the values that were found, of all processes, by `key_text`.

    Raises:
        JournalError: a journal of another configuration or that another run is writing, a corrupt line, or a file
            that cannot be read.
    """

    def __init__(self, path: str | Path, configuration: Mapping[str, Any], rank: int = 0, processes: int = 1) -> None:
        self.path = journal_file(path, rank)
        self._header = {"schema": SCHEMA, "configuration": json.loads(json.dumps(configuration))}
        self._file: FileIO | None = None
        self._size = 0  # bytes of whole lines, as this process knows them
        self.finished: dict[str, Any] = {}
        self._lock = WriterLock(path, rank, processes)
        try:
            for file in journal_files(path):
                self.finished |= dict(self._read(file))
        except JournalError:
            self.close()
            raise

    def append(self, key: Any, value: Any) -> None:
        """
        Write a finished measurement.

        Args:
            key (`list` or `tuple`): its name, plain JSON types.
            value (`Any`): what was found, plain JSON types.

        Raises:
            JournalError: the file cannot be written, as when the disk is full. All lines of before are kept.
        """
        try:
            if self._file is None:
                self._file = self._open()
            self._write(self._file, {"key": key, "value": value})
        except OSError as error:
            raise JournalError(
                f"cannot write {self.path}: {error.strerror}; all that was finished before is kept there: make room, "
                "then run the same again with --resume (in Python, with the same journal=)"
            ) from error

    def close(self) -> None:
        """Nothing is written after it, and others may write."""
        if self._file is not None:
            self._file.close()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> FileIO:
        """The file with its header, ready for the next line; what is behind the last whole line is cut off."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = FileIO(self.path, "a+")
        file.seek(0)
        self._require_unchanged(file.readall().rfind(b"\n") + 1)
        file.truncate(self._size)
        if not self._size:
            self._write(file, self._header)
        return file

    def _write(self, file: FileIO, entry: Mapping[str, Any]) -> None:
        self._require_unchanged(os.fstat(file.fileno()).st_size)
        data = memoryview(json.dumps(entry).encode() + b"\n")
        self._size += len(data)
        while data:  # a disk that is getting full takes a part of it
            data = data[file.write(data) :]
        os.fsync(file.fileno())

    def _require_unchanged(self, size: int) -> None:
        """Every line of the file is one that this process has read or written, whatever the file system locks."""
        if size != self._size:
            raise JournalError(
                f"{self.path} has {size} bytes where this run left {self._size}: another run writes it; end that one, "
                "and go on with --resume (in Python, with the same journal=), or give another output"
            )

    def _read(self, file: Path) -> Iterator[tuple[str, Any]]:
        try:
            *lines, torn = (data := file.read_bytes()).split(b"\n")  # behind the last newline
        except OSError as error:
            raise JournalError(
                f"cannot read the journal {file}: {error.strerror}; give another --output (in Python, journal=)"
            ) from error
        if file == self.path:
            self._size = len(data) - len(torn)
        for number, line in enumerate(lines, 1):
            entry = _parsed(line, ("key", "value") if number > 1 else ("schema", "configuration"))
            if entry is None:
                raise JournalError(
                    f"{file} is corrupt at line {number}: {short(line.decode(errors='replace'))}; delete that line to "
                    "go on without this measurement, or the whole file to begin anew"
                )
            if number > 1:
                yield key_text(entry["key"]), entry["value"]
            elif entry != self._header:
                told = "; ".join(_differences("", entry, self._header))
                raise JournalError(
                    f"{file} is the journal of another run, which cannot be continued by this one: {told}; give "
                    "another output, or the settings of before"
                )


@contextmanager
def open_journal(
    path: str | Path | None, configuration: Mapping[str, Any], accelerator: Accelerator | None
) -> Iterator[RunJournal | None]:
    """
    The journal of this process, which knows what all processes have finished; nothing if there is no path.

    Raises:
        JournalError: on every process, where one of them cannot read its files, or must not continue them.
    """
    if path is None:
        yield None
        return
    rank, processes = rank_of(accelerator), processes_of(accelerator)
    journals: list[RunJournal] = []  # a lock is of its process, so that journals do not travel

    def read() -> dict[str, Any]:
        journals.append(RunJournal(path, configuration, rank, processes))
        return journals[0].finished

    try:
        for finished in everywhere(read, accelerator):  # machines may have no directory in common
            journals[0].finished |= finished
        yield journals[0]
    finally:
        for journal in journals:
            journal.close()


def key_text(key: Any) -> str:
    """The name of a measurement as text; tuples and lists are the same."""
    return json.dumps(key)


def _parsed(line: bytes, keys: tuple[str, ...]) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and tuple(entry) == keys else None


def _differences(where: str, before: Any, now: Any) -> Iterator[str]:
    """Where two values of plain JSON types differ, as `lengths.0 is 512 there and 1024 here`."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            yield from _differences(f"{where}.{key}", before.get(key), now.get(key))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, pair in enumerate(zip(before, now, strict=True)):
            yield from _differences(f"{where}.{index}", *pair)
    elif before != now:
        name = where.removeprefix(".").removeprefix("configuration.")
        yield f"{name} is {short(before)} there and {short(now)} here"
