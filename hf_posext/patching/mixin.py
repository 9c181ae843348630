"""Changes the behaviour of one module by swapping its class for a subclass, so that copies and pickles carry it."""

from __future__ import annotations

from typing import Any

from torch import nn

_mixed: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


class Mixin(nn.Module):
    """Base of the classes that are mixed into a module's own class by [`mix`]."""

    _posext_mixins: tuple[type[nn.Module], ...] = ()
    _posext_base: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = self.__getstate__()  # type: ignore[no-untyped-call]
        return _instance, (self._posext_mixins, self._posext_base), state


def mix(mixin: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `mixin` and `cls` under the name of `cls`; the same one every time."""
    if (mixin, cls) not in _mixed:
        body = {
            "__module__": cls.__module__,
            "__doc__": cls.__doc__,
            "_posext_mixins": (*getattr(cls, "_posext_mixins", ()), mixin),
            "_posext_base": getattr(cls, "_posext_base", cls),
        }
        _mixed[mixin, cls] = type(cls.__name__, (mixin, cls), body)
    return _mixed[mixin, cls]


def _instance(mixins: tuple[type[nn.Module], ...], base: type[nn.Module]) -> nn.Module:
    """What pickle and deepcopy start from: an empty instance of the mixed class."""
    cls = base
    for mixin in mixins:
        cls = mix(mixin, cls)
    return cls.__new__(cls)
