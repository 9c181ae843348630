"""Methods, and the registry of their names.

A method consists of hyper-parameters and a pure map from plan to plan. It never sees a model. The first method gets an
empty plan, and each method returns a changed one, so methods compose by applying them in sequence: `"yarn+resonance"`,
or `YaRN(factor=8) + Resonance()`.

Methods of this package are registered in `hf_posext/methods/__init__.py`. Methods of other packages use an entry
point, or the decorator [`register`].
"""

from __future__ import annotations

import builtins
import difflib
import numbers
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import entry_points
from typing import Any, ClassVar, TypeVar

import torch

from ..decode import MAX_NUMBER, MAX_TOKENS, Positive, check_type, plain, short
from ..errors import (
    InvalidParameterError,
    MethodNotApplicableError,
    PlanError,
    RenamedAttribute,
    UnknownMethodError,
    renamed_arguments,
)
from ..plan import ExtensionPlan, RotaryPlan
from ..scheme import KINDS, PositionalScheme


@dataclass(frozen=True)
class Method:
    """A published way of extending a positional scheme.

    Subclasses are frozen dataclasses of hyper-parameters, one file for each paper, whose docstring gives the formula.
    They set the class variables below and implement [`~Method.extend`]. Values are checked against their types, which
    may contain bounds (`Positive`, `Count`, `Bound`); `__post_init__` checks what a type cannot express.

    Args:
        factor (`float`, *optional*): How many times the trained length to read. If `None`, the factor or target length
            passed to `patch_model` is used.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    url: ClassVar[str]
    code: ClassVar[str] = ""
    kinds: ClassVar[tuple[str, ...]]
    needs_factor: ClassVar[bool] = True

    factor: Positive | None = None

    def __init_subclass__(cls) -> None:
        """Check the types of all values before the `__post_init__` of a subclass runs."""
        super().__init_subclass__()
        if "__post_init__" not in vars(cls):
            return
        refine = cls.__post_init__

        def checked(self: Method) -> None:
            Method.__post_init__(self)
            refine(self)

        cls.__post_init__ = checked  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        """
        Raises:
            InvalidParameterError: a hyper-parameter of another type than its hint, or a number that is not finite.
        """
        for entry in fields(self):
            value = plain(getattr(self, entry.name))
            check_type(f"{self.name} {entry.name}", value, _hint(type(self), entry.type), MAX_NUMBER)
            object.__setattr__(self, entry.name, value)

    @classmethod
    def summary(cls) -> str:
        """Return the first line of the docstring, or the title."""
        return ((cls.__doc__ or "").strip() or cls.title).splitlines()[0]

    @classmethod
    def example(cls, scheme: PositionalScheme) -> Method:
        """Return an instance, or a composition with one, that works on the scheme at factor 8.

        Override this if parameters have no defaults, or if the method needs another one before it.
        """
        return cls()

    @property
    def label(self) -> str:
        """Label in tables and plans, which [`as_method`] parses: the name, and all non-default parameters.

        Lists are omitted because of their length: `LongRoPE(long_factor=[...])` is `longrope`. The factor is omitted
        because tables have a column for it. Only a component of a composition states a factor of its own.
        """
        return self._text(hidden="factor")

    def label_under(self, factor: float | None) -> str:
        """Return the label of a component, with its factor if that differs from the composition's."""
        return self.label if self.factor in (None, factor) else self._text()

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
        """Return name and hyper-parameters of each method in the composition, as plain JSON."""
        given = {key: list(value) if isinstance(value, tuple | list) else value for key, value in asdict(self).items()}
        return ({"name": self.name, **given},)

    def applies_to(self, scheme: PositionalScheme) -> str | None:
        """Return the reason why the method cannot extend a scheme; `None` if it can."""
        if scheme.kind not in self.kinds:
            return f"{self.name} extends {' or '.join(self.kinds)} positions; {scheme.model_type} has {scheme.kind}"
        return scheme.obstacle

    @renamed_arguments(original_length="trained_length")
    def plan(
        self,
        scheme: PositionalScheme,
        *,
        factor: float | None = None,
        target_length: int | None = None,
        trained_length: int | None = None,
    ) -> ExtensionPlan:
        """Plan the extension of a scheme, without a model.

        Args:
            scheme (`PositionalScheme`): The scheme of the model.
            factor (`float`, *optional*): Has to equal the factor of the method, if that has one.
            target_length (`int`, *optional*): In tokens, instead of a factor.
            trained_length (`int`, *optional*): Trained length in tokens, overriding that of the scheme.

        Raises:
            MethodNotApplicableError: the method is for another scheme.
            InvalidParameterError: lengths or hyper-parameters are out of bounds or contradict each other.
        """
        reason = self.applies_to(scheme)
        if reason:
            usable = [name for name, cls in methods().items() if scheme.kind in cls.kinds]
            where = "nothing applies" if scheme.obstacle else f"what applies: {', '.join(usable)}"
            raise MethodNotApplicableError(f"{reason}; {where}")
        factor, stated = _number("factor=", factor), _number("factor=", self.factor)
        if None not in (factor, stated) and factor != stated:
            raise InvalidParameterError(
                f"Expected one factor, got {stated:g} in the name and {factor:g} as the argument. Pass one."
            )
        factor = factor if stated is None else stated
        trained, target = self._lengths(scheme, factor, target_length, trained_length)
        start = ExtensionPlan(
            method=self.label,
            parameters=self.parameters(),
            scheme=scheme,
            factor=target / trained if factor is None else factor,
            trained_length=trained,
            target_length=target,
        )
        with torch.device("cpu"):  # even if the process has another default device
            plan = self.extend(start)
        try:
            plan.check()  # before anything of its size is made
        except PlanError as error:
            raise InvalidParameterError(f"{self.label} on {scheme.model_type}: {error}") from error
        return plan

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        """Return the plan with this method applied on top."""
        raise TypeError(f"{type(self).__name__} must implement extend(plan)")

    def __add__(self, other: Method) -> Method:
        return Composition(components=(self, other))

    def _lengths(
        self,
        scheme: PositionalScheme,
        factor: float | None,
        target_length: int | None,
        trained_length: int | None,
    ) -> tuple[int, int]:
        if trained_length is None and scheme.trained_length is None:
            raise InvalidParameterError(
                f"{scheme.model_type}: {scheme.trained_length_source}. Pass trained_length= in tokens."
            )
        known = f"the config of {scheme.model_type} with a trained length of ", scheme.trained_length
        given = ("trained_length=", trained_length)
        trained: int = _number(*(known if trained_length is None else given), whole=True)
        target: int | None = _number("target_length=", target_length, whole=True)
        if factor is None and target is None:
            if self.needs_factor:
                raise InvalidParameterError(f"{self.label} needs factor= or target_length=, e.g. factor=8.")
            factor = 1.0
        if factor is not None:
            if target not in (None, round(trained * factor)):
                raise InvalidParameterError(
                    f"factor {factor:g} means {round(trained * factor)} tokens, and target_length is {target}. Pass "
                    "one of the two."
                )
            target = round(trained * factor)
        assert target is not None
        if target > MAX_TOKENS:
            raise InvalidParameterError(
                f"Expected a target of at most {MAX_TOKENS:,} tokens, got {trained} trained x {factor:g}. "
                "Pass a smaller factor."
            )
        if target < trained:
            raise InvalidParameterError(
                f"target of {target} tokens is below the trained length of {trained}. "
                "Pass factor >= 1, or trained_length= if the model was trained on less."
            )
        shipped = scheme.shipped_length
        scaled = any(rotary.shipped_type != "default" for rotary in scheme.rotaries)
        if self.needs_factor and scaled and trained_length is None and shipped and target < shipped:
            raise InvalidParameterError(
                f"target of {target} tokens ({trained} trained x {target / trained:g}) is below the "
                f"{shipped} that the model ships with by its own scaling, which the plan would replace. "
                f"Pass a target_length above {shipped}, or trained_length={trained} to mean it."
            )
        return trained, target


