"""Where a report goes: a directory that is new, or has no files in it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InvalidParameterError


@contextmanager
def output_directory(path: Path) -> Iterator[None]:
    """Makes sure, before any work, that a report can be written; leaves no empty directory behind.

    Raises:
        InvalidParameterError: it holds files, or cannot be written.
    """
    if path.is_dir() and not all(entry.is_dir() for entry in path.iterdir()):
        raise InvalidParameterError(f"output {path} holds files already; give another --output, or move them away")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InvalidParameterError(
            f"cannot write to output {path}: {error.strerror or error}; give an --output that can be written"
        ) from error
    try:
        yield
    finally:
        if not any(path.iterdir()):
            path.rmdir()
