"""Lengths at which the positions of a model change with the length of its input."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from dataclasses import dataclass

from ...errors import InvalidParameterError
from ...plan import ExtensionPlan
from ...scheme import PositionalScheme


@dataclass(frozen=True)
class Boundaries:
    """
    Where the positions of a model depend on the length of its input.

    Args:
        switches (`tuple[int, ...]`): lengths in tokens, ascending; longer inputs have other frequencies (LongRoPE with
            two lists: its original length).
        dynamic (`bool`): whether every length has its own (dynamic NTK).
    """

    switches: tuple[int, ...] = ()
    dynamic: bool = False

    def groups(self, lengths: list[int]) -> list[list[int]]:
        """Lengths at which a token has the same position, so that one forward over the longest tells the others."""
        if self.dynamic:
            return [[length] for length in lengths]
        return [list(group) for _, group in itertools.groupby(lengths, lambda n: bisect_left(self.switches, n))]


def boundaries_of(scheme: PositionalScheme, plan: ExtensionPlan | None) -> Boundaries:
    """
    The boundaries of a model.

    Args:
        scheme ([`PositionalScheme`]): what it came with.
        plan ([`ExtensionPlan`], *optional*): what is in force; sets of frequencies that it does not change stay.
    """
    planned = plan.rotaries if plan is not None else ()
    changed = {entry.name for entry in planned}
    shipped = [rotary for rotary in scheme.rotaries if rotary.name not in changed]
    switches = {
        int(rotary.shipped.get("original_max_position_embeddings") or scheme.trained_length or 0)
        for rotary in shipped
        if rotary.shipped_type == "longrope"
    }
    if plan is not None and any(entry.short_inv_freq is not None for entry in planned):
        switches.add(plan.trained_length)
    dynamic = any(rotary.shipped_type == "dynamic" for rotary in shipped) or (plan is not None and plan.follows_rows)
    return Boundaries(tuple(sorted(switches)), dynamic)


def check_positions(scheme: PositionalScheme, plan: ExtensionPlan | None, longest: int) -> None:
    """
    Refuse lengths past the end of a table: there is nothing to read there, and a GPU would abort.

    Raises:
        InvalidParameterError: the table, as it is or extended by the plan, is shorter than `longest`.
    """
    rows = scheme.shipped_length if plan is None or plan.changes_nothing else plan.target_length
    if scheme.ends and rows is not None and longest > rows:
        table = "learned table" if scheme.kind == "learned" else "table"
        raise InvalidParameterError(
            f"{scheme.model_type} has a {table} of {rows} positions, and {longest} tokens were asked for; "
            f"give lengths up to {rows}"
        )