@dataclass(frozen=True)
class Composition(Method):
    """Several methods, each applied on top of the one before.

    A component keeps its own factor: `NTK(factor=2) + DualChunk(factor=8)` has a base for twice the trained length
    under chunks that read eight times that length. The factor of the plan is the largest of them.
    """

    name: ClassVar[str] = "composition"

    components: tuple[Method, ...] = ()
    parts: ClassVar[Any] = RenamedAttribute("components")

    def __post_init__(self) -> None:
        own = [component.factor for component in self.components if component.factor is not None]
        if own and self.factor is None:
            object.__setattr__(self, "factor", max(own))

    @property
    def needs_factor(self) -> bool:  # type: ignore[override]
        """`True` if a component needs a factor."""
        return any(component.needs_factor for component in self.components)

    @property
    def label(self) -> str:
        return "+".join(component.label_under(self.factor) for component in self.components)

    def parameters(self) -> tuple[Mapping[str, Any], ...]:
        return tuple(entry for component in self.components for entry in component.parameters())

    def applies_to(self, scheme: PositionalScheme) -> str | None:
        return next((reason for each in self.components if (reason := each.applies_to(scheme))), None)

    @renamed_arguments(original_length="trained_length")
    def plan(self, scheme: PositionalScheme, **lengths: Any) -> ExtensionPlan:
        plan = super().plan(scheme, **lengths)
        for label, without in without_each(plan, self.components):
            if _numbers(without) == _numbers(plan):
                raise InvalidParameterError(
                    f"{label} leaves no trace in {self.label}: it changes nothing, or a method after it computes "
                    "the same positions anew. Leave it out, or write it last."
                )
        return plan

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        factor, target = plan.factor, plan.target_length
        for component in self.components:
            own = factor if component.factor is None else component.factor
            length = target if component.factor is None else round(plan.trained_length * own)
            plan = component.extend(replace(plan, factor=own, target_length=length))
        return replace(plan, factor=factor, target_length=target)

    def __add__(self, other: Method) -> Method:
        return Composition(components=(*self.components, other))


