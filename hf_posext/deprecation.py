"""Former names of public things, which work for one release and warn. CONTRIBUTING.md states the policy.

A former name is removed in the release after the one that deprecates it, together with its line here.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from .errors import InvalidParameterError

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
