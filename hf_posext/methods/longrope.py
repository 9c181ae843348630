"""LongRoPE: one factor per rotary pair."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from ..errors import InvalidParameterError
from ..plan import ExtensionPlan, RotaryPlan
from ..scheme import PositionalScheme, Rotary
from .rotary import FrequencyMethod, first_rotary
from .rotary import longrope as longrope_plan


@dataclass(frozen=True)
class LongRoPE(FrequencyMethod):
    """Slow each pair by a searched factor of its own.

    `inv_freq_i / long_factor_i` for inputs longer than the trained length, `inv_freq_i / short_factor_i` up to it;
    cosine and sine multiplied by `sqrt(1 + ln s / ln L)`. Ding et al., *LongRoPE: Extending LLM Context Window
    Beyond 2 Million Tokens*, 2024. With two different lists, keys cached before the input passes the trained length
    keep the frequencies of the short list, as in transformers.

    Args:
        long_factor (`Sequence[float]`): one number per pair.
        short_factor (`Sequence[float]`, *optional*): the same for short inputs. By default the long list.
        attention_factor (`float`, *optional*): instead of `sqrt(1 + ln s / ln L)`.
    """

    name = "longrope"
    title = "LongRoPE"
    url = "https://arxiv.org/abs/2402.13753"
    code = "https://github.com/microsoft/LongRoPE"

    long_factor: Sequence[float] | None = None
    short_factor: Sequence[float] | None = None
    attention_factor: float | None = None

    @classmethod
    def example(cls, scheme: PositionalScheme) -> Self:
        pairs = first_rotary(scheme).pairs
        return cls(long_factor=tuple(1.0 + 7.0 * i / max(pairs - 1, 1) for i in range(pairs)))

    def rescale(self, rotary: Rotary, current: RotaryPlan, plan: ExtensionPlan) -> RotaryPlan:
        lists = (self.long_factor, self.short_factor or self.long_factor)
        for name, factors in zip(("long_factor", "short_factor"), lists, strict=True):
            if factors is None or len(factors) != rotary.pairs or not all(0 < f < math.inf for f in factors):
                got = "none" if factors is None else f"{len(factors)} numbers"
                raise InvalidParameterError(
                    f"Expected a longrope {name} of {rotary.pairs} finite numbers above 0, one for each rotary pair "
                    f"of {rotary.name or 'the'} layers of {plan.scheme.model_type}, got {got}. "
                    "Pass LongRoPE(long_factor=[...])."
                )
        temperature = self.attention_factor
        if temperature is None:
            growth = max(plan.factor, 1.0)
            temperature = math.sqrt(1 + math.log(growth) / math.log(plan.trained_length))
        long, short = (list(map(float, factors or ())) for factors in lists)
        return longrope_plan(rotary, long, short, plan, attention_factor=temperature)
