"""Strict decoding of JSON into frozen dataclasses. Errors name the path and value that do not match the type hints."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import PlanError, PosExtError

MAX_NUMBER = 2**40
"""Upper bound of every number in a plan."""

MAX_TOKENS = 2**24
"""Longest text of a plan. Float32, in which phases are computed, does not tell later positions apart."""

T = TypeVar("T")


class Record(dict[str, Any]):
    """
    A dictionary with a fixed set of keys, also available as attributes.

    Subclasses declare the keys as annotations. Optional keys are declared with `= OptionalKey()`.

    ```python
    class Row(Record):
        length: int
        passkey: float | None = OptionalKey()

    row = Row(length=512)
    row.length, row["length"], row.passkey  # 512, 512, None
    ```
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no {name!r}") from None


class OptionalKey:
    """A key that a record may omit. Its attribute is `None` if the key is missing."""

    def __new__(cls) -> Any:
        return super().__new__(cls)

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, record: Record | None, owner: type) -> Any:
        return self if record is None else record.get(self.name)


def required_keys(cls: type[Record]) -> tuple[str, ...]:
    """Return the required keys of a record class, in order of declaration."""
    return tuple(name for name in get_type_hints(cls) if not isinstance(vars(cls).get(name), OptionalKey))


class Rules(NamedTuple):
    """Error type, bounds, and optional fields for decoding.

    Args:
        error (`type[PosExtError]`, *optional*): the error to raise.
        remedy (`str`, *optional*): advice in the message about wrong keys.
        largest (`float`, *optional*): bound of floating-point numbers. Integers are bounded by `MAX_NUMBER`.
        optional (`frozenset[str]`, *optional*): names of fields that may be missing if they have a default.
    """

    error: type[PosExtError] = PlanError
    remedy: str = "plan again with this version"
    largest: float = MAX_NUMBER
    optional: frozenset[str] = frozenset()


PLAN_RULES = Rules()


def decode(cls: type[T], data: Any, where: str = "plan", rules: Rules = PLAN_RULES) -> T:
    """Build a dataclass or a [`Record`] from plain JSON types.

    Raises:
        PlanError: if keys are missing or unknown, a type does not match its hint, or a number is not finite or too
            large. `rules.error` replaces this type.
    """
    if not isinstance(data, Mapping):
        raise rules.error(f"{where} is {short(data)}; an object of {cls.__name__} belongs there")
    hints = get_type_hints(cls)
    if issubclass(cls, Record):
        required = set(required_keys(cls))
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
    """Return a value as text, truncated to 40 characters."""
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
