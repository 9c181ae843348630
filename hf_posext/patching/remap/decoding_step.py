"""Rotations of a decoding step: the query, for each other band, and the key that leaves the window.

The model itself rotates query and key of the token, to where keys see the nearest pairs, by the phases that its rotary
module returns. The phases of all that is left come from the same call.
"""

from __future__ import annotations

from typing import Any

import torch

from ..kernels import mapped, one_step, starts, step_fading
from .layout import LayerLayout, Layout, Phases
from .positions import Positions
from .remapping import Bands
from .rotary import phases_at


def step_queries(layout: Layout, at: Positions, query: torch.Tensor) -> list[torch.Tensor]:
    """Return a query (batch, heads, 1, dim), which the model has rotated to the nearest, under each map of queries."""
    bands = at.state.remapping.bands
    count = len(bands.onward)
    rotated = list(layout.rotate(query, _onward(at, layout, query)[0]).chunk(count, 2)) if count else []
    if bands.stays is not None:
        rotated.insert(bands.stays, query)
    return rotated


def _onward(at: Positions, layout: Layout, like: torch.Tensor) -> tuple[Phases, Phases]:
    """Rotations that carry the query to each other band, and that of the key that leaves the window."""

    def make() -> tuple[Phases, Phases]:
        cos, sin = (one[:, 1:].to(like.device) for one in at.memo["asked"])
        cos, sin = layout.phases(*_between(cos, sin), like.dtype)
        count = len(at.state.remapping.bands.onward)
        return (cos[:, :, :count], sin[:, :, :count]), (cos[:, :, count:], sin[:, :, count:])

    return at.once(("onward", layout.kind, like.dtype, like.device), make)


def whole_step(
    layer: LayerLayout,
    at: Positions,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
) -> Any:
    """Return what attends from a query that the model has rotated to the nearest, in one kernel, which rotates it on
    for each band and rotates the key that leaves the nearest; `None` where that is left to others."""
    parts = at.state.remapping.bands.parts
    step = one_step(query, key, value, len(parts))
    if step is None:
        return None

    def make() -> Any:
        begins = starts(parts, key.shape[2])
        fading = step_fading(parts, at.queries.to(query.device))
        return begins and step(query, key, *_band_phases(layer, at, query), begins, scaling, fading)

    like = "whole", layer.query.kind, layer.key.kind, query.shape, key.shape, query.dtype, query.device, scaling
    return at.once(like, make)


def _band_phases(layer: LayerLayout, at: Positions, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The partners (2, dim) of all channels of queries and keys, and phases (batch or 1, 2, bands + 1, dim).

    In float32; of a query for each band, and of the key that leaves the window."""
    bands = at.state.remapping.bands
    like = like.new_empty(0, dtype=torch.float32)
    onward, leaves = _onward(at, layer.query, like)[0], _onward(at, layer.key, like)[1]
    sides = []
    for side, still in enumerate((1.0, 0.0)):  # cosines, then sines
        turned = list(onward[side].unbind(2))
        if bands.stays is not None:
            rows, *_, dim = onward[side].shape
            turned.insert(bands.stays, onward[side].new_full((rows, 1, dim), still))
        chosen = [turned[number] for number in bands.query_choice]
        sides.append(torch.stack([*chosen, *(leaves[side].unbind(2) or turned[:1])], 2))
    return torch.stack([layer.query.partners, layer.key.partners]), torch.cat(sides, 1)


def leaving(bands: Bands, count: int) -> int | None:
    """Return the index of the key, of some, that the newest pushes out of the window; `None` without one."""
    return count - 1 - bands.edge if bands.edge and count > bands.edge else None


def step_keys(layout: Layout, at: Positions, key: torch.Tensor, newest: torch.Tensor) -> None:
    """Rotate, in place, the key of a new token at `newest` (rows, 1), unless the model has, and the one that it pushes
    out of the window.

    Positions are regular, so that the same columns of all rows are rotated. In a compiled step these are a tensor, and
    whether a key has come to the edge of the window yet must not be asked.
    """
    bands = at.state.remapping.bands
    last, far, gone = key.shape[2] - 1, bands.edge or 0, leaving(bands, key.shape[2])
    moves = gone is not None or (at.slot is not None and far > 0)
    if at.rotated and not moves:
        return

    def phases() -> Phases:
        steps = []
        if at.rotated:
            steps.append(_onward(at, layout, key)[1])
        elif moves:
            wanted = torch.cat([one for side in bands.crossing(newest) for one in side], -1)
            asked = phases_at(at, wanted, key)
            steps.append(layout.phases(*_between(*asked), key.dtype))
        if at.slot is not None and moves:
            there, (cos, sin) = at.slot >= far, steps[0]
            steps = [(torch.where(there, cos, 1.0), torch.where(there, sin, 0.0))]
        if not at.rotated:
            steps.append(layout.phases(*phases_at(at, mapped(newest, bands.nearest), key), key.dtype))
        cos, sin = steps[0] if len(steps) == 1 else (torch.cat(one, 2) for one in zip(*steps, strict=True))
        return cos, sin

    turn = at.once(("step", layout.kind, last, key.dtype, key.device), phases)
    if at.slot is None:
        columns = key[:, :, gone::far] if moves else key[:, :, last:]
        layout.rotate_(columns[:, :, :1] if at.rotated else columns, turn)
        return
    slots = [(at.slot - far).clamp(min=0)] * moves + [at.slot] * (not at.rotated)
    index = torch.stack(slots).to(key.device)
    key.index_copy_(2, index, layout.rotate(key.index_select(2, index), turn))


def _between(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotations from the first half of cosines and sines (batch, 2 * rotations, slots) to the other, in float32 or
    above. An attention factor, by which they are larger than 1, cancels out."""
    dtype = torch.promote_types(cos.dtype, torch.float32)
    old_cos, new_cos = cos.to(dtype).chunk(2, 1)
    old_sin, new_sin = sin.to(dtype).chunk(2, 1)
    size = (old_cos * old_cos).addcmul_(old_sin, old_sin)
    along = (new_cos * old_cos).addcmul_(new_sin, old_sin)
    across = (new_sin * old_cos).addcmul_(new_cos, old_sin, value=-1)
    return along.div_(size), across.div_(size)
