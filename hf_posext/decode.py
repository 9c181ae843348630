"""JSON into frozen dataclasses, strictly: what does not fit the type hints is refused by its path and value."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import PlanError

MAX_NUMBER = 2**40
"""No length, factor or base of a plan is above this."""

T = TypeVar("T")


def decode(cls: type[T], data: Any, where: str = "plan") -> T:
    """An instance of a dataclass from plain JSON types.

    Raises:
        PlanError: missing or unknown keys, another type than the hint says, a number that is not finite or above
            `MAX_NUMBER`; the message tells where.
    """
    if not isinstance(data, Mapping):
        raise PlanError(f"{where} is {short(data)}; an object of {cls.__name__} belongs there")
    hints = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    if set(data) != set(names):
        missing, unknown = sorted(set(names) - set(data)), sorted(set(data) - set(names))
        raise PlanError(f"{where} lacks {missing} and has unknown {unknown}; plan again with this version")
    return cls(**{name: _value(hints[name], data[name], f"{where}.{name}") for name in names})


def short(value: Any) -> str:
    """A value as text, cut to one line's worth."""
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):  # only `X | None` occurs
        return None if value is None else _value(arguments[0], value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise PlanError(f"{where} is {short(value)}; a list belongs there")
        return tuple(_value(arguments[0], entry, f"{where}.{i}") for i, entry in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return decode(hint, value, where)  # type: ignore[arg-type]
    wanted = Mapping if origin is not None else (int | float) if hint is float else hint
    fits = isinstance(value, wanted) and (hint is bool or not isinstance(value, bool))
    if not fits or (isinstance(value, int | float) and not (math.isfinite(value) and abs(value) <= MAX_NUMBER)):
        name = "object" if origin is not None else {"str": "text", "int": "whole number"}.get(hint.__name__, "number")
        raise PlanError(f"{where} is {short(value)}; a {name} of at most {MAX_NUMBER:g} belongs there")
    return float(value) if hint is float else value
