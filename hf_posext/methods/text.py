"""Methods from text, `"yarn"` or `"rerope(window=384)+log-n"`, and the reasons of those that do not apply."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..decode import plain, short
from ..errors import InvalidParameterError
from .base import Composition, Method, get_method, hyper_parameters


def as_method(method: str | Method, **hyper_parameters: Any) -> Method:
    """Return a method object from its name, or the object itself.

    A name may have hyper-parameters in brackets, and `+` composes several methods: `"yarn"`, `"yarn+resonance"`,
    `"rerope(window=384)"`, `"yarn(beta_fast=16, variant='paper')+log-n"`. Values are Python literals. Case does not
    count.

    Args:
        method (`str` or `Method`): a name, or an object.
        hyper_parameters: of the method, if `method` is one name: `as_method("yarn", beta_fast=16)`.

    Raises:
        UnknownMethodError: no such name.
        InvalidParameterError: neither a name nor a method object, or an unknown or refused hyper-parameter.
    """
    if isinstance(method, Method):
        if hyper_parameters:
            raise InvalidParameterError(
                f"a method object has its hyper-parameters already, got {', '.join(hyper_parameters)}. "
                f"Pass them to {type(method).__name__}(...)."
            )
        return method
    if not isinstance(method, str):
        raise InvalidParameterError(
            f"method is {method!r}. Pass a name such as 'yarn' or an object such as YaRN(factor=8)."
        )
    texts = split_outside_brackets(method, "+")
    if hyper_parameters and len(texts) > 1:
        raise InvalidParameterError(
            f"{method!r} composes {len(texts)} methods, got {', '.join(hyper_parameters)}. Write hyper-parameters in "
            f"brackets behind the name of theirs, as in {texts[0].partition('(')[0]}(...)+{texts[1]}."
        )
    components = tuple(_from_text(text, hyper_parameters) for text in texts)
    return components[0] if len(components) == 1 else Composition(components=components)


def split_outside_brackets(text: str, separator: str) -> list[str]:
    """Split a text at a one-character separator outside of brackets, and strip the pieces."""
    pieces, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == separator and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece.strip() for piece in pieces]


def _from_text(text: str, more: Mapping[str, Any]) -> Method:
    """Return a method from its name, the values in brackets, and further hyper-parameters."""
    name, bracket, _ = text.partition("(")
    cls = get_method(name.strip())
    given = _literals(text, cls) if bracket else {}
    for key in sorted(given.keys() & more.keys()):
        first, second = (
            tuple(value) if isinstance(value, list) else value for value in map(plain, (given[key], more[key]))
        )
        if (first == second) is not True:  # tensors compare to tensors
            raise InvalidParameterError(
                f"Expected one {key}, got {short(first)} in the name and {short(second)} as the argument. Pass one."
            )
    known = ("factor", *hyper_parameters(cls))
    for key in (given := {**given, **more}):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            guess = f"did you mean {near[0]!r}? " if near else ""
            raise InvalidParameterError(f"{cls.name} has no parameter {key!r}; {guess}there are: {', '.join(known)}")
    return cls(**given)


def _literals(text: str, cls: type[Method]) -> dict[str, Any]:
    """Parse the parameters in brackets after a name."""
    defaults = {entry.name: entry.default for entry in fields(cls) if entry.default is not None}
    example = next((f"{cls.name}({name}={value!r})" for name, value in defaults.items()), f"{cls.name}(factor=8)")
    try:
        call = ast.parse(f"method{text[text.index('(') :]}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("not a call with named parameters")
        given = {entry.arg: ast.literal_eval(entry.value) for entry in call.keywords if entry.arg}
        if len(given) < len(call.keywords):
            raise ValueError("a parameter twice, or **")
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise InvalidParameterError(
            f"cannot read the parameters of {text!r}. Pass names and plain values, as in {example!r}."
        ) from error
    return given


def by_reason(refusals: Mapping[str, str | None]) -> dict[str, list[str]]:
    """Group the names of methods by the reason of each, `None` for one that applies.

    Returns:
        `dict[str, list[str]]`: a reason that begins with the name of its method is stated without it, and methods that
        apply are under `""`.
    """
    groups: dict[str, list[str]] = {"": []}
    for label, reason in refusals.items():
        first, _, rest = (reason or "").partition(" ")
        groups.setdefault(rest if first in label else str(reason), []).append(label)
    return {reason: names for reason, names in groups.items() if names}
