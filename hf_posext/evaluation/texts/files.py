"""Files that are whole or not there, and names of them that mean the same on another machine."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: str | Path, data: str | bytes) -> Path:
    """Writes a file beside its place and moves it there, so that neither a reader nor a crash meets half of it.

    Args:
        path (`str` or `Path`): where to; its directory exists.
        data (`str` or `bytes`): all of the file; text is written as UTF-8.

    Returns:
        `Path`: the file.

    Raises:
        OSError: it cannot be written; a file that was there is still whole.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def portable(name: str) -> str:
    """An absolute path inside the current directory as a relative one; any other text as it is.

    What results say about their origin shall not name somebody's machine where it need not.
    """
    path = Path(name)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return name
