"""Rotated keys in the cache, and the rotations of a decoding step.

There is one cache. A new key is rotated for the near band. When it leaves the window, it is rotated for the far band.
A step therefore rotates two keys instead of all. In a forward of several tokens, different queries see the same key in
different bands, so the keys are rotated back first.

The model itself rotates the query and key of a single token for the nearest pairs, by the phases that its rotary
module returns. The phases of all other rotations come from the same call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from ...errors import EvaluationError
from ..kernels import one_step
from ..kernels.bands import mapped, starts, step_fading
from .cache import START_ANEW, is_static
from .forward import Positions
from .layout import Layer, Layout, Phases
from .rotary import phases_at

HOLDERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer)
"""Types of cache layers that store keys unchanged and in order. A sliding static layer rolls its keys, and a quantized
layer stores other numbers. With these, all keys are rotated in every step."""


def cached_keys(
    layer: Layer, place: Positions, key: torch.Tensor, tokens: int, leave: bool = False
) -> tuple[torch.Tensor, bool, int | None]:
    """Rotate a layer's keys in the cache to the positions for the newest token, if they may stay rotated.

    The keys (batch, heads, keys, dim) are all that reached the attention function, of which `tokens` are new. The
    rotation of the key that leaves the window is left to the caller if `leave`.

    Returns:
        `tuple[torch.Tensor, bool, int | None]`: the keys, whether they are rotated (only for a single token), and the
        index of the key that the caller has to rotate.
    """
    state = place.state
    holder = _holder(layer, place, key)
    if holder is not None and place.slot is not None:
        step_keys(layer.key, place, key, place.query_axes.to(key.device))
        return key, True, None
    rotated = state.record.rotated if holder is not None and state.record is not None else {}
    before = rotated.pop(layer.index, None)
    settle = place.regular and place.key_axes.ndim == 2 and not key.requires_grad
    if before is None and place.rotated:
        raise EvaluationError(
            "The cache gave a layer other keys than those that the last forward left there, and the model has rotated "
            f"the new key for those. {START_ANEW}"
        )
    # A static cache is rotated in its first forward, because a compiled step cannot rotate all keys.
    if holder is None or before is None and not (settle and (tokens == 1 or is_static(state.cache))):
        state.loose.add(layer.rotary)
        return key, False, None
    # a sliding layer that records its past holds keys behind its window, which a crop brings back
    stored = key if key.shape[2] >= holder.keys.shape[2] else holder.keys
    count = min(stored.shape[2], place.keys.shape[1])  # a static cache has free slots, a sliding one drops keys
    filled = stored if count == stored.shape[2] else stored[:, :, :count]
    newest = place.once(("newest", key.device), lambda: place.keys[:, -1:].to(key.device))
    cached, last = count - tokens, None
    if before is not None and before[1] == cached and settle and tokens == 1:
        # a decoding step: rotate the new key and the one that leaves the window
        if leave:
            last = state.remapping.bands.leaving(min(count, key.shape[2]))
        else:
            step_keys(layer.key, place, filled, newest)
    else:
        # rotate all keys: in a first step, and after several tokens, a crop, or a position that does not follow
        bands = state.remapping.bands
        positions = place.once(("held", count, key.device), lambda: place.keys[:, -count:].to(key.device))
        plain, wrong = filled, None
        if before is None and tokens > 1:
            plain = filled.clone()
        if before is not None:  # undo the rotation of cached keys, and find the keys that have to change
            old = bands.rotated_positions(before[0], positions[:, :cached])
            if place.rotated:  # the model has rotated the new key
                old = torch.cat([old, mapped(newest, bands.nearest)], 1)
            length = old.shape[1]

            def inverse() -> Phases:
                ends = zip(phases_at(place, old, key), (1.0, 0.0), strict=True)
                return _between(*(torch.cat([side, torch.full_like(side, still)], 1) for side, still in ends))

            back = _once(place, ("back", before[1], cached), layer.key, key, inverse)
            plain = torch.cat([layer.key.rotate(filled[:, :, :length], back), filled[:, :, length:]], 2)
            stands = old == bands.rotated_positions(newest, positions[:, :length])
            wrong = torch.cat([~stands, positions[:, length:] >= 0], 1)
        if not settle:  # these keys cannot stay rotated: the cache gets them back unrotated
            filled.copy_(plain)
            state.loose.add(layer.rotary)
            return plain[:, :, -key.shape[2] :], False, None
        targets = bands.rotated_positions(newest, positions)
        phases = _once(place, ("all", count), layer.key, key, lambda: phases_at(place, targets, key))
        moved = layer.key.rotate(plain, phases)
        if wrong is not None:  # keys at the right position keep their bits, so that errors do not accumulate
            moved = torch.where(wrong[:, None, :, None], moved, filled)
        filled.copy_(moved)  # in place, because the cache may hold a part of these keys, or must keep its memory
        key = key if tokens == 1 else plain[:, :, -key.shape[2] :]
    rotated[layer.index] = newest, min(count, holder.keys.shape[2])
    return key, tokens == 1, last


def _holder(layer: Layer, place: Positions, key: torch.Tensor) -> DynamicLayer | StaticLayer | None:
    """Return the cache layer that shares memory with the keys, if its keys may stay rotated; otherwise `None`."""
    state, index = place.state, layer.index
    if not state.remapping.rotates_cached_keys or state.record is None or index is None:
        return None
    layers: list[Any] = getattr(state.cache, "layers", [])
    if not 0 <= index < len(layers):  # the index of zamba2's shared layer is -1
        return None
    if index not in state.record.rotated and torch.compiler.is_compiling():
        return None  # a graph has fixed shapes and cannot read the number of keys
    holder = layers[index]
    if type(holder) not in HOLDERS:
        return None
    alias = place.slot is not None or holder.keys is key
    return holder if alias or holder.keys.untyped_storage()._cdata == key.untyped_storage()._cdata else None


def _once(place: Positions, what: Any, layout: Layout, like: torch.Tensor, make: Callable[[], Phases]) -> Phases:
    return place.once((what, "kept", layout.kind, like.dtype, like.device), lambda: layout.phases(*make(), like.dtype))


def step_queries(layout: Layout, place: Positions, query: torch.Tensor) -> list[torch.Tensor]:
    """Return a query (batch, heads, 1, dim) under each map, given its states rotated for the nearest pairs."""
    bands = place.state.remapping.bands
    count = len(bands.onward)
    rotated = list(layout.rotate(query, _onward(place, layout, query)[0]).chunk(count, 2)) if count else []
    if bands.stays is not None:
        rotated.insert(bands.stays, query)
    return rotated


def _onward(place: Positions, layout: Layout, like: torch.Tensor) -> tuple[Phases, Phases]:
    """Return the rotations of the query for each other band, and the rotation of the key that leaves the window."""

    def make() -> tuple[Phases, Phases]:
        cos, sin = (side[:, 1:].to(like.device) for side in place.memo["step phases"])
        cos, sin = layout.phases(*_between(cos, sin), like.dtype)
        count = len(place.state.remapping.bands.onward)
        return (cos[:, :, :count], sin[:, :, :count]), (cos[:, :, count:], sin[:, :, count:])

    return place.once(("onward", layout.kind, like.dtype, like.device), make)


def whole_step(
    layer: Layer,
    place: Positions,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
) -> Any:
    """Return a step that attends in one kernel, from a query that the model has rotated for the nearest pairs.

    The kernel rotates the query for each band, and the key that leaves the nearest band. `None` if no kernel supports
    the step.
    """
    bands = place.state.remapping.bands.bands
    step = one_step(query, key, value, len(bands))
    if step is None:
        return None

    def make() -> Any:
        begins = starts(bands, key.shape[2])
        fading = step_fading(bands, place.queries.to(query.device))
        return begins and step(query, key, *_band_phases(layer, place, query), begins, scaling, fading)

    like = "whole", layer.query.kind, layer.key.kind, query.shape, key.shape, query.dtype, query.device, scaling
    return place.once(like, make)


def _band_phases(layer: Layer, place: Positions, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the partners (2, dim) of all channels of queries and keys, and phases (batch or 1, 2, bands + 1, dim).

    Phases are in float32. They rotate the query for each band, and last, the key that leaves the window.
    """
    bands = place.state.remapping.bands
    like = like.new_empty(0, dtype=torch.float32)
    onward, leaves = _onward(place, layer.query, like)[0], _onward(place, layer.key, like)[1]
    sides = []
    for side, still in enumerate((1.0, 0.0)):  # cosines, then sines
        phases = list(onward[side].unbind(2))
        if bands.stays is not None:
            rows, *_, dim = onward[side].shape
            phases.insert(bands.stays, onward[side].new_full((rows, 1, dim), still))
        chosen = [phases[number] for number in bands.query_choice]
        sides.append(torch.stack([*chosen, *(leaves[side].unbind(2) or phases[:1])], 2))
    return torch.stack([layer.query.partners, layer.key.partners]), torch.cat(sides, 1)


