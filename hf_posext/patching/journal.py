"""Every change that a patch makes to a live model goes through a journal, so that undo is exact and complete."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_ABSENT = "<absent>"
_CALL = "<call>"


class Journal:
    """Changes to attributes, in order, with what was there before.

    Entries are plain data (owner, name, old value) and not closures, so that a `copy.deepcopy` or a pickle of a
    patched model can be undone on its own.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """`owner.name = value`, remembered. The name `__class__` swaps the class of an instance."""
        held = name in ("__class__", *vars(owner), *getattr(owner, "_buffers", ()), *getattr(owner, "_parameters", ()))
        self._entries.append((owner, name, getattr(owner, name) if held else _ABSENT))
        setattr(owner, name, value)

    def knows(self, owner: Any, name: str) -> bool:
        """Whether `owner.name` was changed."""
        return any(changed is owner and entry == name for changed, entry, _ in self._entries)

    def transfer(self, owner: Any, successor: Any) -> None:
        """Let undo put back the changes to `owner` in the object that took its place."""
        self._entries = [(successor if entry[0] is owner else entry[0], *entry[1:]) for entry in self._entries]

    def before(self, owner: Any, name: str) -> Any:
        """What `owner.name` was before the first change to it."""
        return next(old for changed, entry, old in self._entries if changed is owner and entry == name)

    def on_undo(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Remember a call to make on undo; a bound method or a module's function, so that copies call their own."""
        self._entries.append((function, _CALL, arguments))

    def undo(self) -> None:
        """Put everything back, last change first.

        Tensors go back to the device where the model is now, with the bits and the dtype that they had.
        """
        while self._entries:
            owner, name, old = self._entries.pop()
            if name == _CALL:
                owner(*old)
                continue
            if isinstance(old, str) and old == _ABSENT:
                delattr(owner, name)
                continue
            now = getattr(owner, name)
            if isinstance(old, torch.nn.Parameter):
                old.data = old.data.to(now.device)  # the same object, which an optimizer may hold
            elif isinstance(old, torch.Tensor) and isinstance(now, torch.Tensor):
                old = old.to(now.device)
            setattr(owner, name, old)
