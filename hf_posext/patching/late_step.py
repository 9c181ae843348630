"""What a step of decoding turns: the query, on to where other parts see it, and the key that leaves the window.

The model itself turns query and key of the token, to where keys see the nearest pairs, by the phases that its rotary
module gives it. Those of all that is left are found in the same call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .banded_attention import mapped
from .late_positions import Positions, key_map
from .rotary_layout import Layout, Phases

if TYPE_CHECKING:
    from .late_state import LateRotation


def step_positions(late: LateRotation, at: Positions) -> torch.Tensor:
    """All positions (batch or 1, turns) of which a step asks its rotary module: the nearest, which is for the model,
    and how far from it each other part sees the query, and from where it stood the key behind the border.

    To turn on by a distance is to turn from one position to the other.
    """
    newest = at.queries
    nearest = mapped(newest, late.nearest)
    others = [mapped(newest, rule) - nearest for rule in late.onward]
    return torch.cat([nearest, *others, *_crossing(late, newest)], -1)


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
        cos, sin = distance_phases(late, at, layout, like, at.memo["asked"])
        count = len(late.onward)
        return (cos[:, :, :count], sin[:, :, :count]), (cos[:, :, count:], sin[:, :, count:])

    return at.once(("onward", layout.kind, like.dtype, like.device), make)


def distance_phases(
    late: LateRotation, at: Positions, layout: Layout, like: torch.Tensor, phases: tuple[torch.Tensor, torch.Tensor]
) -> Phases:
    """What turns states like some on, from a rotary module's cosine and sine at distances; states have its attention
    factor already."""
    site = late.sites[at.name]
    factor = getattr(site.module, f"{site.prefix}attention_scaling", 1.0)
    cos, sin = (one.to(like.device) for one in phases)
    if factor != 1:
        cos, sin = cos / factor, sin / factor
    return layout.phases(cos, sin, like.dtype)


def step_keys(late: LateRotation, layout: Layout, at: Positions, key: torch.Tensor, newest: torch.Tensor) -> None:
    """Turn, in place, the key of a new token at `newest` (rows, 1), unless the model has, and the one that it pushes
    over the border.

    Positions are regular, so that the same columns of all rows are turned. In a compiled step these are a tensor, and
    whether a key has come to the border yet must not be asked.
    """
    last, far = key.shape[2] - 1, late.border or 0
    moves = far > 0 and (at.slot is not None or far <= last)
    if at.turned and not moves:
        return

    def phases() -> Phases:
        turns = []
        if at.turned:
            turns.append(_onward(late, at, layout, key)[1])
        elif moves:
            (distance,) = _crossing(late, newest)
            turns.append(distance_phases(late, at, layout, key, late.phases(at, distance, key)))
        if at.slot is not None and moves:
            there, (cos, sin) = at.slot >= far, turns[0]
            turns = [(torch.where(there, cos, 1.0), torch.where(there, sin, 0.0))]
        if not at.turned:
            turns.append(layout.phases(*late.phases(at, mapped(newest, late.nearest), key), key.dtype))
        cos, sin = turns[0] if len(turns) == 1 else (torch.cat(one, 2) for one in zip(*turns, strict=True))
        return cos, sin

    turn = at.once(("step", layout.kind, last, key.dtype, key.device), phases)
    if at.slot is None:
        columns = key[:, :, last - far :: far] if moves else key[:, :, last:]
        layout.rotate_(columns[:, :, :1] if at.turned else columns, turn)
        return
    slots = [(at.slot - far).clamp(min=0)] * moves + [at.slot] * (not at.turned)
    index = torch.stack(slots).to(key.device)
    key.index_copy_(2, index, layout.rotate(key.index_select(2, index), turn))


def _crossing(late: LateRotation, newest: torch.Tensor) -> list[torch.Tensor]:
    """How far the key is turned on that the token at `newest` pushes over the border, if there is one."""
    if not late.border:
        return []
    there = (newest - late.border).clamp(min=0)
    within, behind = (mapped(there, key_map(late.plan.parts, late.border - near)) for near in (1, 0))
    return [behind - within]
