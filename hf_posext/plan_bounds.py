"""What a plan may ask for: it comes from a file, which anyone may have written."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .decode import MAX_NUMBER, short
from .errors import PlanError
from .scheme import GENERALIZATION

if TYPE_CHECKING:
    from .plan import ExtensionPlan, Part

MAX_TABLE_ROWS = 2**24
"""Longest table of positions that a plan may ask for: its rows are made when the plan is applied."""
MAX_TABLE_BYTES = 2**31
"""Largest table of positions that a plan may ask for, at 4 bytes a number."""
MAX_PARTS = 64
"""Each part is one more pass over keys in every attention layer; no method here has more than a handful."""


def check_bounds(plan: ExtensionPlan) -> None:
    """Refuse numbers that no method can have meant.

    Raises:
        PlanError: says which.
    """
    if plan.scheme.kind not in GENERALIZATION:
        raise PlanError(f"plan.scheme.kind is {short(plan.scheme.kind)}; there are: {', '.join(GENERALIZATION)}")
    sizes = {"factor": plan.factor, "original_length": plan.original_length, "target_length": plan.target_length}
    for name, number in sizes.items():
        whole = isinstance(number, int) or name == "factor"
        if not whole or not math.isfinite(number) or number > MAX_NUMBER:
            raise PlanError(
                f"plan.{name} is {short(number)}; a {'number' if name == 'factor' else 'whole number'} of at most "
                f"{MAX_NUMBER} belongs there"
            )
    if not (plan.factor > 0 and 1 <= plan.original_length <= plan.target_length):
        raise PlanError(
            f"plan goes from {plan.original_length} to {plan.target_length} tokens by factor {plan.factor:g}; "
            "lengths grow from 1 or more"
        )
    if abs(plan.original_length * plan.factor - plan.target_length) > 1:
        raise PlanError(
            f"plan has factor {plan.factor:g}, but goes from {plan.original_length} to {plan.target_length} tokens"
        )
    if (plan.table or plan.sinusoids) and plan.target_length > MAX_TABLE_ROWS:
        raise PlanError(f"plan has a table of {plan.target_length} positions; at most {MAX_TABLE_ROWS} are made")
    if len(plan.parts) > MAX_PARTS:
        raise PlanError(f"plan has {len(plan.parts)} parts; at most {MAX_PARTS} are possible")
    sets = {rotary.name: rotary for rotary in plan.scheme.rotaries}
    for entry in plan.rotaries:
        if entry.name not in sets:
            raise PlanError(f"plan changes frequencies {short(entry.name)!r}, which its own scheme does not have")
        for numbers in filter(None, (entry.inv_freq, entry.short_inv_freq)):
            if len(numbers) != sets[entry.name].slots:
                raise PlanError(
                    f"plan has {len(numbers)} frequencies for {entry.name!r}; its scheme has {sets[entry.name].slots}"
                )
            if not all(0 <= number <= 2 * math.pi for number in numbers):
                raise PlanError(f"plan has frequencies {min(numbers)} to {max(numbers)}; 0 to 2 pi is possible")
        grown = (entry.growth.moving, entry.growth.power, entry.growth.kept) if entry.growth else ()
        if any(len(numbers) != sets[entry.name].slots for numbers in grown):
            raise PlanError(f"plan has a growth of another width than the frequencies of {entry.name!r}")
        if entry.attention_factor <= 0:
            raise PlanError(f"plan has attention_factor {entry.attention_factor}; a number above 0 belongs there")
    for part in plan.parts:
        divisors = (part.chunk, *(m for p in (part.query, part.key) for m in (p.group, p.modulo or 1)))
        if min(divisors) < 1:
            raise PlanError(f"plan has a part with chunk, group or modulo {min(divisors)}; 1 or more belongs there")
        _check_fading(part)
    if plan.query_scale is not None and plan.query_scale.length < 2:
        raise PlanError(f"plan scales queries from length {plan.query_scale.length}; 2 or more belongs there")
    _check_other_schemes(plan)


def _check_fading(part: Part) -> None:
    """As `check_bounds`, for what is taken from the logits of a part."""
    fade, decay = part.fade, part.decay
    if fade is not None and not (fade.strength > 0 and fade.reference >= 1 and part.is_far):
        raise PlanError(
            f"plan fades a part by strength {fade.strength:g} from {fade.reference} keys on; a strength above 0, 1 "
            "key or more, and a part of all farther keys belong there"
        )
    if decay is not None and not (decay.strength > 0 and decay.start >= 1 and part.is_far and part.chunk == 1):
        raise PlanError(
            f"plan lets a part decay by strength {decay.strength:g} from distance {decay.start} on; a strength above "
            "0, 1 token or more, and a part of all farther keys, not of chunks, belong there"
        )


def _check_other_schemes(plan: ExtensionPlan) -> None:
    """As `check_bounds`, for what is not rotary."""
    table, buckets = plan.table, plan.buckets
    if table is not None:
        check_table_size(plan.target_length, plan.scheme.table.width if plan.scheme.table else 1)
        usable = plan.scheme.table.usable if plan.scheme.table else 0
        if plan.original_length > usable:
            raise PlanError(f"plan stretches {plan.original_length} rows of a table that has {usable}")
        if table.interpolation not in ("linear", "cubic") or not 0 <= table.alpha < 1:
            raise PlanError(
                f"plan interpolates a table by {short(table.interpolation)!r} with alpha {table.alpha:g}; "
                "'linear' or 'cubic', and 0 <= alpha < 1 are possible"
            )
    maps = (table and table.position, table and table.coarse, plan.sinusoids)
    if any(min(entry.group, entry.modulo or 1) < 1 for entry in maps if entry):
        raise PlanError("plan maps positions by a group or modulo below 1")
    if plan.slopes and (len(plan.slopes) != len(plan.scheme.slopes) or min(plan.slopes) < 0):
        raise PlanError(
            f"plan has {len(plan.slopes)} slopes, the least {min(plan.slopes):g}; its scheme has "
            f"{len(plan.scheme.slopes)} heads, and slopes are not below 0"
        )
    if buckets is not None:
        shipped = plan.scheme.buckets.max_distance if plan.scheme.buckets else MAX_NUMBER
        if buckets.factor <= 0 or (buckets.max_distance or shipped) < shipped or plan.scheme.buckets is None:
            raise PlanError(
                f"plan divides distances by {buckets.factor:g} and has buckets up to {buckets.max_distance}; a "
                f"number above 0, and the {shipped} of its scheme or more are possible"
            )


def check_table_size(rows: int, width: int, count: int = 1) -> None:
    """Refuse a table that would not fit into memory, before it is made.

    Args:
        rows (`int`): of the table.
        width (`int`): numbers in a row.
        count (`int`, *optional*, defaults to 1): tables of this size.

    Raises:
        PlanError: with the most positions that are possible.
    """
    if rows * width * count * 4 > MAX_TABLE_BYTES:
        raise PlanError(
            f"a table of {rows} positions x {width} numbers has {rows * width * count * 4} bytes; at most "
            f"{MAX_TABLE_BYTES} are made, which is {MAX_TABLE_BYTES // (4 * width * count)} positions: "
            "pass a smaller factor or target_length"
        )
