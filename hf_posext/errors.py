"""Exceptions of this package, all subclasses of [`PosExtError`], and warnings about former names.

Each message states the expected value, the actual value, and what to do next. Former names of public things work for
one release and warn. They are removed in the next, together with their line here; CONTRIBUTING.md states the policy.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar


class PosExtError(Exception):
    """Base class of every error raised by `hf_posext`."""


class MissingExtraError(PosExtError, ImportError):
    """An optional package that is not installed. The message contains the install command."""


class InvalidParameterError(PosExtError, ValueError):
    """A factor, length, or option that is out of bounds."""


class UnknownMethodError(PosExtError, ValueError):
    """A method name that is not registered."""


class MethodNotApplicableError(PosExtError, ValueError):
    """A method that does not support the model's positional scheme."""


class UnsupportedModelError(PosExtError):
    """A model that cannot be patched or measured. The message contains the reason."""


class AlreadyPatchedError(PosExtError):
    """A model that is already patched. Undo the patch first."""


class NotPatchedError(PosExtError):
    """A model that is not patched."""


class NoEffectError(PosExtError):
    """A patch that would not change the model's positions."""


class UndoError(PosExtError):
    """A change that could not be undone. It stays in the undo log, and all other changes were undone."""


class PlanError(PosExtError, ValueError):
    """A plan that is corrupt, out of bounds, or written with a newer schema."""


class PlanMismatchError(PosExtError):
    """A plan made for a model with a different positional scheme."""


class CheckpointError(PosExtError, ValueError):
    """A checkpoint or adapter directory that is incomplete, corrupt, or malicious. None of its code was executed."""


class ExportError(PosExtError):
    """Positions that a server or plain transformers cannot compute. The message names an alternative."""


class DocumentError(PosExtError, ValueError):
    """Documents that cannot be evaluated: none, without the text column, or too short."""


class EvaluationError(PosExtError):
    """A measurement that cannot be trusted: non-finite logits, or two ways of measuring that disagree."""


class NonFiniteError(EvaluationError):
    """Non-finite logits in one document. Other documents can still be measured."""


class OutOfMemoryError(EvaluationError):
    """A text that does not fit in memory, even in the smallest chunks. Shorter texts may fit."""


class JournalError(PosExtError):
    """A journal that belongs to another run, is corrupt, or cannot be written because the disk is full."""


class TrainingError(PosExtError):
    """Training that cannot continue, because of a non-finite loss or a mismatch with the run to resume."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error, with the next one if it is a heading; its type if the message is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


P = ParamSpec("P")
R = TypeVar("R")


def renamed_arguments(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function whose keyword arguments have new names: `@renamed_arguments(former="new")`.

    The former names are not in the signature, so that type checkers and documentation show the new ones only. Calls
    with both names of an argument raise `InvalidParameterError`.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for former, name in names.items():
                value = kwargs.pop(former, None)
                if value is None:
                    continue
                if kwargs.get(name) is not None:
                    raise InvalidParameterError(f"{name} and {former} are the same. Pass {name} only.")
                warn_of_former(former, name, f"pass {name}={value!r}")
                kwargs[name] = value
            return function(*args, **kwargs)

        return call

    return decorate


class RenamedAttribute:
    """Attribute of a class by its former name. Reading it warns and returns the attribute of the new `name`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __set_name__(self, owner: type, former: str) -> None:
        self.former = former

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        warn_of_former(self.former, self.name, f"read {self.name}")
        return getattr(instance, self.name)


def renamed_names(module: str, **names: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module whose classes or functions have new names, each given by its former one."""

    def look_up(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_of_former(name, names[name], f"import {names[name]}")
        return getattr(sys.modules[module], names[name])

    return look_up


def warn_of_former(former: str, name: str, remedy: str) -> None:
    """Warn that somebody used a former name."""
    warnings.warn(f"{former} is now called {name}; {remedy}", DeprecationWarning, stacklevel=3)
