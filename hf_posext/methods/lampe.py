"""LaMPE: a far band whose number of positions follows the row by a logistic curve."""

import math
from dataclasses import dataclass
from typing import Literal

from ..plan import Band, ExtensionPlan, PositionMap, QueryScale, RowCurve
from .rotary import RemapMethod, near_and_far, window_of

CURVES = {
    "llama-3": (8192, 6204.409324666837, 0.00010493097327094324, -2.466638011138158),
    "llama-2": (4096, 2489.1056, 8.6730064e-5, -0.6480123),
    "llama-3.1": (131072, 82358.524, 4.5052611e-5, -2.7885769),
}
"""Trained length, and limit, slope and shift of the curve that the authors fitted to each model."""


@dataclass(frozen=True)
class LaMPE(RemapMethod):
    """Keep distances up to `head`, and squeeze farther ones into a number of positions that follows the row.

    In a row of n tokens, query i and key j farther apart than `head` get positions `floor(i r) + head - floor(head r)
    - 1` and `floor(j r)` with `r = M / (n - 1)` and `M = c / (1 + exp(-(a n + b)))`. All logits are multiplied by
    `(0.1 ln 2 + 1) ** 2`. Zhang et al., *LaMPE: Length-aware Multi-grained Positional Encoding for Adaptive
    Long-context Scaling Without Training*, 2025. Rows up to the trained length keep their positions. The published
    code maps them as well, from `2 * head` tokens on. It also counts the last 200 of the n distances one by one. This
    is left out here, because it concerns only the first tokens of a text as seen by the last ones.

    Args:
        curve (`str`, *optional*, defaults to `"llama-3"`): the model that a, b and c were fitted to: `llama-2`,
            `llama-3` or `llama-3.1`. They are scaled to the model's trained length.
        head (`int`, *optional*): in tokens; a sixteenth of the trained length by default.
    """

    name = "lampe"
    title = "LaMPE"
    url = "https://arxiv.org/abs/2508.02308"
    code = "https://github.com/scar-on/LaMPE"

    curve: Literal["llama-2", "llama-3", "llama-3.1"] = "llama-3"
    head: int | None = None

    def bands(self, plan: ExtensionPlan) -> tuple[Band, ...]:
        head = window_of(self, plan, 1 / 16, "head")
        trained, limit, slope, shift = CURVES[self.curve]
        scale = plan.trained_length / trained
        curve = RowCurve(limit=limit * scale, slope=slope / scale, shift=shift, beyond=plan.trained_length)
        return near_and_far(head + 1, PositionMap(row_curve=curve, kept=head), PositionMap(row_curve=curve))

    def query_scale(self, plan: ExtensionPlan) -> QueryScale:
        return QueryScale(length=max(plan.trained_length, 2), constant=(0.1 * math.log(2) + 1) ** 2)
