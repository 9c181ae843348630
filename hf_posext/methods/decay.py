"""Logarithmic decay: far keys of a remapping method weigh less, the farther they are."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from ..errors import InvalidParameterError
from ..plan import DistanceDecay, ExtensionPlan
from ..scheme import PositionalScheme
from .base import Method, register
from .leaky_rerope import LeakyReRoPE
from .remap import require_far_band


@register
@dataclass(frozen=True)
class Decay(Method):
    """Logits of far keys fall with the logarithm of distance, on top of a remapping method: `"leaky-rerope+decay"`.

    A key at distance d loses `strength * ln(max(1, d / start))`, rounded to octaves: all distances from
    `start * 2 ** k` to twice as far lose `strength * ln(2) * (k + 1/2)`, so that every kernel computes the same. That
    is at most `0.35 * strength` off. Not for dual-chunk, whose far band begins at no fixed distance. The shape is that
    of KERPLE's logarithmic bias (Chi et al., *KERPLE: Kernelized Relative Positional Embedding for Length
    Extrapolation*, 2022), which is trained. See docs/fading.md.

    Args:
        strength (`float`, *optional*, defaults to 1): above 0.
        start (`int`, *optional*): first distance that loses, in tokens, no less than the window of the remapping
            method. The trained length by default, so that nothing changes inside it.
    """

    name: ClassVar[str] = "decay"
    title: ClassVar[str] = "logarithmic decay"
    url: ClassVar[str] = "https://arxiv.org/abs/2205.09921"
    kinds: ClassVar[tuple[str, ...]] = ("rotary",)
    needs_factor: ClassVar[bool] = False

    strength: float = 1.0
    start: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.strength < math.inf:
            raise InvalidParameterError(f"Expected a decay strength above 0, got {self.strength}.")

    @classmethod
    def example(cls, scheme: PositionalScheme) -> Method:
        return LeakyReRoPE() + cls()

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        far = require_far_band(self, plan)
        if far.chunk > 1:
            raise InvalidParameterError(
                f"Expected a far band that begins at a distance, got the chunks of {plan.method}. Pass fade instead."
            )
        if far.decay is not None:
            raise InvalidParameterError(f"Expected one decay, got two in {plan.method}. Keep one of them.")
        start = max(far.low, plan.trained_length) if self.start is None else self.start
        if start < far.low:
            raise InvalidParameterError(f"Expected a decay start of {far.low} (the window) or more, got {start}.")
        return replace(plan, parts=(*plan.parts[:-1], replace(far, decay=DistanceDecay(self.strength, start))))
