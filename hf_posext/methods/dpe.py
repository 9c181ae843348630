"""DPE: groups of tokens whose size depends on the rotary pair."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from ..errors import InvalidParameterError
from ..plan import Band, ExtensionPlan, PositionMap
from ..scheme import PositionalScheme
from .rotary import RemapMethod, near_and_far, require_one_set, window_of

SCALES = {
    "llama-3": (4, 4, 2, 16, 32, 32, 16, 128),
    "llama-3-config": (2, 8, 2, 8, 32, 32, 32, 4),
    "llama-3.1": (2, 32, 32, 2, 2, 2, 2, 1),
    "mistral": (4, 16, 2, 16, 32, 16, 16, 2),
    "qwen-2.5": (2, 16, 8, 8, 32, 8, 2, 4),
}
"""Groups that the authors found by a test with needles. Their page and their code disagree on Llama 3."""


@dataclass(frozen=True)
class DPE(RemapMethod):
    """Keep distances within the window, and count farther ones in groups of tokens sized by rotary pair.

    The pairs are cut into equal parts, fastest first. In a part of scale g, query i and key j at distance `w` or more
    get positions `i // g + w - w // g` and `j // g`. Lu et al., *Effective Length Extrapolation via Dimension-Wise
    Positional Embeddings Manipulation*, 2025. Scales are tuned to one model, and there is no default: name a table of
    the authors, or pass your own. All pairs are scaled, as in the published default.

    Args:
        table (`str`, *optional*): `llama-3` (8B, their page), `llama-3-config` (their code), `llama-3.1`, `mistral`
            or `qwen-2.5` (7B).
        scales (`Sequence[float]`, *optional*): whole numbers from 1, for as many equal parts of the pairs.
        window (`int`, *optional*): `w` in tokens; an eighth of the trained length by default, which is the 1024 of the
            published code for Llama 3.
    """

    name = "dpe"
    title = "dimension-wise positional embeddings (DPE)"
    url = "https://arxiv.org/abs/2504.18857"
    code = "https://github.com/LuLuLuyi/DPE"

    table: str | None = None
    scales: Sequence[float] | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        if self.table is not None and (self.table not in SCALES or self.scales is not None):
            raise InvalidParameterError(
                f"Expected a dpe table of {', '.join(SCALES)}, or scales, got {self.table!r} and {self.scales}."
            )
        if self.scales is not None and not (self.scales and all(one >= 1 and one == one // 1 for one in self.scales)):
            raise InvalidParameterError(f"Expected dpe scales of whole numbers from 1, got {self.scales}.")

    @classmethod
    def example(cls, scheme: PositionalScheme) -> Self:
        return cls(scales=(4, 8), window=max(1, (scheme.trained_length or 2) // 2))

    def bands(self, plan: ExtensionPlan) -> tuple[Band, ...]:
        scales = self.scales if self.table is None else SCALES[self.table]
        if scales is None:
            raise InvalidParameterError(
                "Expected dpe scales that were tuned to the model, got none. Pass scales=[...], or a table of the "
                f"authors if it is their model: table= one of {', '.join(SCALES)}."
            )
        rotary = require_one_set(self, plan)
        window = window_of(self, plan, 1 / 8)
        if rotary.pairs % len(scales):
            raise InvalidParameterError(
                f"Expected a number of dpe scales that divides {rotary.pairs} rotary pairs, got {len(scales)}."
            )
        part = rotary.pairs // len(scales)
        groups = tuple(int(scale) for scale in scales for _ in range(part)) + (1,) * (rotary.slots - rotary.pairs)
        return near_and_far(window, PositionMap(pair_groups=groups, kept=window), PositionMap(pair_groups=groups))
