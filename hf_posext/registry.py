"""The names of the methods: those of this package, and those that others register through an entry point.

The methods of this package register themselves when `hf_posext.methods` is imported; nothing is imported upward here.
"""

from __future__ import annotations

import difflib
import re
import warnings
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
        InvalidParameterError: not a class of methods, or its name is taken by another class or contains one of `+,(`.
    """
    name = getattr(method, "name", None)
    if not (isinstance(method, type) and isinstance(name, str) and callable(getattr(method, "plan", None))):
        raise InvalidParameterError(f"expected a subclass of Method with a name, got {method!r}")
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
            try:
                register(entry.load())
            except (Exception, SystemExit) as error:  # whatever somebody else's module raises when it is imported
                package = entry.dist.name if entry.dist is not None else "an unknown package"
                warnings.warn(
                    f"the method {entry.name!r} of {package} is left out: its entry point {entry.value!r} raised "
                    f"{type(error).__name__}: {error}",
                    stacklevel=2,
                )
    return dict(sorted(_methods.items()))


def get_method(name: str) -> type[Method]:
    """The method of that name; case, hyphens and underscores do not count.

    Raises:
        UnknownMethodError: no such method; the message suggests the nearest names.
    """
    known = methods()
    if name in known:
        return known[name]
    plain = {re.sub("[-_ ]", "", spelled.lower()): method for spelled, method in known.items()}
    method = plain.get(re.sub("[-_ ]", "", name.lower()))  # "YaRN", "DynamicNTK", "self_extend"
    if method is not None:
        return method
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
