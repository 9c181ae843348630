"""Resonance RoPE: wavelengths rounded to whole tokens."""

import math
from dataclasses import dataclass

from ..plan import ExtensionPlan, RotaryPlan
from ..scheme import Rotary
from .rotary import FrequencyMethod, as_longrope, frequencies


@dataclass(frozen=True)
class Resonance(FrequencyMethod):
    """Round wavelengths to whole tokens, on top of any other method: `"yarn+resonance"`.

    `wavelength' = round(2 pi / inv_freq)`: past the trained length, a pair has exactly the phases that it had within
    it. Meant for models trained with it. Wang et al., *Resonance RoPE: Improving Context Length Generalization of
    Large Language Models*, 2024.
    """

    name = "resonance"
    title = "Resonance RoPE"
    url = "https://arxiv.org/abs/2403.00071"
    code = "https://github.com/sheryc/resonance_rope"
    needs_factor = False

    def rescale(self, rotary: Rotary, current: RotaryPlan, plan: ExtensionPlan) -> RotaryPlan:
        inv_freq = frequencies(current, rotary)
        rotating = inv_freq > 0
        inv_freq[rotating] = 2 * math.pi / (2 * math.pi / inv_freq[rotating]).round()
        return as_longrope(rotary, inv_freq, plan, attention_factor=current.attention_factor)
