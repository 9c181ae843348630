"""Runs of a command: their output, the processes of a launcher, and trackers of results."""

from __future__ import annotations

import datetime
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..errors import InvalidParameterError, JournalError, PosExtError
from ..processes import WriterLock, journal_files, rank, world_size
from .console import say

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from ..evaluation import Results

JOURNAL = "journal.jsonl"

PATIENCE = datetime.timedelta(days=7)
"""Time that a process waits for others with longer documents. Launchers end all processes if one dies."""


@contextmanager
def output_directory(path: Path, resume: bool | None = None) -> Iterator[None]:
    """Check, before any work, that a report can be written, and lock the journal against other writers.

    Of several processes, only the first one checks. A launcher stops the others if it refuses. With `resume`, the
    directory may contain a journal and other files. `None` is for commands without a journal.
    """
    lock = nullcontext() if resume is None else WriterLock(path / JOURNAL, rank(), world_size())
    with removed_if_empty(path), lock:
        if not rank():
            files = path.is_dir() and any(not entry.is_dir() and entry.suffix != ".lock" for entry in path.iterdir())
            has_journal = bool(journal_files(path / JOURNAL))
            _require_resumed(path, has_journal and not resume)
            if files and not has_journal:
                raise InvalidParameterError(
                    f"Expected output to be a new or empty directory, got {path} with files"
                    f"{' and no journal to go on with' if resume else ''}. Pass another --output, or move them away."
                )
            make_writable(path)
        yield


@contextmanager
def removed_if_empty(path: Path) -> Iterator[None]:
    """Remove a directory on exit if it is empty. Of several processes, only the first one does."""
    try:
        yield
    finally:
        if not rank() and path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _require_resumed(place: Path, is_new: bool) -> None:
    """Refuse to begin a run where another one has left its journal."""
    if is_new:
        raise InvalidParameterError(
            f"Expected no journal of another run, got one in {place}. Pass --resume to go on with it, or another "
            "--output."
        )


def make_writable(directory: Path) -> None:
    """Make a directory, and check that files can be written to it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise InvalidParameterError(
            f"Expected an --output that can be written, got {directory}: {error.strerror or error}. Pass another "
            "--output."
        ) from error


@contextmanager
def plan_file(path: Path, resume: bool) -> Iterator[Path]:
    """Check, before any work, that a plan can be written, lock its journal against other writers, and yield it.

    The journal lies beside the plan. If the user interrupts the run, a message reports whether finished work is kept.
    """
    if path.suffix != ".json":
        raise InvalidParameterError(
            f"Expected output to be the name of a JSON file, got {path}. Pass --output plan.json."
        )
    journal = path.with_suffix(".journal.jsonl")
    with WriterLock(journal, rank(), world_size()):
        if not rank():
            has_journal = bool(journal_files(journal))
            if path.exists() and not (resume and has_journal):
                raise InvalidParameterError(
                    f"Expected output to be a new file, got {path}, which exists. Pass another --output, or move it "
                    "away."
                )
            _require_resumed(journal, has_journal and not resume)
            make_writable(path.parent)
        try:
            yield journal
        except KeyboardInterrupt:
            kept = f"What is finished is kept in {journal}. Pass --resume to go on."
            say(f"Interrupted. {kept if journal_files(journal) else 'Nothing is kept.'}", err=True)
            raise typer.Exit(130) from None


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
        say(f"Interrupted. {_kept(finished, output)}", err=True)
        raise typer.Exit(130) from None
    except (PosExtError, OSError) as error:
        if isinstance(error, JournalError) or not journal_files(output / JOURNAL):
            raise
        reason = f"Expected a report in {output}, got {error.strerror}" if isinstance(error, OSError) else str(error)
        raise InvalidParameterError(f"{reason.rstrip('.')}. {_kept(finished, output)}") from error


def _kept(finished: list[str], output: Path) -> str:
    if not journal_files(output / JOURNAL):
        return "Nothing was finished or written."
    state = f"Finished and kept in {output}: {', '.join(finished)}" if finished else f"A part is kept in {output}"
    return f"{state}. Pass --resume to go on."


def join_processes(device: str | None) -> tuple[str, Accelerator | None]:
    """Return the device of this process, and the `Accelerator` that shares work among the processes of a launcher.

    Processes of a launcher compute on the CPU if there is no other device, even without `ACCELERATE_USE_CPU`. Without
    a launcher (of accelerate, torch or MPI), the accelerator is `None`, and the device is the requested one, or the
    CPU.
    """
    if world_size() == 1 and not {"WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys():
        return device or "cpu", None
    if device not in (None, "cpu"):
        raise InvalidParameterError(
            f"Expected device to be left out under a launcher, which gives each process its own, got {device!r}. Drop "
            "it, or pass --device cpu."
        )
    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    gpus = torch.accelerator if hasattr(torch, "accelerator") else torch.cuda
    on_cpu = device == "cpu" or not gpus.is_available()
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    joined = accelerator.process_index, accelerator.num_processes
    if joined != (rank(), world_size()):
        raise InvalidParameterError(
            f"Expected process {rank()} of {world_size()}, as the launcher started it, got {joined[0]} of {joined[1]} "
            "from accelerate, so that work would be done twice. Start processes by accelerate launch or torchrun, or "
            "one process without a launcher."
        )
    if not accelerator.is_main_process:
        logging.getLogger("hf_posext").setLevel(logging.ERROR)  # only the first process prints warnings
    return str(accelerator.device), accelerator


def spread(model: PreTrainedModel, accelerator: Accelerator | None) -> PreTrainedModel:
    """Return the model of this process: whole, or sharded if the launcher requests context parallelism."""
    from ..evaluation.scorer import shard_weights
    from ..processes import shares_texts

    return shard_weights(model, accelerator) if accelerator is not None and shares_texts(accelerator) else model


def finish(results: Results, output: Path, accelerator: Accelerator | None, log_with: str | None = None) -> None:
    """Log the results, print the tables and the path of the report, and leave the group of processes.

    Only the first process logs and prints.
    """
    if log_with is not None:
        _track(results, log_with, output, accelerator)
    if accelerator is not None:
        accelerator.end_training()
    if not rank():
        from ..reporting import print_tables

        print_tables(results)
        count, devices = results.provenance["processes"], dict.fromkeys(results.provenance["devices"])
        processes = f"{count} process{'es' if count > 1 else ''} on {', '.join(devices)}"
        say(f"measured by {processes}, in {results.provenance['dtype']}")
        say(f"report: {output / 'README.md'}")


def check_tracker(option: str, name: str, installed: list[str]) -> None:
    """Refuse, before any work, a tracker that is not among those that the library of an option can use here."""
    if name not in installed:
        names = ", ".join(sorted(installed)) or "none; pip install tensorboard"
        raise InvalidParameterError(
            f"Expected {option} to be a tracker that is installed ({names}), got {name!r}. Pass one of these, or pip "
            "install tensorboard."
        )


def _track(results: Results, name: str, output: Path, accelerator: Accelerator | None) -> None:
    """Log results as curves over the context length. Trackers that write files write to `hf_posext` in `output`."""
    from accelerate import Accelerator

    from ..evaluation import log_results

    on_cpu = accelerator is None or accelerator.device.type == "cpu"
    tracking = Accelerator(cpu=on_cpu, log_with=name, project_dir=output)
    tracking.init_trackers("hf_posext")
    log_results(results, tracking)
    for tracker in tracking.trackers:
        tracker.finish()
