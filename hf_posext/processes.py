"""Processes of a run: which of them this is, what each of them does, and the lock that gives an output one writer.

Work is dealt in whole documents, whose values are gathered and never averaged over processes. Their sums are pooled
afterwards in document order, so results are bit-equal for any number of processes.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from filelock import FileLock, Timeout

from .errors import EvaluationError, InvalidParameterError, JournalError, PosExtError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

logger = logging.getLogger(__name__)

RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables of torch and MPI for the rank of a process and the number of processes, as accelerate reads them."""


def rank() -> int:
    """Return the rank of this process, 0 without a launcher. Only process 0 writes and prints."""
    return _from_launcher(RANKS, 0)


def world_size() -> int:
    """Return the number of processes of the launcher, 1 without a launcher."""
    return _from_launcher(SIZES, 1)


def _from_launcher(names: tuple[str, ...], default: int) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), default)


def rank_of(accelerator: Accelerator | None) -> int:
    """Return the index of this process; 0 without an accelerator."""
    return 0 if accelerator is None else int(accelerator.process_index)


def processes_of(accelerator: Accelerator | None) -> int:
    """Return the number of processes, all of which the accelerator must have joined; 1 without an accelerator."""
    if accelerator is None:
        return 1
    started, joined = world_size(), int(accelerator.num_processes)
    if started > joined:
        raise InvalidParameterError(
            f"Expected an Accelerator that has joined the {started} processes of the launcher, got {joined}, so "
            "that each would do all of the work. Pass Accelerator(cpu=True) on a machine without a GPU, or set "
            "ACCELERATE_USE_CPU=true."
        )
    return joined


def shares_texts(accelerator: Accelerator | None) -> bool:
    """Return `True` if all processes share each text, instead of reading different texts."""
    config = getattr(accelerator, "parallelism_config", None)
    if accelerator is None or config is None or config.cp_size == 1:
        return False
    if config.cp_size != accelerator.num_processes:
        raise InvalidParameterError(
            f"Expected cp_size to be the number of processes ({accelerator.num_processes}), got {config.cp_size}. An "
            "evaluation divides each text among all processes or none. Pass an equal cp_size, or leave it out."
        )
    return True


def deal(costs: Sequence[float], processes: int) -> list[int]:
    """Return the process of each piece of work. The costliest pieces go first, each to the least loaded process.

    Every process computes the same assignment. Pieces of equal cost are assigned in order.
    """
    loads, owners = [0.0] * processes, [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[piece] = min(range(processes), key=loads.__getitem__)
        loads[owners[piece]] += costs[piece]
    return owners


def everywhere(work: Callable[[], T], accelerator: Accelerator | None) -> list[T]:
    """Run this process's share of the work, and return the results of all processes in order.

    Every process must call it. An error is raised on all processes, see [`exchange`]. Ctrl-C is not, because launchers
    then stop all processes.
    """
    if processes_of(accelerator) == 1:
        return [work()]
    result: T | None = None
    ended: Exception | None = None
    try:
        result = work()
    except Exception as error:
        ended = error
    return exchange(result, ended, accelerator)  # type: ignore[arg-type]  # without an error there is a result


def exchange(result: T, ended: Exception | None, accelerator: Accelerator | None) -> list[T]:
    """Return the results of all processes in order, after each has finished or failed.

    Every process must call it. The error `ended` of one process is raised on all, so none of them waits for a stopped
    process. Other processes raise the same if it is a [`PosExtError`], otherwise an [`EvaluationError`].
    """
    if processes_of(accelerator) == 1:
        if ended is not None:
            raise ended
        return [result]
    from accelerate.utils import gather_object

    error = ended  # errors of other packages may not survive pickling
    if ended is not None and not isinstance(ended, PosExtError):
        error = EvaluationError(f"process {rank_of(accelerator)} failed: {type(ended).__name__}: {ended}")
    shares = gather_object([(None if ended else result, error)])
    errors = [error for _, error in shares if error is not None]
    if errors:
        raise ended or errors[0]
    return [share for share, _ in shares]


NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Error numbers of a file system without locks."""


class WriterLock:
    """Lock on the journal of a run and the report beside it, for as long as this object lives.

    Each process of a run holds the lock of its own file. Process 0 also holds the locks of other files from an earlier
    run, because a process of that run may have outlived its launcher. The operating system releases a lock when its
    process ends, even after a crash. One thread may acquire a lock several times, as the command line does around the
    journal. On a file system without locks a warning is logged, and the journal watches the size of its file.

    Args:
        path (`str` or `Path`): file of process 0.
        rank (`int`, *optional*, defaults to 0): index of this process.
        processes (`int`, *optional*, defaults to 1): number of writing processes.

    Raises:
        JournalError: another process, or another thread of this one, is writing.
    """

    def __init__(self, path: str | Path, rank: int = 0, processes: int = 1) -> None:
        path = Path(path)
        files = [journal_file(path, rank)]
        if rank == 0:
            current = {journal_file(path, index) for index in range(processes)}
            files += [file for file in journal_files(path) if file not in current]
        self._locks: list[tuple[FileLock, bool]] = []
        self._made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for file in files:
                lock = FileLock(f"{file}.lock", is_singleton=True, fallback_to_soft=False)
                first = not lock.is_locked
                lock.acquire(blocking=False)
                self._locks.append((lock, first))
        except Timeout as error:
            self.release()
            raise JournalError(
                f"Expected a journal that no other run writes, got {file}, which is being written by another run. "
                "Wait until it has ended, or pass another --output (in Python, journal=)."
            ) from error
        except OSError as error:  # the first write reports a folder that is not writable
            if error.errno in NO_LOCKS:
                logger.warning("%s cannot be locked: %s. Start no other run on it.", path, error.strerror)

    def release(self) -> None:
        """Release the lock, and delete its lock files and the empty directories created for it."""
        for lock, first in reversed(self._locks):
            if first:  # deleted under the lock: a waiting process sees that its file is gone, and creates a new one
                with suppress(OSError):  # the directory is gone
                    Path(lock.lock_file).unlink()
            lock.release()
        self._locks.clear()
        with suppress(OSError):  # usually not empty
            for folder in self._made:
                folder.rmdir()
        self._made.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def journal_file(path: str | Path, rank: int) -> Path:
    """Return the file that a process writes: `journal.jsonl`, `journal-1.jsonl`, ..."""
    path = Path(path)
    return path.with_name(f"{path.stem}-{rank}{path.suffix}") if rank else path


def journal_files(path: str | Path) -> list[Path]:
    """Return the existing files of a journal, of all processes."""
    path = Path(path)
    pattern = re.compile(rf"{re.escape(path.stem)}(-\d+)?{re.escape(path.suffix)}")
    files = path.parent.iterdir() if path.parent.is_dir() else ()
    return sorted(file for file in files if pattern.fullmatch(file.name))
