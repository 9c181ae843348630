"""Checks of what people pass as lengths and hyper-parameters."""

from __future__ import annotations

import numbers
import types
import warnings
from collections.abc import Sequence
from typing import Any, Union, get_args, get_origin

from ..decode import MAX_NUMBER, short
from ..errors import InvalidParameterError


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value is of a type such as `float | None`, with finite numbers only."""
    arguments = get_args(hint)
    if get_origin(hint) in (types.UnionType, Union):
        return any(fits(value, option) for option in arguments)
    wanted = get_origin(hint) or hint
    if isinstance(value, bool) or wanted is bool:
        return isinstance(value, bool) and wanted is bool
    if wanted in (float, int):
        number = isinstance(value, numbers.Integral if wanted is int else numbers.Real)
        return number and bool(abs(value) <= MAX_NUMBER)  # false of NaN, too
    if wanted is Sequence:
        return isinstance(value, list | tuple) and all(fits(entry, arguments[0]) for entry in value)
    return isinstance(value, wanted)


def type_text(hint: Any) -> str:
    """A type hint in words."""
    words = {float: "a finite number", int: "a whole number", bool: "True or False", str: "text", type(None): "None"}
    if get_origin(hint) in (types.UnionType, Union):
        return " or ".join(type_text(option) for option in get_args(hint))
    return "a list of finite numbers" if get_origin(hint) is Sequence else words.get(hint, str(hint))


def number(name: str, value: Any, *, whole: bool = False) -> Any:
    """A length or factor as a plain Python number; `None` where it is not given.

    Raises:
        InvalidParameterError: anything else than a finite number, or a whole one where tokens are counted.
    """
    if value is None:
        return None
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or (whole and value != value // 1) or not abs(value) < float("inf"):
        kind = "a whole number of tokens, e.g. 4096" if whole else "a finite number, e.g. 8"
        raise InvalidParameterError(f"{name} is {short(repr(value))}; expected {kind}")
    if not whole and abs(value) > MAX_NUMBER:
        raise InvalidParameterError(f"{name} is {short(value)}; at most {MAX_NUMBER} is possible")
    return int(value) if whole else float(value)


def renamed_length(trained_length: int | None, original_length: int | None) -> int | None:
    """The trained length that was given, by its name or by the former one.

    Raises:
        InvalidParameterError: both were given.
    """
    if original_length is None:
        return trained_length
    if trained_length is not None:
        raise InvalidParameterError("trained_length and original_length are the same; pass trained_length only")
    warnings.warn("original_length is deprecated; pass trained_length=", DeprecationWarning, stacklevel=3)
    return original_length
