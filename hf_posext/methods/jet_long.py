"""Jet-Long: groups beyond a window that follow the length of each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import InvalidParameterError
from ..plan import Band, ExtensionPlan, PositionMap, RowGroup
from .base import register
from .remap import SAME, RemapMethod, default_window, require_window


@register
@dataclass(frozen=True)
class JetLong(RemapMethod):
    """Distances up to a window as they are, farther ones in groups that grow with the row, so that short rows stay.

    In a row of n tokens, groups have `G = ceil(n / L)` tokens, and query i and key j farther apart than the window get
    positions `i // G` and `j // G`. Without an offset, as published, distances fall from `w` to `w / G` at its edge:
    on the shipped models that is as good as any at 2 times the trained length and loses much at 4 and 8 times. With
    `offset=True`, the query gets `i // G + w - w // G` as in [`SelfExtend`], and `G = ceil((n - w) / (L - w))`. Keys
    are cached unrotated: a row that is decoded token by token past a multiple of L keeps, in deeper layers, what it
    saw in smaller groups. NVIDIA, *Jet-Long*, 2026; its code takes the longest row of a batch for all of its rows.

    Args:
        window (`int`, *optional*): `w` in tokens; a sixteenth of the trained length by default, as published, and half
            of it with an offset.
        offset (`bool`, *optional*, defaults to `False`): let distances go on where the window ends.
    """

    name: ClassVar[str] = "jet-long"
    title: ClassVar[str] = "Jet-Long"
    url: ClassVar[str] = "https://arxiv.org/abs/2607.07740"

    window: int | None = None
    offset: bool = False

    def parts(self, plan: ExtensionPlan) -> tuple[Band, ...]:
        trained = plan.trained_length
        window = default_window(plan, 1 / 2 if self.offset else 1 / 16) if self.window is None else self.window
        require_window(self, "window", window, plan)
        if not self.offset:
            grouped = PositionMap(row_group=RowGroup(span=trained))
            # the published window is that of FlashAttention, which holds `window + 1` keys
            return Band(SAME, SAME, high=window + 1), Band(grouped, grouped, low=window + 1)
        if window == trained:
            raise InvalidParameterError(f"Expected a jet-long window below {trained} (the trained length).")
        group = RowGroup(span=trained - window, beyond=window)
        far = Band(PositionMap(row_group=group, kept=window), PositionMap(row_group=group), low=window)
        return Band(SAME, SAME, high=window), far
