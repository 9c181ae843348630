"""Record of the keys that a patched model has put into a cache: their positions and their rotation.

A single [`KeyRecord`] on the user's cache contains both. The cache's own methods that move rows or remove keys update
the record. Other changes, by code that evicts, rearranges, or overwrites keys, are detected at the next forward, which
raises an error.
"""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from transformers.cache_utils import StaticLayer

from ...errors import EvaluationError
from ...plan import ExtensionPlan
from ..undo import Carried, mix

START_ANEW = "Start with an empty cache."


class Contents(enum.Enum):
    """States of a [`KeyRecord`]."""

    EMPTY = "no keys"
    WRITING = "a forward of the patched model adds keys"
    KNOWN = "the positions of all keys are known; only the patched model may add to them"
    COUNTED = "compiled steps have added keys, whose positions follow from the newest"


class KeyRecord:
    """Positions and rotations of the keys in one cache."""

    def __init__(self) -> None:
        self.contents = Contents.EMPTY
        self.plan: ExtensionPlan | None = None  # plan under which the keys were written
        self.positions: torch.Tensor | None = None  # of all keys, on one axis or several as in `Positions`
        self.padding: torch.Tensor | None = None  # offset that is subtracted from the model's positions
        self.waiting: torch.Tensor | None = None  # (batch, 1), `True` for rows of padding alone so far, if any is
        self.order = False, False  # whether positions are aligned and regular, see `Positions`
        # for each layer of the cache with rotated keys, the newest position (batch or 1, 1) for which they are
        # rotated, and their number
        self.rotated: dict[int, tuple[torch.Tensor, int]] = {}
        # sets of frequencies whose layers all keep their keys rotated, and the number of keys at that time
        self.standing: tuple[frozenset[str], int] = frozenset(), 0
        # newest position (batch or 1, 1) in a static cache, in a tensor that compiled steps update in place
        self.newest: torch.Tensor | None = None
        self._seen: list[tuple[weakref.ref[torch.Tensor], int] | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the tensors that were seen, because a copy of the cache has others."""
        return vars(self) | {"_seen": None}

    def open(self, cache: Any, plan: ExtensionPlan) -> torch.Tensor | None:
        """Start a forward that may add keys to the cache, and return the positions of those in it, if any.

        Raises:
            EvaluationError: the keys are not those of the last forward, or were written under another plan.
        """
        self.catch_up(cache)
        length = _length(cache, None if self.contents is Contents.WRITING else self.positions)
        if not length:  # new, emptied, or an earlier forward failed before it added keys
            self.empty()
        elif self.positions is None or self.positions.shape[-1] != length or not self._same(cache):
            known = 0 if self.positions is None else self.positions.shape[-1]
            raise EvaluationError(
                f"Expected the {known} keys that the patched model left in the cache, got {length} keys, of which "
                "some were evicted, replaced, overwritten or added by other code. Change them by the cache's own "
                "crop, reorder_cache, batch_select_indices or batch_repeat_interleave, which keep the positions of "
                f"keys. {START_ANEW}"
            )
        elif self.plan is not plan and self.plan != plan:
            raise EvaluationError(f"The cache was filled under another patch. {START_ANEW}")
        # EMPTY or KNOWN -> WRITING: keys come in by `update` from here on
        self.contents, self.plan = Contents.WRITING, plan
        return self.positions

    def close(
        self, cache: Any, plan: ExtensionPlan, positions: torch.Tensor, order: tuple[bool, bool], names: frozenset[str]
    ) -> None:
        """Store the positions of all keys, their order, and the sets of frequencies whose keys are rotated."""
        # WRITING -> KNOWN: `update` raises until the patched model runs again
        self.contents, self.plan, self.positions, self.order = Contents.KNOWN, plan, positions, order
        self.standing = names, positions.shape[-1]
        if is_static(cache) and positions.ndim == 2:
            self._keep_newest(positions[:, -1:])
        self.look(cache)

    def open_slot(self, cache: Any, plan: ExtensionPlan) -> torch.Tensor | None:
        """Return the slot of a static cache for the key of a single token, in a compiled graph.

        `None` outside of compiled graphs, or if positions do not follow from the slot. A step reads only the slot and
        the newest position, in tensors that keep their addresses and shapes, so that one graph serves all steps.
        """
        if not torch.compiler.is_compiling() or not is_static(cache):
            return None
        if self.newest is None or not self.order[1] or self.plan is not plan or self.waiting is not None:
            return None
        self.contents = Contents.WRITING  # KNOWN or COUNTED -> WRITING
        # a copy, because layers increment theirs in place
        return cache.layers[0].cumulative_length.clone().reshape(())  # type: ignore[no-any-return]

    def close_slot(self, newest: torch.Tensor) -> None:
        """Store the position (batch or 1, 1) of the token of a compiled step."""
        assert self.newest is not None
        follows = (newest == self.newest + 1).all()
        torch._assert_async(follows, "the position of a single token must follow those in the cache")
        self.newest.copy_(newest.expand_as(self.newest))
        self.contents = Contents.COUNTED  # WRITING -> COUNTED: the rest of the record is now out of date

    def catch_up(self, cache: Any) -> None:
        """Update the record after compiled steps: positions increase by one per key, rotated for the newest."""
        if self.contents is not Contents.COUNTED:
            return
        assert self.newest is not None
        newest, count = self.newest.clone(), int(cache.get_seq_length())
        index = torch.arange(1 - count, 1, device=newest.device)
        self.positions, self.standing = (newest + index).clamp(min=0), (self.standing[0], count)
        for layer in self.rotated:
            self.rotated[layer] = newest, count
        self.look(cache)  # graphs have written into the tensors
        self.contents = Contents.KNOWN  # COUNTED -> KNOWN

    def update_allowed(self, cache: Any) -> None:
        """Raise an error if keys come from anything but the patched model, unless the cache is empty."""
        if self.contents is Contents.WRITING:
            return
        if cache.get_seq_length() > 0:
            raise EvaluationError(
                "Expected an empty cache, got one that holds the keys of a patched model, which no other model can "
                f"read, nor can its layers where they are called one by one. {START_ANEW}"
            )
        self.empty()  # KNOWN or COUNTED -> EMPTY: the cache was emptied
        self.contents = Contents.WRITING  # EMPTY -> WRITING: another model may use it

    def empty(self) -> None:
        """Update the record after the cache was emptied."""
        self.contents, self.positions, self._seen = Contents.EMPTY, None, None
        self.padding = self.waiting = None
        self.rotated.clear()

    def crop(self, cache: Any) -> None:
        """Update the record after the cache removed its latest keys."""
        if self.positions is not None:
            self.positions = self.positions[..., : int(cache.get_seq_length())]
        self.look(cache)

    def rows(self, cache: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Update the record after the cache changed its rows, by the same change to the rows of a tensor (batch, ...).

        A single row that stands for all is not changed.
        """

        def changed(known: torch.Tensor) -> torch.Tensor:
            if known.ndim == 3:  # axes first
                return torch.stack([changed(axis) for axis in known])
            return change(known) if known.shape[0] > 1 else known

        self.catch_up(cache)
        if self.newest is not None:
            self._keep_newest(changed(self.newest))
        if self.padding is not None:
            self.keep_padding(changed(self.padding))
        if self.waiting is not None:
            self.waiting = changed(self.waiting)
        if self.positions is not None:
            self.positions = changed(self.positions)
        self.rotated = {index: (changed(newest), count) for index, (newest, count) in self.rotated.items()}
        self.look(cache)

    def keep_padding(self, padding: torch.Tensor | None) -> None:
        """Store the offset that is subtracted from the model's positions."""
        self.padding = padding if padding is None or torch.compiler.is_compiling() else _kept(padding)

    def _keep_newest(self, newest: torch.Tensor) -> None:
        """Store the newest position, in the existing tensor if its shape and device match."""
        known = self.newest
        if known is not None and known.shape == newest.shape and known.device == newest.device:
            known.copy_(newest)
        elif not torch.compiler.is_compiling():
            self.newest = _kept(newest)

    def look(self, cache: Any) -> None:
        """Remember the tensors that the layers hold, to detect later replacements and changes."""
        self._seen = None if torch.compiler.is_compiling() else [_seen(layer) for layer in _layers(cache)]

    def _same(self, cache: Any) -> bool:
        """Return whether the layers hold the remembered tensors, and nothing has written into them since.

        Caches that offload their keys to another device hold other tensors. For these, and in compiled graphs, only
        the length is checked.
        """
        if self._seen is None or torch.compiler.is_compiling() or getattr(cache, "offloading", False):
            return True
        layers = _layers(cache)
        return len(layers) == len(self._seen) and all(
            seen is None or (seen[0]() is layer.keys and seen[1] == _version(layer.keys))
            for seen, layer in zip(self._seen, layers, strict=True)
        )


class FollowedCache(Carried):
    """Mixin for the class of a cache that a patched model fills. Its methods keep the record up to date.

    Tensors that its methods create count in-place changes, even under inference mode.
    """

    _posext_keys: KeyRecord

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _count_writes(self)
        self._posext_keys.look(self)  # a copy holds other tensors than its original

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self._posext_keys.update_allowed(self)
        with _counting():
            return super().update(*args, **kwargs)  # type: ignore[misc]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self._posext_keys.empty()

    def crop(self, *args: Any, **kwargs: Any) -> None:
        self._posext_keys.catch_up(self)
        super().crop(*args, **kwargs)  # type: ignore[misc]
        self._posext_keys.crop(self)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        with _counting():
            super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._posext_keys.rows(self, lambda known: known[beam_idx.to(known.device)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        with _counting():
            super().batch_select_indices(indices)  # type: ignore[misc]
        self._posext_keys.rows(self, lambda known: known[indices.to(known.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        with _counting():
            super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._posext_keys.rows(self, lambda known: known.repeat_interleave(repeats, dim=0))


def _counting() -> AbstractContextManager[Any]:
    """Leave inference mode in the context, because its tensors do not count in-place changes."""
    # ask for the graph first, because torch.compile cannot trace the other question
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    without = ExitStack()
    without.enter_context(torch.inference_mode(False))
    without.enter_context(torch.no_grad())
    return without


def _count_writes(cache: Any) -> None:
    """Replace keys that were created under inference mode by copies that count in-place changes."""
    with _counting():
        for layer in _layers(cache):
            if isinstance(keys := getattr(layer, "keys", None), torch.Tensor) and keys.is_inference():
                layer.keys = keys.clone()


def find_cache(values: Iterable[Any]) -> Any:
    """Return the self-attention cache among the arguments or outputs of a model, or `None`."""
    cache = next((value for value in values if hasattr(value, "get_seq_length")), None)
    return getattr(cache, "self_attention_cache", cache)


def record_of(cache: Any) -> KeyRecord:
    """Return the record of a cache, or a new record for an empty cache.

    Raises:
        EvaluationError: the cache has no record but contains keys.
    """
    record: KeyRecord | None = getattr(cache, "_posext_keys", None)
    if record is None:
        if _length(cache, None):
            raise EvaluationError(
                "Expected an empty cache or one that this patched model has filled, got one with keys whose positions "
                "are not known: from before the patch, from another model, from prefix tuning, from layers that were "
                f"called one by one, or from a cache that was rebuilt from its tensors. {START_ANEW}"
            )
        record = KeyRecord()
    return record


def follow(cache: Any, record: KeyRecord) -> None:
    """Put a record on a cache, whose methods keep it up to date from then on."""
    cache._posext_keys = record
    if isinstance(cache, FollowedCache):
        return
    cache.__class__ = mix(FollowedCache, type(cache))
    _count_writes(cache)


def is_static(cache: Any) -> bool:
    """Return whether all layers of a cache are static: preallocated slots that do not move."""
    layers = _layers(cache)
    return len(layers) > 0 and all(type(layer) is StaticLayer for layer in layers)


def seen_for_free(tensor: torch.Tensor) -> bool:
    """Return whether the host can read a tensor without a device synchronization."""
    return tensor.device.type == "cpu"


def _layers(cache: Any) -> list[Any]:
    return getattr(cache, "layers", [])


def _seen(layer: Any) -> tuple[weakref.ref[torch.Tensor], int] | None:
    keys = getattr(layer, "keys", None)
    return (weakref.ref(keys), _version(keys)) if isinstance(keys, torch.Tensor) else None


def _version(keys: torch.Tensor | None) -> int:
    """Return the number of in-place changes to a tensor; -1 for `None` and for tensors that do not count them."""
    return -1 if keys is None or keys.is_inference() else keys._version


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy with a static address for compiled steps."""
    with torch.inference_mode(False):
        copy = torch.empty_like(tensor).copy_(tensor)
    torch._dynamo.mark_static_address(copy)
    return copy


def _length(cache: Any, left: torch.Tensor | None) -> int:
    """Return the number of keys in a cache.

    A static cache counts on its device. To keep the host from waiting, the number of positions that the last forward
    `left` is used, and checked asynchronously.
    """
    count = cache.get_seq_length()
    known = 0 if left is None else left.shape[-1]
    if not known or not isinstance(count, torch.Tensor) or seen_for_free(count):
        return int(count)
    torch._assert_async(count == known, "the keys in the cache must be those that the last forward has left there")
    return known
