"""Where the tokens of a forward are, what all layers make of that alike, and where keys stand that stay turned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ...plan import Part, PositionMap
from ..kernels import belongs, mapped

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
        turned (`bool`): the model itself turns the query and the key of a single token, to where keys see the nearest
            pairs, as those in the cache stand.
    """

    name: str
    given: torch.Tensor
    keys: torch.Tensor
    aligned: bool
    regular: bool
    task: int
    slot: torch.Tensor | None = None
    turned: bool = False
    memo: dict[Any, Any] = field(default_factory=dict, compare=False)

    @property
    def queries(self) -> torch.Tensor:
        """Positions (batch or 1, tokens); those on the first axis in multimodal models."""
        return self.given if self.given.ndim == 2 else self.given[0]

    def lengths(self, of: torch.Tensor) -> torch.Tensor:
        """Lengths (batch or 1, tokens or 1) of the documents in which some queries or keys (..., tokens) are."""
        lengths = document_lengths(self.queries).to(of.device)
        # keys from a cache are of the document that goes on
        return lengths if of.shape[-1] == lengths.shape[-1] else lengths[:, -1:]

    def once(self, what: Any, make: Callable[[], T]) -> T:
        """What all layers of a forward need alike."""
        found: T | None = self.memo.get(what)
        if found is None:
            found = self.memo[what] = make()
        return found


def border(parts: tuple[Part, ...]) -> int | None:
    """The one distance at which a key is turned anew as tokens follow; 0 where none is, `None` where several are."""
    if len({part.key for part in parts}) <= 1:
        return 0
    if any(part.chunk > 1 or part.keys_below is not None for part in parts):
        return None
    found = {part.high for part in parts if part.high is not None} | {part.low for part in parts if part.low > 0}
    return found.pop() if len(found) == 1 else None


def stand(parts: tuple[Part, ...], newest: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """What keys at positions (rows, keys) are turned to for a query at `newest` (rows, 1); the same shape as keys."""
    if len({part.key for part in parts}) <= 1:
        return mapped(keys, parts[0].key) if parts else keys
    wanted = mapped(keys, parts[0].key)
    for part in parts[1:]:
        wanted = torch.where(belongs(part, newest, keys)[:, 0], mapped(keys, part.key), wanted)
    return wanted


def key_map(parts: tuple[Part, ...], distance: int) -> PositionMap:
    """What a key at a distance from the newest token is turned to, where parts are windows or all turn keys alike."""
    inside = (part for part in parts if part.low <= distance and (part.high is None or distance < part.high))
    return next(inside, parts[0]).key if parts else PositionMap()


def document_lengths(positions: torch.Tensor) -> torch.Tensor:
    """For each token, the length of the document it is in: its highest position + 1. Several documents may be packed
    into a row; one ends where positions fall."""
    document = (positions.diff(prepend=positions[:, :1]) < 0).cumsum(-1)
    highest = torch.zeros_like(positions).scatter_reduce(-1, document, positions, "amax")
    return highest.gather(-1, document) + 1
