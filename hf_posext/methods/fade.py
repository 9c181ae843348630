"""Fades: far keys of a remapping method weigh less, by their number or by their distance."""

from dataclasses import dataclass, replace

from ..decode import Count, Positive
from ..errors import InvalidParameterError
from ..plan import Band, CountFade, DistanceDecay, ExtensionPlan
from ..scheme import PositionalScheme
from .base import Method
from .rerope import LeakyReRoPE, ReRoPE
from .rotary import require_far_band


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

    strength: Positive = 1.0
    reference: Count | None = None

    @classmethod
    def example(cls, scheme: PositionalScheme) -> Method:
        return ReRoPE() + cls()

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        far = require_far_band(self, plan)
        if far.fade is not None:
            raise InvalidParameterError(
                f"Expected one fade, got two in {plan.method}. Keep one of them. A decay without a start contains one."
            )
        faded = replace(far, fade=CountFade(self.strength, self.reference or plan.trained_length))
        return plan.with_edits(Band, *plan.bands[:-1], faded)


@dataclass(frozen=True)
class Decay(Method):
    """Lower the logits of far keys with the logarithm of their distance: `"leaky-rerope+decay"`.

    A key at distance d loses `strength * ln(max(1, d / start))`, rounded to octaves: all distances from
    `start * 2 ** k` to twice as far lose `strength * ln(2) * (k + 1/2)`, so that every kernel computes the same. That
    is at most `0.35 * strength` off. By default, nothing changes up to twice the trained length L. A query at position
    i beyond it has `n = i + 1 - window` far keys, and all of these lose `strength * ln(n / (2 L - window))` as well:
    the count fade of [`Fade`], unless one stands before the decay. It does not apply to dual-chunk, whose far band
    begins at no fixed distance. The shape is that of KERPLE's logarithmic bias (Chi et al., *KERPLE: Kernelized
    Relative Positional Embedding for Length Extrapolation*, 2022), which is trained. See docs/fading.md.

    Args:
        strength (`float`, *optional*, defaults to 1): Above 0.
        start (`int`, *optional*): First distance at which logits fall, in tokens, at least the window of the remapping
            method. Logits then fall by distance alone. By default twice the trained length, with the count fade.
    """

    name = "decay"
    title = "logarithmic decay"
    url = "https://arxiv.org/abs/2205.09921"
    kinds = ("rotary",)
    needs_factor = False

    strength: Positive = 1.0
    start: int | None = None

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
        start = self.start
        if start is None:
            # the last band of a chain may begin past the trained length
            start = 2 * max(plan.trained_length, far.low)
            far = replace(far, fade=far.fade or CountFade(self.strength, reference=start - far.low))
        if start < far.low:
            raise InvalidParameterError(f"Expected a decay start of {far.low} (the window) or more, got {start}.")
        decayed = replace(far, decay=DistanceDecay(self.strength, start))
        return plan.with_edits(Band, *plan.bands[:-1], decayed)
