"""Where the tokens of a forward are, and what all layers make of that alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Positions:
    """Where the tokens of one forward are, as one rotary module was asked.

    Args:
        name (`str`): the set of frequencies.
        given (`torch.Tensor` of shape `(batch or 1, tokens)`, or with leading axes in multimodal models): as asked.
        keys (`torch.Tensor` of shape `(batch or 1, keys)`): of all keys, those in the cache first.
        aligned (`bool`): the positions of all keys are their indices.
        regular (`bool`): in each row they count up by one, but for padding before its first key.
        task (`int`): the backward pass in which this was asked; -1 outside.
        slot (`torch.Tensor`, *optional*): in a compiled step with a static cache, where its key is. Keys are all slots
            then; those that are free come after it, and are masked.
    """

    name: str
    given: torch.Tensor
    keys: torch.Tensor
    aligned: bool
    regular: bool
    task: int
    slot: torch.Tensor | None = None
    memo: dict[Any, Any] = field(default_factory=dict, compare=False)

    @property
    def queries(self) -> torch.Tensor:
        """Positions (batch or 1, tokens); those on the first axis in multimodal models."""
        return self.given if self.given.ndim == 2 else self.given[0]

    def once(self, what: Any, make: Callable[[], T]) -> T:
        """What all layers of a forward need alike."""
        found: T | None = self.memo.get(what)
        if found is None:
            found = self.memo[what] = make()
        return found
