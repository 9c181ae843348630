"""Positions of the tokens and keys of one forward, counted from the first token that is not padding."""

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
    """Positions of the tokens and keys of one forward, as requested from one rotary module.

    Multimodal models have several positions per token: time, height, and width. All of them affect the phases. The
    first axis decides which band a pair is in.

    Args:
        state (`ForwardState`): state of the forward.
        site (`RotarySite`): rotary module that was called, and its set of frequencies.
        query_axes (`torch.Tensor` of shape `(batch or 1, tokens)` or `(axes, batch or 1, tokens)`): positions of the
            tokens.
        key_axes (`torch.Tensor` of shape `(batch or 1, keys)` or `(axes, batch or 1, keys)`): positions of all keys,
            starting with those in the cache.
        aligned (`bool`): whether the positions of all keys equal their indices.
        regular (`bool`): whether positions in each row increase by one, except for padding before the first key.
        task (`int`): id of the backward pass in which the module was called, -1 outside of a backward pass.
        axes (`int`, *optional*): number of axes that the rotary module expects. Positions that are equal on all axes,
            like those of text, are stored once.
        counted (`torch.Tensor` of shape `(batch, tokens)`, *optional*): `False` for padding tokens.
        slot (`torch.Tensor`, *optional*): slot of the new key, in a compiled step with a static cache. The keys are
            then all slots. Free slots have later positions and are masked.
        rotated (`bool`): whether the model itself rotates the query and key of a single token to the positions of the
            nearest pairs. The keys in the cache are then rotated, too.
        memo (`dict`): values that the layers of a forward share. See [`~Positions.once`].
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
        """Name of the set of frequencies."""
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
        """Return the lengths (batch or 1, tokens or 1) of the documents of queries or keys (..., tokens)."""
        lengths = self.once("lengths", lambda: document_lengths(self.queries, self.counted))
        if of.shape[-1] != lengths.shape[-1]:  # cached keys belong to the document that continues
            lengths = self.once("last length", lambda: last_lengths(lengths, self.counted))
        return lengths.to(of.device)

    def once(self, what: Any, make: Callable[[], T]) -> T:
        """Return a value that all layers of a forward share, and compute it at the first call."""
        known: T | None = self.memo.get(what)
        if known is None:
            known = self.memo[what] = make()
        return known


def on_axes(positions: torch.Tensor, axes: int | None) -> torch.Tensor:
    """Return positions on the number of axes that a rotary module expects."""
    return positions if axes is None or positions.ndim == 3 else positions.expand(axes, -1, -1)


def first_axis(positions: torch.Tensor) -> torch.Tensor:
    """Return positions (batch, tokens) on the first axis. Only multimodal models have several axes."""
    return positions if positions.ndim == 2 else positions[0]


def joined(past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Concatenate the positions of cached and new keys, after broadcasting their rows and axes."""
    past = past.to(new.device)
    rows = torch.broadcast_shapes(past.shape[:-1], new.shape[:-1])  # type: ignore[no-untyped-call]
    return torch.cat([past.expand(*rows, -1), new.expand(*rows, -1)], -1)


def leading_padding(positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the position of the first token in each row that is not padding, or 0 for a row without left padding.

    Without `position_ids`, a model counts left padding like text. A common shift does not change RoPE, but it changes
    windows, chunks, sinks, and lengths.

    Args:
        positions (`torch.Tensor` of shape `(batch or 1, tokens)` or `(axes, batch or 1, tokens)`): positions of a
            first forward.
        mask (`torch.Tensor` of shape `(batch, tokens)`): `True` for tokens that are not padding.

    Returns:
        `torch.Tensor` of shape `(batch, 1)` or `(axes, batch, 1)`.
    """
    first = mask.long().argmax(-1, keepdim=True)
    rows = positions.expand(*positions.shape[:-2], mask.shape[0], -1)
    starts = rows.gather(-1, first.expand(*rows.shape[:-1], 1))
    return torch.where(first > 0, starts, 0)


def order_of(keys: torch.Tensor, ends: torch.Tensor | None) -> tuple[bool, bool]:
    """Return whether the positions of keys are aligned and regular. See [`Positions`].

    Args:
        keys (`torch.Tensor` of shape `(rows, keys)`): positions of keys.
        ends (`torch.Tensor`, *optional*): whether no row ends with padding. The positions of keys that follow right
            padding do not increase by one.
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
    """Return the length of each token's document, which is its highest position + 1.

    Several documents may be packed into a row. A new document starts when positions decrease. Padding does not count
    towards a length. It gets a length as well, so that its phases are finite.

    Args:
        positions (`torch.Tensor` of shape `(batch or 1, tokens)`): positions that start at 0 in each document.
        counted (`torch.Tensor` of shape `(batch, tokens)`, *optional*): `False` for padding.
    """
    if counted is not None:
        positions = positions.expand(counted.shape[0], -1)
    document = (positions.diff(prepend=positions[:, :1]) < 0).cumsum(-1)
    heights = positions if counted is None else torch.where(counted, positions, 0)
    highest = torch.zeros_like(positions).scatter_reduce(-1, document, heights, "amax")
    return highest.gather(-1, document) + 1


def last_lengths(lengths: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """Return the length (batch, 1) of the document of each row's last token that is not padding."""
    if counted is None:
        return lengths[:, -1:]
    index = torch.arange(counted.shape[-1], device=counted.device)
    last = torch.where(counted, index, 0).amax(-1, keepdim=True)
    return lengths.expand(counted.shape[0], -1).gather(-1, last)