Composition.__init__ = renamed_arguments(parts="components")(Composition.__init__)  # type: ignore[method-assign]


def components_of(plan: ExtensionPlan) -> tuple[Method, ...]:
    """Return the methods of a plan; empty if one of them is not installed."""
    known = methods()
    try:
        return tuple(
            known[entry["name"]](**{key: value for key, value in entry.items() if key != "name"})
            for entry in plan.parameters
        )
    except (KeyError, TypeError, InvalidParameterError):  # or a method of another version
        return ()


def without_each(plan: ExtensionPlan, components: Sequence[Method]) -> Iterator[tuple[str, ExtensionPlan]]:
    """Yield the label of each component of a composition, and the plan without that component.

    A component that others depend on, such as the method whose far band fades, is skipped.
    """
    blank = ExtensionPlan("", (), plan.scheme, plan.factor, plan.trained_length, plan.target_length)
    for index, component in enumerate(components):
        others = Composition(factor=plan.factor, components=(*components[:index], *components[index + 1 :]))
        try:
            with torch.device("cpu"):
                without = others.extend(blank)
        except InvalidParameterError:
            continue
        yield component.label_under(plan.factor), without


def _numbers(plan: ExtensionPlan) -> ExtensionPlan:
    """Return a plan without its labels: the method, its parameters, and the words of a config for the frequencies."""
    plan = plan.with_edits(RotaryPlan, *(replace(entry, rope_parameters=None) for entry in plan.rotaries))
    return replace(plan, method="", parameters=())


def _hint(method: type[Method], written: Any) -> Any:
    """Return the type that an annotation means; `Any` where it cannot be resolved.

    The module of a class may be gone (`runpy`) or another one than it was written in (`__main__`), so that names are
    also looked up in the globals of the functions of the class. `typing.get_type_hints` looks in modules only.
    """
    names: dict[str, Any] = {}
    for cls in reversed(method.__mro__):
        names |= vars(sys.modules.get(cls.__module__, builtins))
        for member in vars(cls).values():
            names |= getattr(member, "__globals__", {})
    try:
        return eval(written, names) if isinstance(written, str) else written
    except (NameError, AttributeError):  # imported inside the function that defines the class
        return Any


def _number(source: str, value: Any, *, whole: bool = False) -> Any:
    """Return a length or factor as a plain Python number.

    Raises:
        InvalidParameterError: not a number above 0 and up to `MAX_TOKENS`, or not whole where tokens are counted.
    """
    if value is None:
        return None
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not 0 < value <= MAX_TOKENS or (whole and value != value // 1):
        kind = "a whole number of tokens" if whole else "a number"
        raise InvalidParameterError(
            f"Expected {kind} above 0 and up to {MAX_TOKENS:,}, got {source}{short(repr(value))}."
        )
    return int(value) if whole else float(value)


def hyper_parameters(method: type[Method]) -> tuple[str, ...]:
    """Return the names of a method's hyper-parameters, without `factor`."""
    return tuple(entry.name for entry in fields(method) if entry.name != "factor")


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
    if not (isinstance(method, type) and issubclass(method, Method) and isinstance(name, str)):
        raise InvalidParameterError(f"expected a subclass of Method with a name, got {method!r}")
    missing = [attribute for attribute in ("title", "url", "kinds") if not hasattr(method, attribute)]
    if missing:
        raise InvalidParameterError(f"{method.__name__} lacks {', '.join(missing)}, which every method has")
    taken = _methods.get(name)
    if taken is not None and taken is not method:
        raise InvalidParameterError(f"method {name!r} is registered as {taken.__module__}. Choose another name.")
    if not name or set(name) & set("+,("):
        raise InvalidParameterError(f"method name {name!r} is empty or holds one of '+,('. Choose another name.")
    _methods[name] = method
    return method


@dataclass(frozen=True)
class NoExtension(Method):
    """Leave the model unpatched."""

    name = "none"
    title = "no extension"
    url = ""
    kinds = tuple(KINDS)
    needs_factor = False

    def applies_to(self, scheme: PositionalScheme) -> str | None:
        return None

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        return plan


def methods() -> dict[str, type[Method]]:
    """Return every registered method by name, sorted; loads the entry points of `hf_posext.methods` once."""
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
    """Return the method of a name, in which case, hyphens and underscores do not count.

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
    """Return every method, or those that extend one kind of scheme, sorted by name.

    Args:
        kind (`str`, *optional*): `rotary`, `learned`, `alibi`, `relative`, `sinusoidal` or `none`.
    """
    return [
        MethodInfo(name, cls.title, cls.url, cls.kinds, cls.summary())
        for name, cls in methods().items()
        if kind is None or kind in cls.kinds
    ]