def step_keys(layout: Layout, place: Positions, key: torch.Tensor, newest: torch.Tensor) -> None:
    """Rotate the key of a new token at `newest` (rows, 1), and the key that it pushes out of the window, in place.

    The new key is skipped if the model has rotated it. Positions are regular, so the same columns are rotated in all
    rows. In a compiled step, the columns are a tensor, and the host does not know whether a key has reached the window
    edge.
    """
    bands = place.state.remapping.bands
    last, far, gone = key.shape[2] - 1, bands.edge or 0, bands.leaving(key.shape[2])
    moves = gone is not None or (place.slot is not None and far > 0)
    if place.rotated and not moves:
        return

    def phases() -> Phases:
        steps = []
        if place.rotated:
            steps.append(_onward(place, layout, key)[1])
        elif moves:
            crossing = phases_at(place, torch.cat(bands.crossing(newest), -1), key)
            steps.append(layout.phases(*_between(*crossing), key.dtype))
        if place.slot is not None and moves:  # before any key reaches the window edge, rotate by the identity
            reached, (cos, sin) = place.slot >= far, steps[0]
            steps = [(torch.where(reached, cos, 1.0), torch.where(reached, sin, 0.0))]
        if not place.rotated:
            steps.append(layout.phases(*phases_at(place, mapped(newest, bands.nearest), key), key.dtype))
        cos, sin = steps[0] if len(steps) == 1 else (torch.cat(one, 2) for one in zip(*steps, strict=True))
        return cos, sin

    rotation = place.once(("step", layout.kind, last, key.dtype, key.device), phases)
    if place.slot is None:
        columns = slice(last, None)
        if gone is not None:
            columns = slice(gone, gone + 1) if place.rotated else slice(gone, None, far)
        layout.rotate_(key[:, :, columns], rotation)
        return
    slots = [(place.slot - far).clamp(min=0)] * moves + [place.slot] * (not place.rotated)
    index = torch.stack(slots).to(key.device)
    key.index_copy_(2, index, layout.rotate(key.index_select(2, index), rotation))


def _between(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rotations from the first half of cosines and sines (batch, 2 * rotations, slots) to the second half.

    They are in float32 or wider. An attention factor, which makes phases larger than 1, cancels out.
    """
    dtype = torch.promote_types(cos.dtype, torch.float32)
    old_cos, new_cos = cos.to(dtype).chunk(2, 1)
    old_sin, new_sin = sin.to(dtype).chunk(2, 1)
    size = (old_cos * old_cos).addcmul_(old_sin, old_sin)
    along = (new_cos * old_cos).addcmul_(new_sin, old_sin)
    across = (new_sin * old_cos).addcmul_(new_cos, old_sin, value=-1)
    return along.div_(size), across.div_(size)
