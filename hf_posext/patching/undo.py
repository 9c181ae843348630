"""Undo log: every change of a patch to a live model, so that undo is exact and complete.

The log refers to what it changed weakly. A patched model is therefore freed as soon as its last user lets go of it,
although it carries its log. Copies and pickles of a model carry a log of their own, which refers to the copies.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import UndoError
from .mixin import Mixin, mix, without

_ABSENT = "<absent>"
_CALL = "<call>"


class Weak:
    """Weak reference that is copied and pickled as a reference to the object or its copy."""

    def __init__(self, target: Any) -> None:
        self._reference: Callable[[], Any] = type(None) if target is None else weakref.ref(target)

    def __call__(self) -> Any:
        """Return the object, or `None` if it was freed."""
        return self._reference()

    def __reduce__(self) -> tuple[Any, ...]:
        return Weak, (self(),)


class KeepsShipped(Mixin):
    """Mixin for a module whose tensors were replaced: the shipped ones are cast and moved with it.

    Undo then restores what an unpatched module would have, even where a cast rounds and the next one goes back.
    """

    _posext_shipped: dict[str, torch.Tensor]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> KeepsShipped:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, shipped in self._posext_shipped.items():
            cast = fn(shipped.data)
            if cast.is_meta:  # a model that has lost its weights has none to restore
                continue
            if isinstance(shipped, torch.nn.Parameter):
                shipped.data = cast  # the same object, which an optimizer may hold
            else:
                self._posext_shipped[name] = cast
        return self


@dataclass(frozen=True)
class _Change:
    """One change: `owner.name` was `old`, and became a tensor of a dtype, if any.

    A class swap keeps the mixin that was added, a call its arguments.
    """

    owner: Any
    name: str
    old: Any
    dtype: torch.dtype | None = None

    def target(self) -> Any:
        """Return the object that was changed; `None` once it is gone."""
        return self.owner() if isinstance(self.owner, Weak) else self.owner

    def before(self) -> Any:
        """Return the old value. A module that replaced the owner, such as a merged adapter's copy, holds a copy."""
        return vars(self.target()).get("_posext_shipped", {}).get(self.name, self.old)

    def undo(self) -> None:
        """Restore the old value. Undoing twice does no harm, so that an interrupted undo can be repeated."""
        target = self.target()
        if self.name == _CALL:
            self.owner(*self.old)
        elif target is None:
            return  # whoever replaced the object has also dropped the change
        elif self.name == "__class__":
            _swap_class(target, without(self.old, type(target)))
        elif not _holds(target, self.name):
            return  # somebody removed the attribute meanwhile: hooks of accelerate, for one
        elif isinstance(self.old, str) and self.old == _ABSENT:
            delattr(target, self.name)
        else:
            setattr(target, self.name, self._placed(getattr(target, self.name)))

    def _placed(self, now: Any) -> Any:
        """Return the old value: a tensor on the device of the one that it replaces, and cast where that was cast."""
        old = self.before()
        if not isinstance(old, torch.Tensor) or not isinstance(now, torch.Tensor):
            return old
        moved = old.data.to(now.device, now.dtype if self.dtype not in (None, now.dtype) else old.dtype)
        if not isinstance(old, torch.nn.Parameter):
            return moved
        old.data = moved
        return old


class UndoLog:
    """Attribute changes in order, with the old values.

    Changes are plain data (owner, name, old value) and not closures, so that a `copy.deepcopy` or a pickle of a
    patched model can be undone on its own.
    """

    def __init__(self) -> None:
        self._changes: list[_Change] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set `owner.name` to a value and remember what it was.

        The name `__class__` swaps the class of an instance for one that [`~hf_posext.patching.mixin.mix`] made. Bound
        methods on the instance (`_old_forward` of accelerate's hooks) follow the class.
        """
        if name == "__class__":
            self._changes.append(_Change(Weak(owner), name, value._posext_mixins[-1]))
            _swap_class(owner, value)
            return
        old = getattr(owner, name) if _holds(owner, name) else _ABSENT
        self._changes.append(_Change(Weak(owner), name, old, getattr(value, "dtype", None)))
        setattr(owner, name, value)

    def replace(self, module: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
        """Set a weight or buffer of a module. The shipped one is cast with the module until undo."""
        if not isinstance(module, KeepsShipped):
            self.set(module, "_posext_shipped", {})
            self.set(module, "__class__", mix(KeepsShipped, type(module)))
        shipped: dict[str, torch.Tensor] = vars(module)["_posext_shipped"]
        shipped.setdefault(name, getattr(module, name))
        self.set(module, name, tensor)

    def knows(self, owner: Any, name: str) -> bool:
        """Return whether `owner.name` was changed."""
        return any(change.target() is owner and change.name == name for change in self._changes)

    def transfer(self, owner: Any, successor: Any) -> None:
        """Move the changes of `owner` to the object that replaced it."""
        self._changes = [
            replace(change, owner=Weak(successor)) if change.target() is owner else change for change in self._changes
        ]

    def before(self, owner: Any, name: str) -> Any:
        """Return the value of `owner.name` before the first change to it."""
        changes = (change for change in self._changes if change.target() is owner and change.name == name)
        return next(changes).before()

    def on_undo(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Remember a call to make on undo: of a bound method or a module's function, harmless when called twice."""
        self._changes.append(_Change(function, _CALL, arguments))

    def undo(self) -> None:
        """Undo all changes, last one first.

        Tensors go back to the device where the model is now, with the bits and the dtype that they had, or cast if the
        model was cast meanwhile. A change that cannot be put back does not stop the others; it stays in the log, for
        the next call.

        Raises:
            UndoError: if changes could not be undone. The message names the first one.
        """
        failed: list[tuple[_Change, Exception]] = []
        try:
            while self._changes:
                change = self._changes[-1]
                try:
                    change.undo()
                except Exception as error:
                    failed.append((change, error))
                # only now: an interrupt before this line leaves the change in the log
                self._changes.pop()
        finally:
            self._changes += [change for change, _ in reversed(failed)]
        if failed:
            change, cause = failed[0]
            where = f"{type(change.target()).__name__}.{change.name}"
            raise UndoError(
                f"{len(failed)} changes could not be undone, the first at {where} ({type(cause).__name__}: {cause}); "
                "everything else is as before. Remove the cause, then call undo() again."
            ) from cause


class LastingLog(UndoLog):
    """Log of changes that stay, so that the tensors that they replace are dropped."""

    def replace(self, module: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
        setattr(module, name, tensor)


def _holds(owner: Any, name: str) -> bool:
    places = (vars(owner), getattr(owner, "_buffers", ()), getattr(owner, "_parameters", ()))
    return any(name in place for place in places)


def _swap_class(owner: Any, cls: type) -> None:
    """Change the class of an instance, and that of its methods which were stored on the instance."""
    families = (type(owner).__mro__, cls.__mro__)
    known = [vars(member) for family in families for member in family]
    owner.__class__ = cls
    for name, value in list(vars(owner).items()):
        if not isinstance(value, types.MethodType) or value.__self__ is not owner:
            continue
        function = value.__func__
        if any(members.get(function.__name__) is function for members in known):
            vars(owner)[name] = types.MethodType(getattr(cls, function.__name__), owner)
