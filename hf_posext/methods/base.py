"""What a method is: hyper-parameters and a pure map from plan to plan.

A method never sees a model. It gets a plan (at first an empty one, which leaves the scheme as it is) and returns the
plan changed, so that methods compose by applying one after the other: `"yarn+resonance"`, or
`YaRN(factor=8) + Resonance()`. Hyper-parameters can be written into the name: `"rerope(window=384)+log-n"`.
"""

from __future__ import annotations

import ast
import difflib
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

import torch

from ..decode import MAX_NUMBER
from ..errors import InvalidParameterError, MethodNotApplicableError
from ..plan import ExtensionPlan
from ..registry import get_method, methods
from ..scheme import PositionalScheme


@dataclass(frozen=True)
class Method:
    """A published way of extending a positional scheme.

    Subclasses are frozen dataclasses of hyper-parameters, one file each, whose docstring gives the formula and the
    paper. They set the class variables below and implement [`~Method.extend`].

    Args:
        factor (`float`, *optional*): how many times the trained length to read. Where it is `None`, the factor or
            target length given to `patch_model` counts.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    url: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]
    needs_factor: ClassVar[bool] = True

    factor: float | None = None

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0]

    @classmethod
    def example(cls, scheme: PositionalScheme) -> Method:
        """An instance, or a composition with one, that works on the scheme at factor 8, for tests and documentation.

        To be overridden by a method whose parameters have no defaults, or that needs another before it.
        """
        return cls()

    @property
    def label(self) -> str:
        """What tables and plans call the method, and [`as_method`] reads: its name, and what is not as by default.

        Lists are left out, since they fill pages: `LongRoPE(long_factor=[...])` is `longrope`. So is the factor, which
        tables have a column for; only in a composition a part tells its own where it is not the plan's.
        """
        return self._text(hidden="factor")

    def _text(self, hidden: str = "") -> str:
        given = [
            f"{entry.name}={value!r}"
            for entry in fields(self)
            if (value := getattr(self, entry.name)) != entry.default
            and entry.name != hidden
            and isinstance(value, str | int | float)
        ]
        return f"{self.name}({', '.join(given)})" if given else self.name

    def parameters(self) -> tuple[Mapping[str, Any], ...]:
        """Name and hyper-parameters of each method in the composition, as plain JSON."""
        given = {key: list(value) if isinstance(value, tuple | list) else value for key, value in asdict(self).items()}
        return ({"name": self.name, **given},)

    def applies_to(self, scheme: PositionalScheme) -> str | None:
        """`None` where the method can extend the scheme, else the reason why it cannot."""
        if scheme.kind not in self.kinds:
            return f"{self.name} extends {' or '.join(self.kinds)} positions; {scheme.model_type} has {scheme.kind}"
        return scheme.obstacle

    def plan(
        self,
        scheme: PositionalScheme,
        *,
        factor: float | None = None,
        target_length: int | None = None,
        original_length: int | None = None,
    ) -> ExtensionPlan:
        """Plan the extension of a scheme; pure, touches no model.

        Args:
            scheme (`PositionalScheme`): what the model has.
            factor (`float`, *optional*): used where the method has no factor of its own.
            target_length (`int`, *optional*): in tokens, instead of a factor.
            original_length (`int`, *optional*): trained length in tokens, overriding what the scheme says.

        Raises:
            MethodNotApplicableError: the method is for another scheme.
            InvalidParameterError: lengths or hyper-parameters that cannot be.
        """
        reason = self.applies_to(scheme)
        if reason:
            usable = [name for name, cls in methods().items() if scheme.kind in cls.kinds]
            where = "nothing applies" if scheme.obstacle else f"what applies: {', '.join(usable)}"
            raise MethodNotApplicableError(f"{reason}; {where}")
        own_factor = self.factor if self.factor is not None else factor if target_length is None else None
        original, target = self._lengths(scheme, own_factor, target_length, original_length)
        start = ExtensionPlan(
            method=self.label,
            parameters=self.parameters(),
            scheme=scheme,
            factor=target / original if own_factor is None else float(own_factor),
            original_length=original,
            target_length=target,
        )
        with torch.device("cpu"):  # whatever the default device of the process is
            return self.extend(start)

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        """The plan with this method applied on top."""
        raise TypeError(f"{type(self).__name__} must implement extend(plan)")

    def __add__(self, other: Method) -> Method:
        return Composition(parts=(self, other))

    def _lengths(
        self,
        scheme: PositionalScheme,
        factor: float | None,
        target_length: int | None,
        original_length: int | None,
    ) -> tuple[int, int]:
        original = original_length if original_length is not None else scheme.trained_length
        if original is None:
            raise InvalidParameterError(
                f"{scheme.model_type}: {scheme.trained_length_source}; give original_length= in tokens"
            )
        if original < 1:
            raise InvalidParameterError(f"original_length is {original}; give a number of tokens, 1 or more")
        if factor is None and target_length is None:
            if self.needs_factor:
                raise InvalidParameterError(f"{self.label} needs factor= or target_length=; e.g. factor=8")
            factor = 1.0
        if factor is not None:
            if not math.isfinite(factor) or factor <= 0 or original * factor > MAX_NUMBER:
                raise InvalidParameterError(f"factor is {factor}; give a finite number above 0, e.g. factor=8")
            if target_length is not None and target_length != round(original * factor):
                raise InvalidParameterError(
                    f"factor {factor:g} means {round(original * factor)} tokens, but target_length is "
                    f"{target_length}; give one of the two"
                )
            target_length = round(original * factor)
        assert target_length is not None
        if target_length < original:
            raise InvalidParameterError(
                f"target of {target_length} tokens is below the trained length of {original}; "
                "give factor >= 1, or original_length= if the model was trained on less"
            )
        shipped = scheme.shipped_length
        scaled = any(rotary.shipped_type != "default" for rotary in scheme.rotaries)
        if self.needs_factor and scaled and original_length is None and shipped and target_length < shipped:
            raise InvalidParameterError(
                f"target of {target_length} tokens ({original} trained x {target_length / original:g}) is below the "
                f"{shipped} that the model ships with by its own scaling, which the plan would replace; "
                f"give a target_length above {shipped}, or original_length={original} to mean it"
            )
        return original, target_length


@dataclass(frozen=True)
class Composition(Method):
    """Several methods, each applied on top of the one before.

    A part keeps its own factor where it has one (`NTK(factor=2) + DualChunk(factor=8)`: a base for twice the length
    under chunks that read eight times it); the plan's is the largest of them.
    """

    parts: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        own = [part.factor for part in self.parts if part.factor is not None]
        if own and self.factor is None:
            object.__setattr__(self, "factor", max(own))

    @property
    def label(self) -> str:
        return "+".join(part.label if part.factor in (None, self.factor) else part._text() for part in self.parts)

    def parameters(self) -> tuple[Mapping[str, Any], ...]:
        return tuple(entry for part in self.parts for entry in part.parameters())

    def applies_to(self, scheme: PositionalScheme) -> str | None:
        return next((reason for part in self.parts if (reason := part.applies_to(scheme))), None)

    def plan(self, scheme: PositionalScheme, **lengths: Any) -> ExtensionPlan:
        needy = [part for part in self.parts if part.needs_factor]
        return super().plan(scheme, **lengths) if needy else super().plan(scheme, **{"factor": 1.0, **lengths})

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        factor, target = plan.factor, plan.target_length
        for part in self.parts:
            own = factor if part.factor is None else part.factor
            length = target if part.factor is None else round(plan.original_length * own)
            plan = part.extend(replace(plan, factor=own, target_length=length))
        return replace(plan, factor=factor, target_length=target)

    def __add__(self, other: Method) -> Method:
        return Composition(parts=(*self.parts, other))


def as_method(method: str | Method) -> Method:
    """A method object from its name, or the object itself.

    A name may have hyper-parameters in brackets, and several are composed by `+`: `"yarn"`, `"yarn+resonance"`,
    `"rerope(window=384)"`, `"yarn(beta_fast=16, variant='paper')+log-n"`. Values are Python literals.

    Raises:
        UnknownMethodError: no such name.
        InvalidParameterError: neither a name nor a method object, or a hyper-parameter that the method does not have
            or whose value cannot be.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise InvalidParameterError(
            f"method is {method!r}; give a name such as 'yarn' or an object such as YaRN(factor=8)"
        )
    parts = tuple(_from_text(text) for text in split_outside_brackets(method, "+"))
    return parts[0] if len(parts) == 1 else Composition(parts=parts)


