"""Results in words: one sentence per method, computed from its rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..evaluation.protocols.protocol import is_legacy
from .markdown import code, inline
from .tables import Row, by_method, control_rows, finite_interval, format_interval, format_perplexity, legacy_mark

if TYPE_CHECKING:
    from ..evaluation import Results

# A quarter more perplexity than at the shortest length (against the control, or by itself where there is none) is
# what these sentences call broken: past it the curves of all methods that we measured rise steeply.
TOLERANCE = 1.25


def describe_methods(results: Results) -> list[str]:
    """One sentence for each method: how far it holds, what that costs, whether the longer context pays, passkeys.

    Args:
        results ([`~hf_posext.evaluation.Results`]): rows of one comparison.
    """
    methods = by_method(results)
    control = control_rows(results)
    trained_length = results.provenance.get("trained_length") or 0
    mark = inline(legacy_mark(results))
    return [
        f"{code(name)} {f'{mark} ' if mark else ''}{_describe(name, rows, control, trained_length)}."
        for name, rows in methods.items()
    ]


def _describe(name: str, rows: Mapping[int, Row], control: Mapping[int, Row], trained_length: int) -> str:
    parts = [_reach(rows, control)]
    inside = [row for length, row in rows.items() if length <= trained_length and row.get("change") is not None]
    if inside and name != "none":
        parts.append(_inside(inside[-1]))
    longest = rows[max(rows)]
    if longest.get("gain") is not None:
        parts.append(_against_truncation(longest))
    if longest.get("passkey") is not None:
        parts.append(f"it retrieves {100 * longest['passkey']:.0f} % of the passkeys there")
    return "; ".join(parts)


def _levels(rows: Mapping[int, Row], control: Mapping[int, Row]) -> dict[int, float]:
    """Tail perplexity by length, divided by the control's where all lengths have one, since text gets easier."""
    tails = {length: row["perplexity_tail"] for length, row in rows.items() if row.get("perplexity_tail") is not None}
    if all(length in control for length in tails):
        return {length: tail / control[length]["perplexity_truncated_tail"] for length, tail in tails.items()}
    return tails


def _reach(rows: Mapping[int, Row], control: Mapping[int, Row]) -> str:
    levels = _levels(rows, control)
    if not levels:
        return "gave no finite perplexity"
    lengths = list(levels)
    first, longest = lengths[0], lengths[-1]
    broken = next((length for length in lengths if levels[length] > TOLERANCE * levels[first]), None)
    at_first = format_perplexity(rows[first]["perplexity_tail"])
    what = "perplexity" if is_legacy(rows[first]["protocol"]) else "tail perplexity"
    if broken is None:
        at_longest = format_perplexity(rows[longest]["perplexity_tail"])
        span = f"to {longest} tokens ({what} {at_first} at {first}, {at_longest} at {longest})"
        return f"keeps its perplexity level {span if len(lengths) > 1 else f'at {first} tokens ({at_first})'}"
    held = lengths[lengths.index(broken) - 1]
    at_broken = format_perplexity(rows[broken]["perplexity_tail"])
    figures = f"({what} {at_first} at {first}, {at_broken} there)"
    return f"holds up to {held} tokens and breaks by {broken} {figures}"


def _inside(row: Row) -> str:
    """What the extension costs where the model needed none."""
    change = row["change"]
    interval = finite_interval(row, "change_ci95")
    span = "" if interval is None else f" [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"
    verb = "costs" if change >= 0 else "saves"
    return f"inside the trained length, at {row['length']}, it {verb} {100 * abs(change):.0f} %{span} of perplexity"


def _against_truncation(row: Row) -> str:
    gain, interval = row["gain"], finite_interval(row, "gain_ci95")
    figures = f"(gain {gain:.2f}{format_interval(interval)})"
    length = row["length"]
    if interval is not None and interval[0] <= 1 <= interval[1]:
        return f"at {length} it is level with truncation {figures}"
    if gain < 0.5:
        return f"at {length} its perplexity is {1 / gain if gain else math.inf:.1f} times that of truncation {figures}"
    verb, share = ("loses", 1 - gain) if gain < 1 else ("gains", gain - 1)
    return f"at {length} it {verb} {100 * share:.0f} % {'to' if gain < 1 else 'over'} truncation {figures}"
