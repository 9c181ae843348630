"""Changes of a live model that undo takes back to the bit: mixins, the undo log, and the mark of the patch in force.

The log refers to what it changed weakly. A patched model is therefore freed as soon as its last user lets go of it,
although it carries its log. Copies and pickles of a model carry a log of their own, which refers to the copies.
"""

from __future__ import annotations

import copy
import sys
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UndoError, UnsupportedModelError
from ..plan import ExtensionPlan

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


def source_file(cls: type[nn.Module]) -> types.ModuleType:
    """Return the Python module in which the class of a module was written, whoever has subclassed it since.

    FSDP2, `torch.nn.utils.parametrize`, and [`mix`] make classes at run time, which no file defines.
    """
    for written in cls.__mro__:
        file = sys.modules.get(written.__module__)
        defined = "<locals>" in written.__qualname__ or getattr(file, written.__name__, None) is written
        if file is not None and defined and issubclass(written, nn.Module) and not issubclass(written, Mixin):
            return file
    return sys.modules[cls.__module__]


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
            if isinstance(shipped, nn.Parameter):
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
        if not isinstance(old, nn.Parameter):
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

        The name `__class__` swaps the class of an instance for one that [`mix`] made. Bound
        methods on the instance (`_old_forward` of accelerate's hooks) follow the class.
        """
        if name == "__class__":
            self._changes.append(_Change(Weak(owner), name, value._posext_mixins[-1]))
            _swap_class(owner, value)
            return
        old = getattr(owner, name) if _holds(owner, name) else _ABSENT
        self._changes.append(_Change(Weak(owner), name, old, getattr(value, "dtype", None)))
        setattr(owner, name, value)

    def replace(self, module: nn.Module, name: str, tensor: torch.Tensor) -> None:
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

    def changed(self, owner: Any) -> bool:
        """Return whether an attribute of `owner` was changed, other than an entry of this package."""
        return any(change.target() is owner and not change.name.startswith("_posext") for change in self._changes)

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

    def replace(self, module: nn.Module, name: str, tensor: torch.Tensor) -> None:
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


MARK = "_posext_patch"
"""Attribute that marks every transformers model inside a patched one."""


@dataclass(eq=False)
class InForce:
    """State of a plan in force, stored in the mark of a patched model.

    It refers to the model weakly, since the model refers to it.
    """

    root: Weak  # the model that was given to `patch_model`, unwrapped
    plan: ExtensionPlan
    tokenizer: PreTrainedTokenizerBase | None  # the one whose limit was raised
    log: UndoLog = field(default_factory=UndoLog)
    tables: dict[str, nn.Embedding] = field(default_factory=dict)  # by path, those that got other weights
    native_obstacle: str | None = None  # why plain transformers does not open a checkpoint of the model
    lost_tables: bool = False  # loaded without the tables that the patch replaced
    knows_prompts: bool = False  # adapters of prompt learning, in which the model has no part, were told of the plan
    marked: list[Weak] = field(default_factory=list)  # the modules that carry the mark
    active: bool = False
    handle: weakref.ref[Any] | None = None  # the `Patch` that users hold

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"handle": None}


def unwrap(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a PEFT, DDP, FSDP or `torch.compile` wrapper.

    Raises:
        UnsupportedModelError: there is no transformers model inside.
    """
    wrapper: Any = model
    inner = getattr(wrapper, "_orig_mod", None)
    if inner is None and hasattr(wrapper, "get_base_model"):
        inner = wrapper.get_base_model()
    if inner is None and not isinstance(model, PreTrainedModel):
        inner = getattr(wrapper, "module", None)
    if isinstance(inner, nn.Module):
        return unwrap(inner)
    if isinstance(model, PreTrainedModel):
        return model
    embedder = isinstance(model, nn.Sequential) and len(model) and hasattr(model[0], "auto_model")
    raise UnsupportedModelError(
        f"Expected a `PreTrainedModel` (or a PEFT or DDP wrapper of one), got `{type(model).__name__}`."
        f"{' Pass model[0].auto_model.' if embedder else ''}"
    )


def mark_model(model: PreTrainedModel, state: InForce) -> None:
    """Mark every transformers model inside a model as patched."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            state.marked.append(Weak(module))
            setattr(module, MARK, state)
    state.active = True


def unmark(state: InForce) -> None:
    """Remove the mark of an undone patch."""
    for reference in state.marked:
        module = reference()
        if module is not None and vars(module).get(MARK) is state:
            delattr(module, MARK)
    state.active = False


def mark_of(model: nn.Module) -> InForce | None:
    """Return the patch in force on a model, or on a part of it."""
    for module in model.modules():
        state: InForce | None = vars(module).get(MARK)
        if state is not None:
            return state
    return None


def own_configs(model: nn.Module, log: UndoLog) -> None:
    """Give a model and its wrappers their own configs, because models may share a config object.

    Every module that held one gets the same copy. Undo puts the shared ones back, unless the copies were changed by
    others meanwhile; then the model keeps them, so that no setting is lost.
    """
    memo: dict[int, Any] = {}
    holders = [
        (Weak(module), name, config, copy.deepcopy(config, memo))
        for module in model.modules()
        for name, config in vars(module).items()
        if isinstance(config, PreTrainedConfig | GenerationConfig)
    ]
    log.on_undo(_share_again, holders, [copy.deepcopy(_contents(twin)) for *_, twin in holders])
    for holder, name, _, twin in holders:
        setattr(holder(), name, twin)


def _share_again(holders: list[tuple[Weak, str, Any, Any]], at_first: list[dict[str, Any]]) -> None:
    """Restore the original configs, unless a copy was changed."""
    if [_contents(twin) for *_, twin in holders] != at_first:
        return
    for reference, name, former, twin in holders:
        module = reference()
        if module is not None and vars(module).get(name) is twin:
            setattr(module, name, former)


def _contents(config: Any) -> dict[str, Any]:
    return {
        name: _contents(value) if isinstance(value, PreTrainedConfig) else value
        for name, value in vars(config).items()
    }
