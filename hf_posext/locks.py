"""One output has one writer: the files of a run, and the lock that a second writer meets."""

from __future__ import annotations

import errno
import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from .errors import JournalError

logger = logging.getLogger(__name__)

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of a file system without locks."""


class WriterLock:
    """
    The right to write the journal of a run, and the report beside it, for as long as this object lives.

    Each process of a run holds the lock of its own file. Process 0 also holds those of files that processes of an
    earlier run have left, since one of them may have outlived its launcher. The operating system releases a lock when
    its process ends, however it ends. The same thread may take a lock several times, as the command line does around
    the journal. On a file system without locks a warning is logged, and the journal watches the size of its file.

    Args:
        path (`str` or `Path`): the file of process 0.
        rank (`int`, *optional*, defaults to 0): the index of this process.
        processes (`int`, *optional*, defaults to 1): how many processes write.

    Raises:
        JournalError: another process, or another thread of this one, is writing.
    """

    def __init__(self, path: str | Path, rank: int = 0, processes: int = 1) -> None:
        path = Path(path)
        files = [journal_file(path, rank)]
        if rank == 0:
            own = {journal_file(path, index) for index in range(processes)}
            files += [file for file in journal_files(path) if file not in own]
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
                f"{file} is being written by another run; wait until that has ended, or give another --output (in "
                "Python, journal=)"
            ) from error
        except OSError as error:  # where nothing can be written, whoever writes first says so
            if error.errno in NO_LOCKS:
                logger.warning("%s cannot be locked: %s; keep other runs away from it", path, error.strerror)

    def release(self) -> None:
        """Let others write. Leaves no lock file, and no empty directory that was made for it."""
        for lock, first in reversed(self._locks):
            if first:  # while the lock is held: a waiting process sees that its file has gone, and makes a new one
                Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
        self._locks.clear()
        with suppress(OSError):  # not empty, most often
            for folder in self._made:
                folder.rmdir()
        self._made.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def journal_file(path: str | Path, rank: int) -> Path:
    """The file that a process writes: `journal.jsonl`, `journal-1.jsonl`, ..."""
    path = Path(path)
    return path.with_name(f"{path.stem}-{rank}{path.suffix}") if rank else path


def journal_files(path: str | Path) -> list[Path]:
    """The files of a journal that exist, of all processes."""
    path = Path(path)
    pattern = re.compile(rf"{re.escape(path.stem)}(-\d+)?{re.escape(path.suffix)}")
    files = path.parent.iterdir() if path.parent.is_dir() else ()
    return sorted(file for file in files if pattern.fullmatch(file.name))
