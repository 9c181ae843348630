"""Another attention implementation for a model: registered while somebody uses it, switched to through an undo log."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from .detect import text_config
from .ownership import own_configs
from .undo import UndoLog

_lock = threading.RLock()  # the collector may end a use within another
_users: Counter[str] = Counter()
"""Users of each name. The last one to end removes it from transformers' registries."""


def register_attention(name: str, function: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Register an attention function and its mask function with transformers."""
    with _lock:
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, mask)
        _users[name] += 1


def forget_attention(name: str) -> None:
    """Remove a name from transformers' registries after its last user."""
    with _lock:
        _users[name] -= 1
        if _users[name] <= 0:
            del _users[name]
            AttentionInterface._global_mapping.pop(name, None)
            AttentionMaskInterface._global_mapping.pop(name, None)


def switch_attention(model: PreTrainedModel, name: str, log: UndoLog) -> None:
    """Make a model and its text part run on a registered attention implementation, until the undo log is undone."""
    for config in {id(config): config for config in (model.config, text_config(model.config))}.values():
        log.set(config, "_attn_implementation_internal", name)


@contextmanager
def switched_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Switch a model to another attention implementation, and restore the previous one on exit."""
    log = UndoLog()
    try:
        own_configs(model, log)  # another model may share them
        switch_attention(model, name, log)
        yield
    finally:
        log.undo()
