"""NTK-aware interpolation, by one factor or by the factor that each row needs."""

from dataclasses import dataclass, replace

from ..plan import ExtensionPlan, Growth, RotaryPlan
from ..scheme import Rotary
from .rotary import FrequencyMethod, exponents, from_tensor, padded, powers, require_pairs, unscaled


@dataclass(frozen=True)
class NTK(FrequencyMethod):
    """Raise the base so that the slowest pair is interpolated and the fastest is kept.

    `theta' = theta * s ** (d / (d - 2))`: pair 0 stays, the last pair rotates `s` times slower. Its effective length
    is below `s` times the trained one (YaRN, section 3.1), so users often pass a larger factor. bloc97, *NTK-aware
    scaled RoPE*, 2023.
    """

    name = "ntk"
    title = "NTK-aware interpolation"
    url = "https://arxiv.org/abs/2309.00071"

    def rescale(self, rotary: Rotary, current: RotaryPlan, plan: ExtensionPlan) -> RotaryPlan:
        require_pairs(self, rotary)
        theta = rotary.theta * plan.factor ** (rotary.dim / (rotary.dim - 2))
        return from_tensor(
            rotary, powers(theta, rotary), rope_parameters={"rope_type": "default", "rope_theta": theta}
        )


@dataclass(frozen=True)
class DynamicNTK(FrequencyMethod):
    """Interpolate NTK-aware, by the factor that each row needs.

    `theta' = theta * s ** (d / (d - 2))` with `s = max(1, l / L)` for a row of l tokens. emozilla, *Dynamically Scaled
    RoPE*, 2023, published with YaRN. Here each row has its own s and keys are cached unrotated: no state is
    kept between calls, and rows of a batch are independent. One residual remains: in cached decoding, deeper layers
    keep the hidden states that were computed under a smaller s.
    """

    name = "dynamic-ntk"
    title = "dynamic NTK-aware interpolation"
    url = "https://arxiv.org/abs/2309.00071"
    code = "https://github.com/jquesnelle/yarn"

    def rescale(self, rotary: Rotary, current: RotaryPlan, plan: ExtensionPlan) -> RotaryPlan:
        require_pairs(self, rotary)
        power = exponents(rotary) * (rotary.dim / (rotary.dim - 2))
        short = unscaled(rotary)
        growth = Growth(moving=short.inv_freq, power=padded(rotary, power), kept=(0.0,) * rotary.slots)
        return replace(short, growth=growth, rope_parameters=None)
