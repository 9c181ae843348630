"""Count fade: the far band of a remapping method weighs no more than it did in training."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..errors import InvalidParameterError
from ..plan import Band, CountFade, ExtensionPlan
from ..scheme import PositionalScheme
from .base import Method, register
from .remap import require_far_band
from .rerope import ReRoPE


@register
@dataclass(frozen=True)
class Fade(Method):
    """Lower the logits of far keys with their number, on top of a remapping method: `"rerope+fade"`.

    The query at position i has `n = i + 1 - window` keys beyond the window, and their logits fall by
    `strength * ln(max(1, n / reference))`. At strength 1 they weigh together no more than `reference` keys. Up to
    position `window + reference`, nothing changes. Under dual-chunk, n counts the keys of the older chunks. The shape
    is that of KERPLE's logarithmic bias (Chi et al., *KERPLE: Kernelized Relative Positional Embedding for Length
    Extrapolation*, 2022), which is trained. Here it is put on the far band of a pretrained model. See docs/fading.md.

    Args:
        strength (`float`, *optional*, defaults to 1): Above 0. A smaller value keeps more weight on far keys.
        reference (`int`, *optional*): Number of far keys up to which nothing changes. By default the trained length.
    """

    name = "fade"
    title = "count fade"
    url = "https://arxiv.org/abs/2205.09921"
    kinds = ("rotary",)
    needs_factor = False

    strength: float = 1.0
    reference: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.strength < math.inf:
            raise InvalidParameterError(f"Expected a fade strength above 0, got {self.strength}.")
        if self.reference is not None and self.reference < 1:
            raise InvalidParameterError(f"Expected a fade reference of 1 token or more, got {self.reference}.")

    @classmethod
    def example(cls, scheme: PositionalScheme) -> Method:
        return ReRoPE() + cls()

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        far = require_far_band(self, plan)
        if far.fade is not None:
            raise InvalidParameterError(
                f"Expected one fade, got two in {plan.method}. Keep one of them. A decay without a start contains one."
            )
        reference = plan.trained_length if self.reference is None else self.reference
        faded = replace(far, fade=CountFade(strength=self.strength, reference=reference))
        return plan.with_edits(Band, *plan.bands[:-1], faded)
