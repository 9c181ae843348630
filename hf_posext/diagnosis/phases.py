"""Rotary phases: those that training has shown, and those that a longer input needs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd
import torch

from ..methods.frequencies import powers
from ..patching.kernels import belongs, mapped
from ..plan import ExtensionPlan
from ..scheme import PositionalScheme, Rotary

QUERIES = 64
"""Queries, spread evenly over the target, whose largest relative position is taken."""

Frequencies = Mapping[str, torch.Tensor]
"""Radians per token by the name of the set, float32 of shape `(slots,)`."""


def frequency_table(scheme: PositionalScheme, in_force: Frequencies, trained_length: int) -> pd.DataFrame:
    """Return a line for each rotary pair of each set.

    Columns: `set`, `pair`, `wavelength` (tokens per turn, as trained), `turns` (within the trained length), and
    `slowed` (factor by which the shipped scaling slows the pair in an input of the shipped length; 1 without scaling).
    """
    lines = []
    for rotary in scheme.rotaries:
        trained = powers(rotary.theta, rotary).double()
        for pair, (radians, now) in enumerate(zip(trained.tolist(), in_force[rotary.name].tolist(), strict=False)):
            wavelength = 2 * math.pi / radians
            lines.append(
                {
                    "set": rotary.name,
                    "pair": pair,
                    "wavelength": wavelength,
                    "turns": trained_length / wavelength,
                    "slowed": radians / now if now else math.inf,
                }
            )
    return pd.DataFrame(lines)


def critical_dimension(rotary: Rotary, trained_length: int) -> int:
    """Return the number of channels of a head that make a turn within the trained length.

    `2 ceil(d / 2 log_theta(L / 2 pi))` of Liu et al., *Scaling Laws of RoPE-based Extrapolation*, 2023. Training does
    not show all phases of the other channels.
    """
    if trained_length <= 2 * math.pi:
        return 0
    pairs = math.ceil(rotary.dim / 2 * math.log(trained_length / (2 * math.pi)) / math.log(rotary.theta))
    return 2 * min(pairs, rotary.pairs)


def phase_table(
    scheme: PositionalScheme,
    in_force: Frequencies,
    plans: Mapping[str, ExtensionPlan | None],
    trained_length: int,
    target_length: int,
) -> pd.DataFrame:
    """Return the phases that a text of the target length needs, a line for each plan, set and pair.

    Columns: `method`, `set`, `pair`, `turns` (between the two tokens farthest apart), `new` (whether training has not
    shown that phase: it is past the phase of the trained length, and the trained phases are less than a turn).

    Args:
        scheme (`PositionalScheme`): rotary.
        in_force (`Mapping[str, torch.Tensor]`): frequencies of the model as it is.
        plans (`Mapping[str, ExtensionPlan | None]`): plans by name; `None` is the model as it is.
        trained_length (`int`): tokens.
        target_length (`int`): tokens.
    """
    lines = []
    for method, plan in plans.items():
        by_pair = plan is not None and any(part.query.by_pair for part in plan.bands)
        for rotary in scheme.rotaries:
            farthest = [
                target_length - 1 if plan is None else farthest_position(plan, target_length, pair)
                for pair in range(rotary.pairs if by_pair else 1)
            ]
            reach = torch.tensor(farthest, dtype=torch.float64).clamp(max=(rotary.window or target_length) - 1)
            radians = planned_frequencies(rotary, in_force, plan, target_length)[: rotary.pairs].double()
            phases = radians * reach
            new = is_new(phases, powers(rotary.theta, rotary).double() * trained_length)
            for pair, (turns, unseen) in enumerate(zip((phases / (2 * math.pi)).tolist(), new.tolist(), strict=True)):
                lines.append({"method": method, "set": rotary.name, "pair": pair, "turns": turns, "new": unseen})
    return pd.DataFrame(lines)


def is_new(phases: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """Return whether training has not shown a phase: past all trained phases, which are less than a turn.

    Args:
        phases (`torch.Tensor`): radians.
        shown (`torch.Tensor`): radians of the same pairs at the trained length.
    """
    return (phases > shown) & (shown < 2 * math.pi)


def planned_frequencies(
    rotary: Rotary, in_force: Frequencies, plan: ExtensionPlan | None, length: int
) -> torch.Tensor:
    """Return the radians per token of one set in an input of `length` tokens, float32 of shape `(slots,)`."""
    entry = None if plan is None else next((entry for entry in plan.rotaries if entry.name == rotary.name), None)
    if plan is None or entry is None:
        return in_force[rotary.name]
    if entry.growth is None:
        return torch.tensor(entry.inv_freq)
    scale = max(1.0, length / plan.trained_length)
    moving, power, kept = (
        torch.tensor(numbers) for numbers in (entry.growth.moving, entry.growth.power, entry.growth.kept)
    )
    return moving * scale**-power + kept


def relative_positions(
    plan: ExtensionPlan | None, queries: torch.Tensor, keys: torch.Tensor, pair: int = 0
) -> torch.Tensor:
    """Return the relative position of each query and key under a plan, in tokens; float64 of shape `(queries, keys)`.

    NaN where the query does not attend to the key: the key comes later, or no band of the plan contains the pair of
    tokens. If rotary pairs have positions of their own, those of rotary pair `pair`: the fastest by default.
    """
    apart = (queries[:, None] - keys[None]).double()
    relative = apart.clone() if plan is None or not plan.bands else torch.full_like(apart, math.nan)
    row = queries.max() + 1
    for part in plan.bands if plan is not None else ():
        sides = ((queries, part.query), (keys, part.key))
        moves = [mapped(side, rule.of_pair(pair) if rule.by_pair else rule, row) for side, rule in sides]
        moved = moves[0].double()[:, None] - moves[1].double()[None]
        relative = torch.where(belongs(part, queries, keys), moved, relative)
    return relative.masked_fill(apart < 0, math.nan)


def farthest_position(plan: ExtensionPlan, length: int, pair: int = 0) -> float:
    """Return the largest relative position that a plan gives to any two tokens of a text, in a rotary pair."""
    # The keys that a query has in a band are adjacent, and their positions grow except where they begin anew
    # (`modulo`). The farthest is therefore the first of them, or the first one after such a beginning.
    queries = torch.linspace(0, length - 1, min(QUERIES, length), dtype=torch.float64).round().long()
    keys = torch.zeros(1, dtype=torch.long)
    for part in plan.bands:
        chunks = 0 * queries if part.high is None else (queries // part.chunk - part.high + 1).clamp(min=0)
        first, step = chunks * part.chunk, part.key.modulo or 1
        keys = torch.cat([keys, first, (first + step - 1) // step * step])
    apart = relative_positions(plan, queries, keys, pair)
    return float(apart.nan_to_num(0.0).max())