def split_outside_brackets(text: str, separator: str) -> list[str]:
    """The pieces of a text between separators that stand in no bracket, stripped.

    Args:
        text (`str`): as in `"none, yarn(beta_fast=16, beta_slow=2)"`.
        separator (`str`): one character.
    """
    pieces, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == separator and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece.strip() for piece in pieces]


def _from_text(text: str) -> Method:
    name, bracket, _ = text.partition("(")
    cls = get_method(name.strip())
    if not bracket:
        return cls()
    example = f"{cls.name}({next(iter(hyper_parameters(cls)), 'factor')}=...)"
    try:
        call = ast.parse(f"method{text[len(name) :]}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("not a call with named parameters")
        given = {entry.arg: ast.literal_eval(entry.value) for entry in call.keywords if entry.arg}
        if len(given) < len(call.keywords):
            raise ValueError("a parameter twice, or **")
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise InvalidParameterError(
            f"cannot read the parameters of {text!r}; give names and plain values, as in {example!r}"
        ) from error
    hints = get_type_hints(cls)
    known = ("factor", *hyper_parameters(cls))
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            guess = f"did you mean {near[0]!r}? " if near else ""
            raise InvalidParameterError(f"{cls.name} has no parameter {key!r}; {guess}there are: {', '.join(known)}")
        if not _fits(value, hints[key]):
            wanted = hints[key].__name__ if isinstance(hints[key], type) else hints[key]
            raise InvalidParameterError(f"{cls.name} {key} is {value!r}; give a value of type {wanted}")
    return cls(**given)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a literal is of a type such as `float | None` or `Sequence[float]`, whatever the list holds."""
    if get_origin(hint) in (types.UnionType, Union):
        return any(_fits(value, option) for option in get_args(hint))
    wanted = get_origin(hint) or hint
    if isinstance(value, bool) or wanted is bool:
        return isinstance(value, bool) and wanted is bool
    if isinstance(value, str) and wanted is Sequence:
        return False
    return isinstance(value, (int, float) if wanted is float else wanted)


def hyper_parameters(method: type[Method]) -> tuple[str, ...]:
    """The names of a method's hyper-parameters, without `factor`."""
    return tuple(entry.name for entry in fields(method) if entry.name != "factor")
