"""Values against type hints: checks of arguments, and strict decoding of JSON into frozen dataclasses."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import InvalidParameterError, PlanError, PosExtError

MAX_NUMBER = 2**40
"""Upper bound of every number in a plan."""

MAX_TOKENS = 2**24
"""Longest text of a plan. Float32, in which phases are computed, does not tell later positions apart."""

T = TypeVar("T")


WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", types.NoneType: "None"}


class Bound(NamedTuple):
    """Condition on a number, as a part of its type: `Annotated[float, Bound("above 0", lambda rate: rate > 0)]`."""

    text: str
    holds: Callable[[Any], bool]


def check_type(name: str, value: Any, hint: Any, largest: float = sys.float_info.max) -> None:
    """Check that a value has the type of its hint, and is within its bounds.

    A bool, a NaN, and what exceeds `largest` do not count as numbers. A string does not count as a sequence, and `""`
    does not count as text.

    Raises:
        InvalidParameterError: the value has another type, or is out of bounds.
    """
    if not _fits(value, hint, largest):
        raise InvalidParameterError(f"Expected {name} to be {_in_words(hint)}, got {short(repr(value))}.")


def plain(value: Any) -> Any:
    """Convert NumPy numbers and arrays to Python's own types."""
    if type(value).__module__ == "numpy":
        return value.tolist()
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value


def _fits(value: Any, hint: Any, largest: float) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Callable:
        return callable(value)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is Annotated:
        bounds = (bound for bound in arguments[1:] if isinstance(bound, Bound))
        return _fits(value, arguments[0], largest) and all(bound.holds(value) for bound in bounds)
    if origin is Sequence:
        is_sequence = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return is_sequence and all(_fits(item, arguments[0], largest) for item in value)
    if origin in (types.UnionType, Union):
        return any(_fits(value, argument, largest) for argument in arguments)
    if hint in (int, float):
        is_number = isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
        return is_number and abs(value) <= largest  # false for NaN
    return isinstance(value, origin or hint) and value != ""


def _in_words(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin is Annotated:
        return " ".join([_in_words(arguments[0]), *(one.text for one in arguments[1:] if isinstance(one, Bound))])
    if origin is Sequence:
        return f"a list of {WORDS[arguments[0]].removeprefix('a ')}s".replace("texts", "names")
    if origin is Callable:
        return "a function"
    if origin in (types.UnionType, Union):
        return " or ".join(map(_in_words, arguments))
    return WORDS.get(hint) or f"{'an' if hint.__name__[0] in 'AEIOU' else 'a'} {hint.__name__}"


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
