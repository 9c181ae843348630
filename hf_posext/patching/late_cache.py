"""What a cache of unrotated keys has to know: the position of each key, and that no other model may read it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..errors import EvaluationError
from .mixin import Carried, mix


class UnrotatedCache(Carried):
    """Mixed into the class of a cache that a patched model has filled.

    Positions of shape (batch or 1, keys) follow what happens to rows. A crop needs nothing: the length of the cache
    says how many of them count.
    """

    _posext_positions: torch.Tensor
    _posext_open: bool

    def update(self, *args: Any, **kwargs: Any) -> Any:
        if not self._posext_open:
            if self.get_seq_length() > 0:  # type: ignore[attr-defined]
                raise EvaluationError(
                    "the cache holds the unrotated keys of a patched model, which no other model can read; "
                    "start with an empty cache"
                )
            self._posext_positions, self._posext_open = self._posext_positions[:, :0], True  # it was reset
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self._posext_positions.shape[0] > 1:
            self._posext_positions = self._posext_positions.repeat_interleave(repeats, dim=0)

    def _select(self, rows: torch.Tensor) -> None:
        if self._posext_positions.shape[0] > 1:  # one row stands for all
            self._posext_positions = self._posext_positions[rows.to(self._posext_positions.device)]


def find_cache(values: Iterable[Any]) -> Any:
    """The cache among the arguments or outputs of a model; `None` where there is none."""
    return next((value for value in values if hasattr(value, "get_seq_length")), None)


def open_cache(cache: Any) -> torch.Tensor | None:
    """Positions of the keys in a cache, or `None` where it is empty; the patched model may add to it from here on.

    Raises:
        EvaluationError: it was filled before the patch.
    """
    length = int(cache.get_seq_length())
    known = getattr(cache, "_posext_positions", None)
    if length and (known is None or known.shape[-1] < length):
        raise EvaluationError(
            "the cache holds keys from before the patch, which are rotated already; start with an empty cache"
        )
    if known is not None:
        cache._posext_open = True
    return known[..., :length] if known is not None and length else None


def close_cache(cache: Any, positions: torch.Tensor) -> None:
    """Leave the positions of all keys with the cache that holds them."""
    if not isinstance(cache, UnrotatedCache):
        cache.__class__ = mix(UnrotatedCache, type(cache))
    cache._posext_positions, cache._posext_open = positions, False
