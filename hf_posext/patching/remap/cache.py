"""Record of the keys that a patched model has put into a cache: their positions and their rotation.

One [`KeyRecord`] on the user's cache holds all of it. The methods of the cache that move rows or take keys back report
to the record. Whatever else was done to the keys, evicted, rearranged or overwritten by other code, is found when the
next forward begins, and is refused.
"""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import StaticLayer

from ...errors import EvaluationError
from ...plan import ExtensionPlan
from ..mixin import Carried, mix

START_ANEW = "Start with an empty cache."


class Contents(enum.Enum):
    """State of the record of a cache's keys."""

    EMPTY = "no keys"
    WRITING = "a forward of the patched model adds keys"
    KNOWN = "the positions of all keys are known; only the patched model may add to them"
    COUNTED = "compiled steps have added keys, whose positions follow from the newest"


class KeyRecord:
    """Positions and rotations of the keys in one cache.

    Attributes:
        contents (`Contents`): what is known.
        plan (`ExtensionPlan`, *optional*): under which the keys were written.
        positions (`torch.Tensor` of shape `(batch or 1, keys)` or `(axes, batch or 1, keys)`, *optional*): of all
            keys.
        padding (`torch.Tensor` of shape `(batch, 1)` or `(axes, batch, 1)`, *optional*): what is taken from the
            positions that the model counts; see `leading_padding`.
        order (`tuple[bool, bool]`): whether positions are aligned and regular; see `Positions`.
        rotated (`dict[int, tuple[torch.Tensor, int]]`): by layer of the cache, for which newest position
            (batch or 1, 1) its keys are rotated, and how many. Keys of other layers are not rotated.
        standing (`tuple[frozenset[str], int]`): the sets of frequencies of which all layers keep their keys rotated,
            and how many keys the cache held then.
        newest (`torch.Tensor` of shape `(batch or 1, 1)`, *optional*): of a static cache, the newest position, in one
            place, where compiled steps keep it.
    """

    def __init__(self) -> None:
        self.contents = Contents.EMPTY
        self.plan: ExtensionPlan | None = None
        self.positions: torch.Tensor | None = None
        self.padding: torch.Tensor | None = None
        self.order = False, False
        self.rotated: dict[int, tuple[torch.Tensor, int]] = {}
        self.standing: tuple[frozenset[str], int] = frozenset(), 0
        self.newest: torch.Tensor | None = None
        self._seen: list[tuple[weakref.ref[torch.Tensor], int] | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the tensors that were seen: a copy of the cache has others."""
        return vars(self) | {"_seen": None}

    def open(self, cache: Any, plan: ExtensionPlan) -> torch.Tensor | None:
        """Let a forward of the patched model add to the cache.

        Returns:
            `torch.Tensor`, *optional*: positions of the keys in it; `None` where it is empty.

        Raises:
            EvaluationError: the keys are not those that the last forward left, or are rotated for another plan.
        """
        self.catch_up(cache)
        length = _length(cache, None if self.contents is Contents.WRITING else self.positions)
        if not length:  # new, emptied, or a forward before this one failed before it added any
            self._empty()
        elif self.positions is None or self.positions.shape[-1] != length or not self._same(cache):
            known = 0 if self.positions is None else self.positions.shape[-1]
            raise EvaluationError(
                f"Expected the {known} keys that the patched model left in the cache, got {length} keys, of which "
                "some were evicted, replaced, overwritten or added by other code. Change them by the cache's own "
                "crop, reorder_cache, batch_select_indices or batch_repeat_interleave, which keep the positions of "
                f"keys. {START_ANEW}"
            )
        if self.rotated and self.plan != plan:
            raise EvaluationError(f"The cache was filled under another patch. {START_ANEW}")
        # EMPTY or KNOWN -> WRITING: keys come in by `update` from here on
        self.contents, self.plan = Contents.WRITING, plan
        return self.positions

    def close(
        self, cache: Any, plan: ExtensionPlan, positions: torch.Tensor, order: tuple[bool, bool], names: frozenset[str]
    ) -> None:
        """Keep the positions of all keys, their order, and the sets of frequencies whose keys are rotated."""
        # WRITING -> KNOWN: nothing may come in by `update` until the patched model runs again
        self.contents, self.plan, self.positions, self.order = Contents.KNOWN, plan, positions, order
        self.standing = names, positions.shape[-1]
        if is_static(cache) and positions.ndim == 2:
            self._keep_newest(positions[:, -1:])
        self.look(cache)

    def open_slot(self, cache: Any, plan: ExtensionPlan) -> torch.Tensor | None:
        """Return, in a compiled graph, the slot of a static cache that the key of a single token gets; `None` where
        positions do not follow from it.

        Slots and the newest position are all that such a step looks at: tensors that stay in their places, of shapes
        that stay the same, so that one graph does for all steps, and a CUDA graph for all replays.
        """
        if not torch.compiler.is_compiling() or not is_static(cache):
            return None
        if self.newest is None or not self.order[1] or self.plan is not plan:
            return None
        self.contents = Contents.WRITING  # KNOWN or COUNTED -> WRITING
        layers: Any = cache.layers
        slot: torch.Tensor = layers[0].cumulative_length.clone().reshape(())  # layers count on in place
        return slot

    def close_slot(self, newest: torch.Tensor) -> None:
        """Keep the position (batch or 1, 1) of the token of a compiled step."""
        assert self.newest is not None
        follows = (newest == self.newest + 1).all()
        torch._assert_async(follows, "the position of a single token must follow those in the cache")
        self.newest.copy_(newest.expand_as(self.newest))
        self.contents = Contents.COUNTED  # WRITING -> COUNTED: the rest of the record is older than such steps

    def catch_up(self, cache: Any) -> None:
        """Record what compiled steps did to the keys: rows count up by one, and all are rotated for the newest."""
        if self.contents is not Contents.COUNTED:
            return
        assert self.newest is not None
        newest, count = self.newest.clone(), int(cache.get_seq_length())
        index = torch.arange(1 - count, 1, device=newest.device)
        self.positions, self.standing = (newest + index).clamp(min=0), (self.standing[0], count)
        for layer in self.rotated:
            self.rotated[layer] = newest, count
        self.look(cache)  # graphs write into the tensors
        self.contents = Contents.KNOWN  # COUNTED -> KNOWN

    def update_allowed(self, cache: Any) -> None:
        """Refuse keys from others than the patched model."""
        if self.contents is Contents.WRITING:
            return
        if cache.get_seq_length() > 0:
            raise EvaluationError(
                "Expected an empty cache, got one that holds the keys of a patched model, which no other model can "
                f"read, nor can its layers where they are called one by one. {START_ANEW}"
            )
        self._empty()  # KNOWN or COUNTED -> EMPTY: it was emptied
        self.contents = Contents.WRITING  # EMPTY -> WRITING: another model may have it

    def reset(self) -> None:
        """The cache was emptied."""
        self._empty()

    def crop(self, cache: Any) -> None:
        """The cache took back its latest keys."""
        if self.positions is not None:
            self.positions = self.positions[..., : int(cache.get_seq_length())]
        self.look(cache)

    def rows(self, cache: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """The cache changed its rows. One row that stands for all is left as it is.

        Args:
            cache (`Cache`): the cache.
            change (`Callable`): what was done to the rows of a tensor (batch, ...).
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
        if self.positions is not None:
            self.positions = changed(self.positions)
        self.rotated = {index: (changed(newest), count) for index, (newest, count) in self.rotated.items()}
        self.look(cache)

    def keep_padding(self, padding: torch.Tensor | None) -> None:
        """Keep what is taken from the positions that the model counts."""
        if padding is None or torch.compiler.is_compiling():
            self.padding = padding
        else:
            self.padding = _kept(padding)

    def _empty(self) -> None:
        self.contents, self.positions, self.padding, self._seen = Contents.EMPTY, None, None, None
        self.rotated.clear()

    def _keep_newest(self, newest: torch.Tensor) -> None:
        """Keep the newest position where it was kept so far, if there is such a place."""
        known = self.newest
        if known is not None and known.shape == newest.shape and known.device == newest.device:
            known.copy_(newest)
        elif not torch.compiler.is_compiling():
            self.newest = _kept(newest)

    def look(self, cache: Any) -> None:
        """Remember the tensors that the layers hold, so that others in their place, or other contents, are noticed."""
        self._seen = None if torch.compiler.is_compiling() else [_seen(layer) for layer in _layers(cache)]

    def _same(self, cache: Any) -> bool:
        """Return whether the layers hold the tensors that the last forward, or the cache's own methods, left, and
        nobody has written into them.

        Caches that move their keys to another device and back hold others. There the length counts.
        """
        if self._seen is None or torch.compiler.is_compiling() or getattr(cache, "offloading", False):
            return True
        layers = _layers(cache)
        return len(layers) == len(self._seen) and all(
            seen is None or (seen[0]() is layer.keys and seen[1] == _version(layer.keys))
            for seen, layer in zip(self._seen, layers, strict=True)
        )


class FollowedCache(Carried):
    """Mixed into the class of a cache that a patched model fills: its methods tell the record what they did.

    What they make counts how often it is written into, also under inference mode.
    """

    _posext_keys: KeyRecord

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _count_writes(self)
        self._posext_keys.look(self)  # at the tensors of a copy

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self._posext_keys.update_allowed(self)
        with _counting():
            return super().update(*args, **kwargs)  # type: ignore[misc]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self._posext_keys.reset()

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


@contextmanager
def _counting() -> Iterator[None]:
    """Leave inference mode, whose tensors do not count how often they are written into."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        yield
    else:
        with torch.inference_mode(False), torch.no_grad():
            yield


def _count_writes(cache: Any) -> None:
    """Replace keys that were made under inference mode."""
    with _counting():
        for layer in _layers(cache):
            if isinstance(keys := getattr(layer, "keys", None), torch.Tensor) and keys.is_inference():
                layer.keys = keys.clone()


def find_cache(values: Iterable[Any]) -> Any:
    """Return the cache of self-attention among the arguments or outputs of a model; `None` without one."""
    cache = next((value for value in values if hasattr(value, "get_seq_length")), None)
    return getattr(cache, "self_attention_cache", cache)


def record_of(cache: Any) -> KeyRecord:
    """Return the record of a cache, a new one for an empty cache.

    Raises:
        EvaluationError: the cache holds keys that no patched model has put there.
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
    """Put a record on a cache, whose methods tell it from now on what they do."""
    cache._posext_keys = record
    if isinstance(cache, FollowedCache):
        return
    cache.__class__ = mix(FollowedCache, type(cache))
    _count_writes(cache)


def is_static(cache: Any) -> bool:
    """Return whether all layers of a cache have slots that stay in their places."""
    layers = _layers(cache)
    return len(layers) > 0 and all(type(layer) is StaticLayer for layer in layers)


def seen_for_free(tensor: torch.Tensor) -> bool:
    """Return whether the host can read a tensor without waiting for a device."""
    return tensor.device.type == "cpu"


def _layers(cache: Any) -> list[Any]:
    return getattr(cache, "layers", [])


def _seen(layer: Any) -> tuple[weakref.ref[torch.Tensor], int] | None:
    keys = getattr(layer, "keys", None)
    return (weakref.ref(keys), _version(keys)) if isinstance(keys, torch.Tensor) else None


def _version(keys: torch.Tensor | None) -> int:
    """Return how often a tensor was written into; -1 of none, and where that is not counted."""
    return -1 if keys is None or keys.is_inference() else keys._version


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy that compiled steps find in the same place."""
    with torch.inference_mode(False):
        copy = torch.empty_like(tensor).copy_(tensor)
    torch._dynamo.mark_static_address(copy)
    return copy


def _length(cache: Any, left: torch.Tensor | None) -> int:
    """Return how many keys are in a cache. A static one counts on its device, for which the host does not wait where
    the last forward has left their positions."""
    count = cache.get_seq_length()
    known = 0 if left is None else left.shape[-1]
    if not known or not isinstance(count, torch.Tensor) or seen_for_free(count):
        return int(count)
    torch._assert_async(count == known, "the keys in the cache must be those that the last forward has left there")
    return known
