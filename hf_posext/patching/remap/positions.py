"""Positions of the tokens of one forward: what rotary modules were asked for, counted from the first token that is not
padding, and how the positions of the keys are ordered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..detect import RotarySite

if TYPE_CHECKING:
    from .forward import ForwardState

T = TypeVar("T")


@dataclass(frozen=True)
class Positions:
    """Positions of the tokens and keys of one forward, as one rotary module was asked for them.

    Multimodal models have several positions for a token: time, height and width. All of them reach the phases. The
    first tells which band a pair is in.

    Args:
        state (`ForwardState`): of the forward.
        site (`RotarySite`): the rotary module that was asked, and its set of frequencies.
        query_axes (`torch.Tensor` of shape `(batch or 1, tokens)` or `(axes, batch or 1, tokens)`): of the tokens.
        key_axes (`torch.Tensor` of shape `(batch or 1, keys)` or `(axes, batch or 1, keys)`): of all keys, those in
            the cache first.
        aligned (`bool`): the positions of all keys are their indices.
        regular (`bool`): in each row they count up by one, except for padding before its first key.
        task (`int`): the backward pass in which the module was asked; -1 outside of one.
        axes (`int`, *optional*): how many axes the rotary module takes. Positions that are alike on all of them, those
            of text, are kept once.
        counted (`torch.Tensor` of shape `(batch, tokens)`, *optional*): False for tokens that are padding.
        slot (`torch.Tensor`, *optional*): in a compiled step with a static cache, the slot of the new key. Keys are
            all slots then. Free slots have later positions, and are masked.
        rotated (`bool`): the model itself rotates the query and the key of a single token, as keys see the nearest
            pairs. The keys in the cache are rotated so, too.
    """

    state: ForwardState
    site: RotarySite
    query_axes: torch.Tensor
    key_axes: torch.Tensor
    aligned: bool
    regular: bool
    task: int
    axes: int | None = None
    counted: torch.Tensor | None = None
    slot: torch.Tensor | None = None
    rotated: bool = False
    memo: dict[Any, Any] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        """The set of frequencies."""
        return self.site.name

    @property
    def queries(self) -> torch.Tensor:
        """Positions of the tokens (batch or 1, tokens), on the first axis."""
        return first_axis(self.query_axes)

    @property
    def keys(self) -> torch.Tensor:
        """Positions of the keys (batch or 1, keys), on the first axis."""
        return first_axis(self.key_axes)

    def lengths(self, of: torch.Tensor) -> torch.Tensor:
        """Return the lengths (batch or 1, tokens or 1) of the documents in which queries or keys (..., tokens) are."""
        lengths = self.once("lengths", lambda: document_lengths(self.queries, self.counted))
        if of.shape[-1] != lengths.shape[-1]:  # keys from a cache are of the document that goes on
            lengths = self.once("last length", lambda: last_lengths(lengths, self.counted))
        return lengths.to(of.device)

    def once(self, what: Any, make: Callable[[], T]) -> T:
        """Return what all layers of a forward need alike, made at the first call."""
        known: T | None = self.memo.get(what)
        if known is None:
            known = self.memo[what] = make()
        return known


def on_axes(positions: torch.Tensor, axes: int | None) -> torch.Tensor:
    """Return positions as a rotary module takes them, on as many axes."""
    return positions if axes is None or positions.ndim == 3 else positions.expand(axes, -1, -1)


def first_axis(positions: torch.Tensor) -> torch.Tensor:
    """Return positions (batch, tokens), the first of several axes in multimodal models."""
    return positions if positions.ndim == 2 else positions[0]


def joined(past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Return positions of cached keys and of new ones behind each other, of as many rows and axes as either has."""
    past = past.to(new.device)
    rows = torch.broadcast_shapes(past.shape[:-1], new.shape[:-1])  # type: ignore[no-untyped-call]
    return torch.cat([past.expand(*rows, -1), new.expand(*rows, -1)], -1)


def leading_padding(positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the position of the first token of each row that is not padding, 0 where that is the first token.

    Without `position_ids` a model counts padding at the left as if it were text. RoPE does not see a common shift, but
    windows, chunks, sinks and lengths do.

    Args:
        positions (`torch.Tensor` of shape `(batch or 1, tokens)` or `(axes, batch or 1, tokens)`): of a first forward.
        mask (`torch.Tensor` of shape `(batch, tokens)`): True for tokens that are not padding.

    Returns:
        `torch.Tensor` of shape `(batch, 1)` or `(axes, batch, 1)`.
    """
    first = mask.long().argmax(-1, keepdim=True)
    rows = positions.expand(*positions.shape[:-2], mask.shape[0], -1)
    there = rows.gather(-1, first.expand(*rows.shape[:-1], 1))
    return torch.where(first > 0, there, 0)


def order_of(keys: torch.Tensor, ends: torch.Tensor | None) -> tuple[bool, bool]:
    """Return whether positions of keys (rows, keys) are aligned and regular; see [`Positions`].

    Args:
        keys (`torch.Tensor` of shape `(rows, keys)`): positions.
        ends (`torch.Tensor`, *optional*): whether the last key is not padding in any row. Keys that follow padding at
            the right do not count up by one.
    """
    index = torch.arange(keys.shape[1], device=keys.device)
    shift = index[-1:] - keys[:, -1:]
    padding = (index < shift) & (keys <= 1) & (keys == keys[:, :1])
    order = [(keys == index).all(), ((keys == index - shift) | padding).all()]
    if ends is not None:
        order[1] = order[1] & ends
    aligned, regular = torch.stack(order).tolist()
    return aligned, regular


def document_lengths(positions: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """Return for each token the length of its document: the highest position in it + 1.

    Several documents may be packed into a row. One ends where positions fall. Padding has no part in a length, and is
    given some length so that its phases are finite.

    Args:
        positions (`torch.Tensor` of shape `(batch or 1, tokens)`): from 0 in each document.
        counted (`torch.Tensor` of shape `(batch, tokens)`, *optional*): False for padding.
    """
    if counted is not None:
        positions = positions.expand(counted.shape[0], -1)
    document = (positions.diff(prepend=positions[:, :1]) < 0).cumsum(-1)
    heights = positions if counted is None else torch.where(counted, positions, 0)
    highest = torch.zeros_like(positions).scatter_reduce(-1, document, heights, "amax")
    return highest.gather(-1, document) + 1


def last_lengths(lengths: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """Return the length (batch, 1) of the document in which the last token of each row is that is not padding."""
    if counted is None:
        return lengths[:, -1:]
    index = torch.arange(counted.shape[-1], device=counted.device)
    last = torch.where(counted, index, 0).amax(-1, keepdim=True)
    return lengths.expand(counted.shape[0], -1).gather(-1, last)
