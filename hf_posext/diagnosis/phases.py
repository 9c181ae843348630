"""What rotary phases training has shown, and which ones a longer input asks for."""

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
"""Queries, evenly over the target, of which the largest relative position is taken."""

Frequencies = Mapping[str, torch.Tensor]
"""Radians per token by the name of the set, float32 of shape `(slots,)`."""


def frequency_table(scheme: PositionalScheme, in_force: Frequencies, trained_length: int) -> pd.DataFrame:
    """A line for each rotary pair of each set.

    Columns: `set`, `pair`, `wavelength` (tokens for a turn, as trained), `turns` (within the trained length), and
    `slowed` (by how much the shipped scaling slows the pair in an input of the shipped length; 1 without any).
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
    """How many channels of a head make a whole turn within the trained length: `2 ceil(d / 2 log_theta(L / 2 pi))`.

    Liu et al., *Scaling Laws of RoPE-based Extrapolation*, 2023. All phases of the others are not seen in training.
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
    """Which phases a text of the target length needs, a line for each plan, set and pair.

    Columns: `method`, `set`, `pair`, `turns` (that the farthest pair of tokens is apart), `new` (whether that is more
    than training has shown: past the phase of the trained length, and not a whole turn).

    Args:
        scheme (`PositionalScheme`): rotary.
        in_force (`Mapping`): frequencies of the model as it is.
        plans (`Mapping[str, ExtensionPlan or None]`): by what they shall be called; `None` is the model as it is.
        trained_length (`int`): tokens.
        target_length (`int`): tokens.
    """
    lines = []
    for method, plan in plans.items():
        by_pair = plan is not None and any(part.query.by_pair for part in plan.parts)
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
    """Whether training has shown nothing of a phase: past all it has shown, where that is less than a turn.

    Args:
        phases (`torch.Tensor`): radians.
        shown (`torch.Tensor`): radians of the trained length, of the same pairs.
    """
    return (phases > shown) & (shown < 2 * math.pi)


def planned_frequencies(
    rotary: Rotary, in_force: Frequencies, plan: ExtensionPlan | None, length: int
) -> torch.Tensor:
    """Radians per token of one set in an input of `length` tokens, float32 of shape `(slots,)`."""
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
    """Return how many tokens apart a plan makes each pair of query and key; float64 of shape `(queries, keys)`.

    NaN where the query does not attend to the key: it comes later, or no part of the plan has the pair. Where rotary
    pairs have positions of their own, those of one of them: the fastest by default.
    """
    apart = (queries[:, None] - keys[None]).double()
    wanted = apart.clone() if plan is None or not plan.parts else torch.full_like(apart, math.nan)
    row = queries.max() + 1
    for part in plan.parts if plan is not None else ():
        sides = ((queries, part.query), (keys, part.key))
        moves = [mapped(side, rule.of_pair(pair) if rule.by_pair else rule, row) for side, rule in sides]
        moved = moves[0].double()[:, None] - moves[1].double()[None]
        wanted = torch.where(belongs(part, queries, keys), moved, wanted)
    return wanted.masked_fill(apart < 0, math.nan)


def farthest_position(plan: ExtensionPlan, length: int, pair: int = 0) -> float:
    """Return the largest relative position that a plan gives to any pair of a text, in a rotary pair.

    The keys that a query has in a part lie side by side, and their positions grow but where they begin anew
    (`modulo`): the farthest is the first of them, or the first after that. No other keys are looked at.
    """
    queries = torch.linspace(0, length - 1, min(QUERIES, length), dtype=torch.float64).round().long()
    keys = torch.zeros(1, dtype=torch.long)
    for part in plan.parts:
        chunks = 0 * queries if part.high is None else (queries // part.chunk - part.high + 1).clamp(min=0)
        first, step = chunks * part.chunk, part.key.modulo or 1
        keys = torch.cat([keys, first, (first + step - 1) // step * step])
    apart = relative_positions(plan, queries, keys, pair)
    return float(apart.nan_to_num(0.0).max())
