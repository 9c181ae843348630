"""JSON into frozen dataclasses, strictly: what does not fit the type hints is refused by its path and value."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

from .errors import PlanError, PosExtError

MAX_NUMBER = 2**40
"""No length, factor or base of a plan is above this."""

T = TypeVar("T")


class Rules(NamedTuple):
    """Error and bound of decoding.

    Args:
        error (`type[PosExtError]`, *optional*): raised.
        remedy (`str`, *optional*): advice in the message about wrong keys.
        largest (`float`, *optional*): bound of floating-point numbers; that of whole ones is `MAX_NUMBER`.
        optional (`frozenset[str]`, *optional*): names of fields that may be missing where they have a default.
    """

    error: type[PosExtError] = PlanError
    remedy: str = "plan again with this version"
    largest: float = MAX_NUMBER
    optional: frozenset[str] = frozenset()


PLAN_RULES = Rules()


def decode(cls: type[T], data: Any, where: str = "plan", rules: Rules = PLAN_RULES) -> T:
    """Build a dataclass, or a record of a `TypedDict`, from plain JSON types.

    Raises:
        PlanError: missing or unknown keys, another type than the hint, a number that is not finite or too large; other
            rules have other errors.
    """
    if not isinstance(data, Mapping):
        raise rules.error(f"{where} is {short(data)}; an object of {cls.__name__} belongs there")
    hints = get_type_hints(cls)
    if is_typeddict(cls):
        required = set(cls.__required_keys__)  # type: ignore[attr-defined]
    else:
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        hints = {name: hint for name, hint in hints.items() if name in fields}
        required = {
            name
            for name, field in fields.items()
            if name not in rules.optional or field.default is dataclasses.MISSING
        }
    if not required <= set(data) <= set(hints):
        missing, unknown = sorted(required - set(data)), sorted(set(data) - set(hints))
        raise rules.error(f"{where} lacks {missing} and has unknown {unknown}; {rules.remedy}")
    return cls(**{name: _value(hints[name], value, f"{where}.{name}", rules) for name, value in data.items()})


def short(value: Any) -> str:
    """Return a value as text, cut to one line's worth."""
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _value(hint: Any, value: Any, where: str, rules: Rules) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):  # only `X | None` occurs
        return None if value is None else _value(arguments[0], value, where, rules)
    if origin in (tuple, list):
        if not isinstance(value, list):
            raise rules.error(f"{where} is {short(value)}; a list belongs there")
        return origin(_value(arguments[0], entry, f"{where}.{i}", rules) for i, entry in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return decode(hint, value, where, rules)  # type: ignore[arg-type]
    wanted = Mapping if origin is not None else (int | float) if hint is float else hint
    fits = isinstance(value, wanted) and (hint is bool or not isinstance(value, bool))
    largest = rules.largest if hint is float else MAX_NUMBER
    if not fits or (isinstance(value, int | float) and not (math.isfinite(value) and abs(value) <= largest)):
        name = "object" if origin is not None else {"str": "text", "int": "whole number"}.get(hint.__name__, "number")
        raise rules.error(f"{where} is {short(value)}; a {name} of at most {largest:g} belongs there")
    return float(value) if hint is float else value
