"""A changed base (ABF), alone or with scaled queries (EABF)."""

import math
from dataclasses import dataclass
from typing import Annotated

from ..decode import Bound
from ..errors import InvalidParameterError
from ..plan import ExtensionPlan, QueryScale, RotaryPlan
from ..scheme import Rotary
from .rotary import FrequencyMethod, from_tensor, powers, with_query_scale

Base = Annotated[float, Bound("above 1", lambda base: base > 1)]


@dataclass(frozen=True)
class Theta(FrequencyMethod):
    """Change the base, usually with training afterwards.

    `inv_freq_i = theta' ** (-2 i / d)`. Without `theta`, the pair that completes exactly one rotation within the
    trained length completes one within the target: `theta' = theta ** (ln(target / 2 pi) / ln(trained / 2 pi))`, the
    critical base of Liu et al., *Scaling Laws of RoPE-based Extrapolation* (arXiv 2310.05209). Adjusted base
    frequency: Xiong et al., *Effective Long-Context Scaling of Foundation Models*, 2023.

    Args:
        theta (`float`, *optional*): the new base, e.g. 500000.
    """

    name = "theta"
    title = "adjusted base frequency (ABF)"
    url = "https://arxiv.org/abs/2309.16039"

    theta: Base | None = None

    def rescale(self, rotary: Rotary, current: RotaryPlan, plan: ExtensionPlan) -> RotaryPlan:
        theta = self.theta
        if theta is None:
            turns = [math.log(length / (2 * math.pi)) for length in (plan.target_length, plan.trained_length)]
            if turns[1] <= 0:
                raise InvalidParameterError(
                    f"A trained length of {plan.trained_length} is below one turn. Pass theta=."
                )
            theta = rotary.theta ** (turns[0] / turns[1])
        return from_tensor(
            rotary, powers(theta, rotary), rope_parameters={"rope_type": "default", "rope_theta": theta}
        )


@dataclass(frozen=True)
class EABF(FrequencyMethod):
    """Raise the base, and scale queries with the logarithm of their position except in the first layers.

    The base becomes `theta`, as in [`Theta`], and query p is multiplied by `max(1, ln(p + 1) / ln L)` in all layers
    except the first `skip`. Zhang et al., *Extending LLMs' Context Window with 100 Samples*, 2024. Meant for training
    on a few samples afterwards.

    Args:
        theta (`float`, *optional*, defaults to 500000): the new base.
        skip (`int`, *optional*, defaults to 2): first layers, whose queries are not scaled.
    """

    name = "eabf"
    title = "entropy-aware ABF"
    url = "https://arxiv.org/abs/2401.07004"
    code = "https://github.com/GAIR-NLP/Entropy-ABF"
    needs_factor = False

    theta: Base = 500_000.0
    skip: Annotated[int, Bound("of at least 0", lambda layers: layers >= 0)] = 2

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        scale = QueryScale(length=plan.trained_length, log=True, first_layer=self.skip)
        return with_query_scale(Theta(theta=self.theta).extend(plan), scale)
