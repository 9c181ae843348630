"""Journal files of a run, and the lock that refuses a second writer."""

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
                f"{file} is being written by another run. Wait until it has ended, or pass another --output (in "
                "Python, journal=)."
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
