"""The names of the methods: those of this package, and those that others register through an entry point.

The methods of this package register themselves when `hf_posext.methods` is imported; nothing is imported upward here.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, TypeVar

from .errors import InvalidParameterError, UnknownMethodError

if TYPE_CHECKING:
    from .methods.base import Method

ENTRY_POINT_GROUP = "hf_posext.methods"

_methods: dict[str, type[Method]] = {}
_pending = True

M = TypeVar("M", bound="type[Method]")


def register(method: M) -> M:
    """Class decorator: make a method known by its `name`.

    Raises:
        InvalidParameterError: the name is taken by another class, or holds one of `+,(`, which no name may.
    """
    name = method.name
    taken = _methods.get(name)
    if taken is not None and taken is not method:
        raise InvalidParameterError(f"method {name!r} is registered as {taken.__module__}; choose another name")
    if not name or set(name) & set("+,("):
        raise InvalidParameterError(f"method name {name!r} is empty or holds one of '+,('; choose another name")
    _methods[name] = method
    return method


def methods() -> dict[str, type[Method]]:
    """Every registered method by name, sorted; loads the entry points of the group `hf_posext.methods` once."""
    global _pending
    if _pending:
        _pending = False
        for entry in entry_points(group=ENTRY_POINT_GROUP):
            register(entry.load())
    return dict(sorted(_methods.items()))


def get_method(name: str) -> type[Method]:
    """The method of that name.

    Raises:
        UnknownMethodError: no such method; the message suggests the nearest names.
    """
    known = methods()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    guess = f"did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    raise UnknownMethodError(f"unknown method {name!r}; {guess}there are: {', '.join(known)}")


@dataclass(frozen=True)
class MethodInfo:
    """One row of the table of methods.

    Args:
        name (`str`): what `patch_model` takes.
        title (`str`): the name in the literature.
        url (`str`): the paper.
        kinds (`tuple[str, ...]`): the positional schemes that it extends.
        summary (`str`): one sentence.
    """

    name: str
    title: str
    url: str
    kinds: tuple[str, ...]
    summary: str


def list_methods(kind: str | None = None) -> list[MethodInfo]:
    """Every method, or those that extend one kind of scheme.

    Args:
        kind (`str`, *optional*): `rotary`, `learned`, `alibi`, `relative`, `sinusoidal` or `none`.

    Returns:
        `list[MethodInfo]`: sorted by name.
    """
    return [
        MethodInfo(name, cls.title, cls.url, cls.kinds, cls.summary())
        for name, cls in methods().items()
        if kind is None or kind in cls.kinds
    ]
