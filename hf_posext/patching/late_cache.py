"""What the cache of a patched model has to know: where each key is and how it is turned, and that no other model may
read it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..errors import EvaluationError
from ..plan import ExtensionPlan
from .mixin import Carried, mix


class PatchedCache(Carried):
    """Mixed into the class of a cache that a patched model has filled.

    Positions of shape (batch or 1, keys) follow what happens to rows. A crop needs nothing: the length of the cache
    says how many of them count. Keys are not rotated, but in the layers of which `_posext_turned` tells for which
    newest position (batch or 1, 1) they are, and how many.
    """

    _posext_plan: ExtensionPlan
    _posext_positions: torch.Tensor
    _posext_order: tuple[bool, bool]
    _posext_turned: dict[int, tuple[torch.Tensor, int]]
    _posext_open: bool

    def update(self, *args: Any, **kwargs: Any) -> Any:
        if not self._posext_open:
            if self.get_seq_length() > 0:  # type: ignore[attr-defined]
                raise EvaluationError(
                    "the cache holds the keys of a patched model, which no other model can read; "
                    "start with an empty cache"
                )
            self._forget()  # it was emptied
            self._posext_open = True
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self._forget()

    def _forget(self) -> None:
        self._posext_positions = self._posext_positions[:, :0]
        self._posext_turned.clear()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._each(lambda held: held.repeat_interleave(repeats, dim=0))

    def _select(self, rows: torch.Tensor) -> None:
        self._each(lambda held: held[rows.to(held.device)])

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Change what is held of each row; where there is one it stands for all."""

        def changed(held: torch.Tensor) -> torch.Tensor:
            return change(held) if held.shape[0] > 1 else held

        self._posext_positions = changed(self._posext_positions)
        self._posext_turned = {i: (changed(newest), count) for i, (newest, count) in self._posext_turned.items()}


def find_cache(values: Iterable[Any]) -> Any:
    """The cache among the arguments or outputs of a model; `None` where there is none."""
    return next((value for value in values if hasattr(value, "get_seq_length")), None)


def open_cache(cache: Any, plan: ExtensionPlan) -> torch.Tensor | None:
    """Positions of the keys in a cache, or `None` where it is empty; the patched model may add to it from here on.

    Raises:
        EvaluationError: it was filled before the patch, or keys in it are turned for another plan.
    """
    known = getattr(cache, "_posext_positions", None)
    length = _length(cache, known)
    if length and (known is None or known.shape[-1] < length):
        raise EvaluationError(
            "the cache holds keys from before the patch, which are rotated already; start with an empty cache"
        )
    turned = getattr(cache, "_posext_turned", {})
    if not length:
        turned.clear()
    if turned and cache._posext_plan != plan:
        raise EvaluationError("the cache was filled under another patch; start with an empty cache")
    cache._posext_turned = turned
    if known is not None:
        cache._posext_open = True
    return known[..., :length] if known is not None and length else None


def _length(cache: Any, known: torch.Tensor | None) -> int:
    """How many keys are in a cache. A static one counts on its device, for which the host does not wait where the last
    forward has left their positions."""
    count = cache.get_seq_length()
    left = 0 if known is None or cache._posext_open else known.shape[-1]
    if not left or not isinstance(count, torch.Tensor) or seen_for_free(count):
        return int(count)
    torch._assert_async(count == left, "the keys in the cache must be those that the last forward has left there")
    return left


def seen_for_free(tensor: torch.Tensor) -> bool:
    """Whether the host can read a tensor without waiting for a device."""
    return tensor.device.type == "cpu"


def close_cache(cache: Any, plan: ExtensionPlan, positions: torch.Tensor, order: tuple[bool, bool]) -> None:
    """Leave the positions of all keys, and what is known of their order, with the cache that holds them."""
    if not isinstance(cache, PatchedCache):
        cache.__class__ = mix(PatchedCache, type(cache))
        cache._posext_turned = getattr(cache, "_posext_turned", {})
    cache._posext_plan, cache._posext_positions, cache._posext_order = plan, positions, order
    cache._posext_open = False
