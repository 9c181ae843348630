"""Values checked against type hints, which may contain bounds: arguments, fields of dataclasses, and JSON."""

from __future__ import annotations

import dataclasses
import math
import numbers
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


class Bound(NamedTuple):
    """Condition on a number, as a part of its type: `Annotated[float, Bound("above 0", lambda rate: rate > 0)]`."""

    text: str
    holds: Callable[[Any], bool]


Positive = Annotated[float, Bound("above 0", lambda number: number > 0)]
Count = Annotated[int, Bound("of at least 1", lambda number: number >= 1)]
Index = Annotated[int, Bound("of at least 0", lambda number: number >= 0)]

_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", type(None): "None"}


def fits(value: Any, hint: Any, largest: float) -> bool:
    """Return whether a value has the type of a hint.

    A bool, a NaN, and what exceeds `largest` do not count as numbers. A string does not count as a sequence. The hint
    is a class, a union, or one of `Annotated` with [`Bound`], `Literal`, `Sequence`, `tuple`, `list`, `Mapping`, and
    `Callable`.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any or origin is Callable:
        return hint is Any or callable(value)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin in (types.UnionType, Union):
        return any(fits(value, option, largest) for option in arguments)
    if origin is Annotated:
        bounds = (bound for bound in arguments[1:] if isinstance(bound, Bound))
        return fits(value, arguments[0], largest) and all(bound.holds(value) for bound in bounds)
    if origin in (Sequence, tuple, list):
        is_sequence = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return is_sequence and all(fits(entry, arguments[0], largest) for entry in value)
    if hint in (int, float):
        is_number = isinstance(value, numbers.Integral if hint is int else numbers.Real)
        return is_number and not isinstance(value, bool) and bool(abs(value) <= largest)  # false for NaN
    return isinstance(value, origin or hint)


def in_words(hint: Any) -> str:
    """Return the type of a hint in words, such as "a whole number or None"."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        return " or ".join(map(in_words, arguments))
    if origin is Annotated:
        return " ".join([in_words(arguments[0]), *(each.text for each in arguments[1:] if isinstance(each, Bound))])
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin in (Sequence, tuple, list):
        entries = in_words(arguments[0]).removeprefix("a ").removeprefix("an ")
        return f"a list of {entries.replace('number', 'numbers').replace('text', 'names')}"
    if origin is not None:
        return "a function" if origin is Callable else "an object"
    return _WORDS.get(hint) or f"{'an' if hint.__name__[0] in 'AEIOU' else 'a'} {hint.__name__}"


def check_type(
    name: str,
    value: Any,
    hint: Any,
    largest: float = sys.float_info.max,
    *,
    error: type[PosExtError] = InvalidParameterError,
    blank: bool = False,
) -> None:
    """Check that a value [`fits`] the type of its hint. If `blank`, blanks count as text.

    Raises:
        InvalidParameterError: the value has another type, or is out of bounds. `error` replaces this type.
    """
    is_blank = isinstance(value, str) and not value.strip() and hint is not Any
    if not fits(value, hint, largest) or (is_blank and not blank):
        advice = f" Pass at most {largest:g}." if fits(value, hint, math.inf) and not is_blank else ""
        raise error(f"Expected {name} to be {in_words(hint)}, got {short(repr(value))}.{advice}")


def check_fields(record: Any) -> None:
    """Check the fields of a dataclass of a plan, and of dataclasses in them, against their types.

    Raises:
        PlanError: names the field.
    """
    for name, hint in _hints(type(record)).items():
        value = getattr(record, name)
        check_type(f"{type(record).__name__}.{name}", value, hint, MAX_NUMBER, error=PlanError, blank=True)
        for entry in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(entry):
                check_fields(entry)


def plain(value: Any) -> Any:
    """Convert numbers and arrays of NumPy, also in a list or tuple, to Python's own types."""
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value.tolist() if type(value).__module__ == "numpy" else value


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
    return tuple(name for name in _hints(cls) if not isinstance(vars(cls).get(name), OptionalKey))


def _hints(cls: type) -> dict[str, Any]:
    """Return the types of the fields of a dataclass, or of the keys of a record."""
    hints = get_type_hints(cls, include_extras=True)
    if issubclass(cls, Record):
        return hints
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]


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
        raise rules.error(f"Expected {where} to be an object of {cls.__name__}, got {short(repr(data))}.")
    hints = _hints(cls)
    if issubclass(cls, Record):
        required = set(required_keys(cls))
    else:
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        required = {
            each.name for each in fields if each.name not in rules.optional or each.default is dataclasses.MISSING
        }
    if not required <= set(data) <= set(hints):
        missing, unknown = sorted(required - set(data)), sorted(set(data) - set(hints))
        raise rules.error(f"{where} lacks {missing} and has unknown {unknown}; {rules.remedy}")
    return cls(**{name: _value(hints[name], value, f"{where}.{name}", rules) for name, value in data.items()})


def _value(hint: Any, value: Any, where: str, rules: Rules) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):  # only `X | None` occurs
        return None if value is None else _value(arguments[0], value, where, rules)
    if origin in (tuple, list):
        if not isinstance(value, list):
            raise rules.error(f"Expected {where} to be a list, got {short(repr(value))}.")
        return origin(_value(arguments[0], entry, f"{where}.{i}", rules) for i, entry in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return decode(hint, value, where, rules)  # type: ignore[arg-type]
    kind = arguments[0] if origin is Annotated else hint
    largest = rules.largest if kind is float else MAX_NUMBER
    check_type(where, value, hint, largest, error=rules.error, blank=True)
    return float(value) if kind is float else value


def short(value: Any) -> str:
    """Return a value as text, truncated to 40 characters."""
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
