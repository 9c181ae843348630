"""Jet-Long: groups beyond a window whose size follows the length of each row."""

from dataclasses import dataclass

from ..errors import InvalidParameterError
from ..plan import Band, ExtensionPlan, PositionMap, QueryScale, RowGroup
from .rotary import RemapMethod, near_and_far, padded, require_one_set, require_pairs, window_of
from .yarn import YaRN


@dataclass(frozen=True)
class JetLong(RemapMethod):
    """Keep distances within a window, and count farther ones in groups that grow with the row.

    In a row of n tokens, groups have `G = ceil(n / L)` tokens, and query i and key j farther apart than the window get
    positions `i // G` and `j // G`. Without an offset, as published, distances fall from `w` to `w / G` at its edge:
    on the shipped models this matches the best at 2 times the trained length and loses much at 4 and 8 times. With
    `offset=True`, the query gets `i // G + w - w // G` as in [`SelfExtend`], and `G = ceil((n - w) / (L - w))`. Keys
    are cached unrotated: a row that is decoded token by token past a multiple of L keeps, in deeper layers, hidden
    states from smaller groups. NVIDIA, *Jet-Long*, 2026; its code takes the longest row of a batch for all of its
    rows.

    `frequencies=True` is its other variant: pair p sees distance d as `w + (d - w) (1 - r_p (1 - 1 / s))`, with the
    ramp r of [`YaRN`] from 0 to 1 and `s = max(1, (n - w) / (L - w))`. All logits are multiplied by `0.1 ln s + 1`.

    Args:
        window (`int`, *optional*): `w` in tokens; a sixteenth of the trained length by default, as published, and half
            of it with an offset.
        offset (`bool`, *optional*, defaults to `False`): continue distances where the window ends.
        frequencies (`bool`, *optional*, defaults to `False`): slow the pairs instead of grouping tokens.
    """

    name = "jet-long"
    title = "Jet-Long"
    url = "https://arxiv.org/abs/2607.07740"
    code = "https://github.com/jet-ai-projects/Jet-Long"

    window: int | None = None
    offset: bool = False
    frequencies: bool = False

    def __post_init__(self) -> None:
        if self.offset and self.frequencies:
            raise InvalidParameterError("Expected jet-long with offset or with frequencies, got both.")

    def bands(self, plan: ExtensionPlan) -> tuple[Band, ...]:
        trained = plan.trained_length
        window = window_of(self, plan, 1 / 2 if self.offset else 1 / 16)
        if window == trained and (self.offset or self.frequencies):
            raise InvalidParameterError(f"Expected a jet-long window below {trained} (the trained length).")
        beyond = RowGroup(span=trained - window, beyond=window)
        if self.frequencies:
            rotary = require_one_set(self, plan)
            require_pairs(self, rotary)
            shares = padded(rotary, YaRN().ramp(rotary, trained, truncate=True))
            query, key = (PositionMap(row_group=beyond, pair_shares=shares, kept=kept) for kept in (window, 0))
            return near_and_far(window + 1, query, key)
        if not self.offset:
            grouped = PositionMap(row_group=RowGroup(span=trained))
            # the published window is that of FlashAttention, which contains `window + 1` keys
            return near_and_far(window + 1, grouped, grouped)
        return near_and_far(window, PositionMap(row_group=beyond, kept=window), PositionMap(row_group=beyond))

    def query_scale(self, plan: ExtensionPlan) -> QueryScale | None:
        if not self.frequencies:
            return None
        row = self.bands(plan)[1].query.row_group
        return QueryScale(length=max(plan.trained_length, 2), temperature=0.1, row=row)
