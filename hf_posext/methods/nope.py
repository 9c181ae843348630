"""No positional encoding."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import ExtensionPlan, RotaryPlan
from ..scheme import Rotary
from .base import register
from .frequencies import FrequencyMethod
from .partial import Partial


@register
@dataclass(frozen=True)
class NoPE(FrequencyMethod):
    """Stop all rotation: only the causal mask gives the order. Needs recalibration at the trained length.

    Kazemnejad et al., *The Impact of Positional Encoding on Length Generalization in Transformers*, 2023; dropped from
    a trained model and recalibrated: Gelberg et al., *DroPE*, 2025.
    """

    name = "nope"
    title = "no positional encoding (NoPE, DroPE)"
    url = "https://arxiv.org/abs/2305.19466"
    needs_factor = False
    covers_local_layers = True

    def rescale(self, rotary: Rotary, current: RotaryPlan, plan: ExtensionPlan) -> RotaryPlan:
        return Partial(proportion=0.0).rescale(rotary, current, plan)
