"""Tokens that a model has read, for whoever shows progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_LISTENER: ContextVar[Callable[[int], None] | None] = ContextVar("tokens", default=None)


@contextmanager
def on_tokens(listener: Callable[[int], None]) -> Iterator[None]:
    """Inside, `listener` is called with the tokens of each forward of this thread that has ended."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def tokens_read(count: int) -> None:
    """Say that a model has read so many tokens."""
    listener = _LISTENER.get()
    if listener is not None:
        listener(count)
