"""What a step of decoding turns: the query, on to where other parts see it, and the key that leaves the window.

The model itself turns query and key of the token, to where keys see the nearest pairs, by the phases that its rotary
module gives it. Those of all that is left are found in the same call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..kernels import mapped, one_step, starts, step_fading
from .layout import LayerLayout, Layout, Phases
from .positions import Positions, key_map

if TYPE_CHECKING:
    from .state import LateRotation


def step_positions(late: LateRotation, at: Positions) -> torch.Tensor:
    """All positions (batch or 1, 1 + turns + turns) of which a step asks its rotary module: the nearest, which is for
    the model; then from where each of the turns goes, and then to where.

    The query is turned on for each other part, and the key over the border. Not by phases at the distance between: a
    module rounds angles to float32, so that these would be another turn at far positions.
    """
    newest = at.queries
    nearest, *others = (mapped(newest, rule) for rule in (late.nearest, *late.onward))
    within, behind = _crossing(late, newest)
    return torch.cat([nearest, *[nearest] * len(others), *within, *others, *behind], -1)


def step_queries(late: LateRotation, layout: Layout, at: Positions, query: torch.Tensor) -> list[torch.Tensor]:
    """A query (batch, heads, 1, dim) under each of the maps, as the model has turned it to the nearest."""
    count = len(late.onward)
    turned = list(layout.rotate(query, _onward(late, at, layout, query)[0]).chunk(count, 2)) if count else []
    if late.stays is not None:
        turned.insert(late.stays, query)
    return turned


def _onward(late: LateRotation, at: Positions, layout: Layout, like: torch.Tensor) -> tuple[Phases, Phases]:
    """How the query is turned on for each other part, and the key at the border; for states like some."""

    def make() -> tuple[Phases, Phases]:
        cos, sin = (one[:, 1:].to(like.device) for one in at.memo["asked"])
        cos, sin = layout.phases(*_between(cos, sin), like.dtype)
        count = len(late.onward)
        return (cos[:, :, :count], sin[:, :, :count]), (cos[:, :, count:], sin[:, :, count:])

    return at.once(("onward", layout.kind, like.dtype, like.device), make)


def whole_step(
    late: LateRotation,
    layer: LayerLayout,
    at: Positions,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
) -> Any:
    """What attends from a query that the model has turned to the nearest, in one kernel, which turns it on for each
    part and turns the key that leaves the nearest; `None` where that is left to others."""
    parts = late.plan.parts
    step = one_step(query, key, value, len(parts))
    if step is None:
        return None

    def make() -> Any:
        begins = starts(parts, key.shape[2])
        fading = step_fading(parts, at.queries.to(query.device))
        return begins and step(query, key, *_turns_of_parts(late, layer, at, query), begins, scaling, fading)

    like = "whole", layer.query.kind, layer.key.kind, query.shape, key.shape, query.dtype, query.device, scaling
    return at.once(like, make)


def _turns_of_parts(
    late: LateRotation, layer: LayerLayout, at: Positions, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The partners (2, dim) of all channels of queries and keys, and phases (batch or 1, 2, parts + 1, dim) in float32
    of the turns of a query for each part, and of the key at the border."""
    like = like.new_empty(0, dtype=torch.float32)
    onward, border = _onward(late, at, layer.query, like)[0], _onward(late, at, layer.key, like)[1]
    sides = []
    for side, still in enumerate((1.0, 0.0)):  # cosines, then sines
        turns = list(onward[side].unbind(2))
        if late.stays is not None:
            rows, *_, dim = onward[side].shape
            turns.insert(late.stays, onward[side].new_full((rows, 1, dim), still))
        chosen = [turns[number] for number in late.query_maps[1]]
        sides.append(torch.stack([*chosen, *(border[side].unbind(2) or turns[:1])], 2))
    return torch.stack([layer.query.partners, layer.key.partners]), torch.cat(sides, 1)


def leaving(late: LateRotation, count: int) -> int:
    """Which of some keys the newest pushes over the border; -1 for none."""
    return max(count - 1 - late.border, -1) if late.border else -1


def step_keys(late: LateRotation, layout: Layout, at: Positions, key: torch.Tensor, newest: torch.Tensor) -> None:
    """Turn, in place, the key of a new token at `newest` (rows, 1), unless the model has, and the one that it pushes
    over the border.

    Positions are regular, so that the same columns of all rows are turned. In a compiled step these are a tensor, and
    whether a key has come to the border yet must not be asked.
    """
    last, far, gone = key.shape[2] - 1, late.border or 0, leaving(late, key.shape[2])
    moves = gone >= 0 or (at.slot is not None and far > 0)
    if at.turned and not moves:
        return

    def phases() -> Phases:
        turns = []
        if at.turned:
            turns.append(_onward(late, at, layout, key)[1])
        elif moves:
            asked = late.phases(at, torch.cat([one for side in _crossing(late, newest) for one in side], -1), key)
            turns.append(layout.phases(*_between(*asked), key.dtype))
        if at.slot is not None and moves:
            there, (cos, sin) = at.slot >= far, turns[0]
            turns = [(torch.where(there, cos, 1.0), torch.where(there, sin, 0.0))]
        if not at.turned:
            turns.append(layout.phases(*late.phases(at, mapped(newest, late.nearest), key), key.dtype))
        cos, sin = turns[0] if len(turns) == 1 else (torch.cat(one, 2) for one in zip(*turns, strict=True))
        return cos, sin

    turn = at.once(("step", layout.kind, last, key.dtype, key.device), phases)
    if at.slot is None:
        columns = key[:, :, gone::far] if moves else key[:, :, last:]
        layout.rotate_(columns[:, :, :1] if at.turned else columns, turn)
        return
    slots = [(at.slot - far).clamp(min=0)] * moves + [at.slot] * (not at.turned)
    index = torch.stack(slots).to(key.device)
    key.index_copy_(2, index, layout.rotate(key.index_select(2, index), turn))


def _crossing(late: LateRotation, newest: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Where the key is turned within the border, and where behind it, which the token at `newest` pushes over it."""
    if not late.border:
        return [], []
    there = (newest - late.border).clamp(min=0)
    within, behind = (mapped(there, key_map(late.plan.parts, late.border - near)) for near in (1, 0))
    return [within], [behind]


def _between(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The turns from the first half of cosines and sines (batch, turns + turns, slots) to the other: in float32 or
    above; an attention factor, by which they are larger than 1, cancels out."""
    dtype = torch.promote_types(cos.dtype, torch.float32)
    old_cos, new_cos = cos.to(dtype).chunk(2, 1)
    old_sin, new_sin = sin.to(dtype).chunk(2, 1)
    size = (old_cos * old_cos).addcmul_(old_sin, old_sin)
    along = (new_cos * old_cos).addcmul_(new_sin, old_sin)
    across = (new_sin * old_cos).addcmul_(new_cos, old_sin, value=-1)
    return along.div_(size), across.div_(size)
