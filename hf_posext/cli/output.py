"""Output of a command: a new or empty directory, or one with the journal of a run to resume."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..errors import InvalidParameterError, JournalError, PosExtError
from ..locks import WriterLock, journal_files
from .console import say
from .processes import rank, world_size

if TYPE_CHECKING:
    from ..evaluation import Results

JOURNAL = "journal.jsonl"


@contextmanager
def output_directory(path: Path, resume: bool | None = None) -> Iterator[None]:
    """Check, before any work, that a report can be written, and lock the journal against other writers.

    Of several processes, only the first one checks. A launcher stops the others if it refuses. A directory that is
    still empty at the end is removed. With `resume`, the directory may contain a journal and other files. `None` is
    for commands without a journal.

    Raises:
        JournalError: another run writes to the directory.
        InvalidParameterError: the directory holds files, or a journal without `resume`, or cannot be written.
    """
    lock = nullcontext() if resume is None else WriterLock(path / JOURNAL, rank(), world_size())
    try:
        with lock:
            if not rank():
                _require_writable(path, bool(resume))
            yield
    finally:
        if not rank() and path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _require_writable(path: Path, resume: bool) -> None:
    files = path.is_dir() and any(not entry.is_dir() and entry.suffix != ".lock" for entry in path.iterdir())
    has_journal = bool(journal_files(path / JOURNAL))
    if has_journal and not resume:
        raise InvalidParameterError(
            f"output {path} holds the journal of a run; to go on with it type the same with --resume, else give "
            "another --output"
        )
    if files and not has_journal:
        raise InvalidParameterError(
            f"output {path} holds files already{', and no journal to go on with' if resume else ''}. Pass another "
            "--output, or move them away."
        )
    _make_writable(path)


def _make_writable(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise InvalidParameterError(
            f"cannot write to {directory}: {error.strerror or error}. Pass an --output that can be written."
        ) from error


@contextmanager
def plan_file(path: Path, resume: bool) -> Iterator[Path]:
    """Check, before any work, that a plan can be written, lock its journal against other writers, and yield it.

    The journal lies beside the plan. If the user interrupts the run, a message reports whether finished work is kept.

    Raises:
        JournalError: another run writes the journal.
        InvalidParameterError: the file is not named `.json`, exists without a journal to resume, has a journal
            although `resume` is false, or cannot be written.
    """
    if path.suffix != ".json":
        raise InvalidParameterError(f"output is {path}. Pass the name of a JSON file, as in --output plan.json.")
    journal = path.with_suffix(".journal.jsonl")
    with WriterLock(journal, rank(), world_size()):
        if not rank():
            _require_new(path, journal, resume)
        try:
            yield journal
        except KeyboardInterrupt:
            state = (
                f"what is finished is kept in {journal}; go on with --resume"
                if journal_files(journal)
                else "nothing is kept"
            )
            say(f"interrupted; {state}", err=True)
            raise typer.Exit(130) from None


def _require_new(path: Path, journal: Path, resume: bool) -> None:
    if path.exists() and not (resume and journal_files(journal)):
        raise InvalidParameterError(f"output {path} exists. Pass another --output, or move it away.")
    if journal_files(journal) and not resume:
        raise InvalidParameterError(
            f"{journal} is the journal of a run; to go on with it type the same with --resume, else give another "
            "--output"
        )
    _make_writable(path.parent)


@contextmanager
def report_of(output: Path, command: str) -> Iterator[Callable[[Results], None]]:
    """Yield a function that writes the report of results. If measuring ends early, report the work that is kept."""
    from ..reporting import write_report

    finished: list[str] = []

    def write(results: Results) -> None:
        results.provenance["command"] = command
        if not rank():
            write_report(results, output)
        finished[:] = dict.fromkeys(row["method"] for row in results.rows)

    try:
        yield write
    except KeyboardInterrupt:
        say(f"interrupted; {_kept(finished, output)}", err=True)
        raise typer.Exit(130) from None
    except (PosExtError, OSError) as error:
        if isinstance(error, JournalError) or not journal_files(output / JOURNAL):
            raise
        raise InvalidParameterError(f"{str(error).rstrip('.')}; {_kept(finished, output)}") from error


def _kept(finished: list[str], output: Path) -> str:
    if not journal_files(output / JOURNAL):
        return "nothing was finished, nothing was written"
    state = f"finished and kept in {output}: {', '.join(finished)}" if finished else f"a part is kept in {output}"
    return f"{state}; go on with --resume"
