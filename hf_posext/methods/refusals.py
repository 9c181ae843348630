"""Methods that do not apply to a model, grouped by the reason."""

from __future__ import annotations

from collections.abc import Mapping


def by_reason(refusals: Mapping[str, str | None]) -> dict[str, list[str]]:
    """
    Group methods that share a reason.

    Args:
        refusals (`Mapping[str, str | None]`): reason of each method, `None` for one that applies.

    Returns:
        `dict[str, list[str]]`: names under each reason. A reason that begins with the name of its method is stated
        without it, and methods that apply are under `""`.
    """
    groups: dict[str, list[str]] = {"": []}
    for label, reason in refusals.items():
        first, _, rest = (reason or "").partition(" ")
        groups.setdefault(rest if first in label else str(reason), []).append(label)
    return {reason: names for reason, names in groups.items() if names}
