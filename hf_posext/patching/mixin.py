"""Mixins that change one object by swapping its class for a subclass. Copies and pickles keep the change."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from torch import nn

_mixed: dict[tuple[type, type], type] = {}


class Carried:
    """Base of the classes that [`mix`] adds to the class of an object."""

    _posext_mixins: tuple[type, ...] = ()
    _posext_base: type

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make an instance without mixins: what code constructs from the class of a patched object has no patch."""
        self.__class__ = self._posext_base
        self.__init__(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _instance, (self._posext_mixins, self._posext_base), self.__getstate__()


class Mixin(Carried, nn.Module):
    """Base of the mixins for modules."""


def mix(mixin: type, cls: type) -> type:
    """Return the subclass of `mixin` and `cls`, named like `cls`. Repeated calls return the same class."""
    if (mixin, cls) not in _mixed:
        body = {
            "__module__": cls.__module__,
            "__doc__": cls.__doc__,
            "__init__": Carried.__init__,  # not one that the dataclasses of configs would make
            "_posext_mixins": (*getattr(cls, "_posext_mixins", ()), mixin),
            "_posext_base": getattr(cls, "_posext_base", cls),
        }
        _mixed.setdefault((mixin, cls), type(cls.__name__, (mixin, cls), body))
    return _mixed[mixin, cls]


def without(mixin: type, cls: type) -> type:
    """The class that an object would have if a mixin had never been mixed in, whoever has subclassed it since.

    FSDP2 and `torch.nn.utils.parametrize` make a subclass for one object, as [`mix`] does. Such a class is made anew
    above the class that is left.
    """
    if not issubclass(cls, mixin):
        return cls
    if "_posext_mixins" in vars(cls):
        last, rest = cls.__bases__
        return rest if last is mixin else mix(last, without(mixin, rest))
    body = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    remade: type = type(cls)(cls.__name__, tuple(without(mixin, base) for base in cls.__bases__), body)  # type: ignore[misc]
    return remade


def plain_class(thing: object) -> type:
    """Return the class of an object without the mixins that [`mix`] added."""
    cls: type = getattr(type(thing), "_posext_base", type(thing))
    return cls


def _instance(mixins: tuple[type, ...], base: type) -> Any:
    """Return an empty instance of the mixed class, which pickle and deepcopy fill."""
    cls = base
    for mixin in mixins:
        cls = mix(mixin, cls)
    return object.__new__(cls)


def source_file(cls: type[nn.Module]) -> ModuleType:
    """Return the Python module in which the class of a module was written, whoever has subclassed it since.

    FSDP2, `torch.nn.utils.parametrize`, and [`mix`] make classes at run time, which no file defines.
    """
    for written in cls.__mro__:
        file = sys.modules.get(written.__module__)
        defined = "<locals>" in written.__qualname__ or getattr(file, written.__name__, None) is written
        if file is not None and defined and issubclass(written, nn.Module) and not issubclass(written, Mixin):
            return file
    return sys.modules[cls.__module__]
