"""What the cache of a patched model has to know: where each key is and how it is turned, and that no other model may
read it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers.cache_utils import StaticLayer

from ...errors import EvaluationError
from ...plan import ExtensionPlan
from ..mixin import Carried, mix


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
    _posext_standing: tuple[frozenset[str], int] = frozenset(), 0
    """The sets of frequencies of layers whose keys are all turned, and how many keys the cache held then."""
    _posext_newest: torch.Tensor | None = None
    """Of a static cache: the newest position (batch or 1, 1), in one place, where compiled steps keep it."""
    _posext_stepped = False
    """Whether such steps have added keys since; what is told of the keys above is of before."""

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
        self._posext_stepped = False

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

        catch_up(self)
        if self._posext_newest is not None:
            keep_newest(self, changed(self._posext_newest))
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
    catch_up(cache)
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


def close_cache(
    cache: Any, plan: ExtensionPlan, positions: torch.Tensor, order: tuple[bool, bool], standing: frozenset[str]
) -> None:
    """Leave the positions of all keys, what is known of their order, and which sets' keys are turned, with the cache
    that holds them."""
    if not isinstance(cache, PatchedCache):
        cache.__class__ = mix(PatchedCache, type(cache))
        cache._posext_turned = getattr(cache, "_posext_turned", {})
    cache._posext_plan, cache._posext_positions, cache._posext_order = plan, positions, order
    cache._posext_open, cache._posext_standing = False, (standing, positions.shape[-1])
    if is_static(cache):
        keep_newest(cache, positions[:, -1:])


def is_static(cache: Any) -> bool:
    """Whether all layers of a cache have slots that stay in their places."""
    layers = getattr(cache, "layers", [])
    return len(layers) > 0 and all(type(layer) is StaticLayer for layer in layers)


def open_slot(cache: Any, plan: ExtensionPlan) -> torch.Tensor | None:
    """In a compiled graph, the slot of a static cache that the key of a single token gets, as a tensor; `None` where
    positions do not follow from it.

    Slots and the newest position are all that such a step looks at: tensors that stay in their places, of shapes that
    stay the same, so that one graph does for all steps, and a CUDA graph for all replays.
    """
    if not torch.compiler.is_compiling() or not isinstance(cache, PatchedCache) or not is_static(cache):
        return None
    if cache._posext_newest is None or not cache._posext_order[1] or cache._posext_plan is not plan:
        return None
    cache._posext_open = True
    layers: Any = cache.layers  # type: ignore[attr-defined]
    slot: torch.Tensor = layers[0].cumulative_length.clone().reshape(())  # layers count on in place
    return slot


def close_slot(cache: PatchedCache, newest: torch.Tensor) -> None:
    """Leave the position (batch or 1, 1) of the token with the cache that holds its key."""
    assert cache._posext_newest is not None
    follows = (newest == cache._posext_newest + 1).all()
    torch._assert_async(follows, "the position of a single token must follow those in the cache")
    cache._posext_newest.copy_(newest.expand_as(cache._posext_newest))
    cache._posext_open, cache._posext_stepped = False, True


def keep_newest(cache: PatchedCache, newest: torch.Tensor) -> None:
    """Keep the newest position of a static cache where it was kept so far, if there is such a place."""
    held = cache._posext_newest
    if held is not None and held.shape == newest.shape and held.device == newest.device:
        held.copy_(newest)
    elif not torch.compiler.is_compiling():
        with torch.inference_mode(False):
            cache._posext_newest = torch.empty_like(newest).copy_(newest)
        torch._dynamo.mark_static_address(cache._posext_newest)


def catch_up(cache: Any) -> None:
    """Find what compiled steps have not told of the keys: rows count up by one, and all are turned for the newest."""
    if not getattr(cache, "_posext_stepped", False):
        return
    newest, count = cache._posext_newest.clone(), int(cache.get_seq_length())
    index = torch.arange(1 - count, 1, device=newest.device)
    cache._posext_positions, cache._posext_standing = (newest + index).clamp(min=0), (cache._posext_standing[0], count)
    for layer in cache._posext_turned:
        cache._posext_turned[layer] = newest, count
    cache._posext_stepped = False
