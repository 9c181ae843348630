"""YaRN in the four variants that are in use, and by the factor that each row needs."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch

from ..decode import Bound, Positive
from ..errors import InvalidParameterError
from ..plan import ExtensionPlan, Growth, RotaryPlan
from ..scheme import Rotary
from .rotary import (
    FrequencyMethod,
    as_longrope,
    exponents,
    from_tensor,
    padded,
    powers,
    require_pairs,
    unscaled,
    with_softmax_keys,
)


@dataclass(frozen=True)
class YaRN(FrequencyMethod):
    """Keep fast pairs, interpolate slow ones with a ramp between, and sharpen attention.

    With `r_i = L / wavelength_i` the rotations of pair i within the trained length, pairs above `beta_fast` rotations
    keep their frequency and pairs below `beta_slow` are divided by `s`. Cosine and sine are multiplied by
    `0.1 ln s + 1`. Peng et al., *YaRN: Efficient Context Window Extension of Large Language Models*, 2023. Four YaRNs,
    up to a factor of 2.3 apart in the middle band, are in use:

    - `code`: the ramp is linear in the pair's index. The authors' code, transformers, vLLM, every released checkpoint.
    - `paper`: the ramp is linear in rotations, `(r_i - beta_slow) / (beta_fast - beta_slow)` (eq. 18 to 20).
    - `pose`: the ramp of the code, mixing wavelengths instead of frequencies (Zhu et al., PoSE, arXiv 2309.10400;
      jquesnelle/yarn issue 24).
    - `radix`: frequencies between the ends of the code's ramp are divided by `s ** e`, where e grows with the square
      of the pair's index (MrRoPE's default, github.com/mattian7/mrRoPE).

    Args:
        variant (`str`, *optional*, defaults to `"code"`): `code`, `paper`, `pose` or `radix`.
        attention_factor (`float`, *optional*): instead of `0.1 ln s + 1`. A model that ships with `mscale` and
            `mscale_all_dim` (DeepSeek) keeps that rule unless a number is given.
        beta_fast (`float`, *optional*, defaults to 32): rotations above which a pair is kept.
        beta_slow (`float`, *optional*, defaults to 1): rotations below which a pair is interpolated.
        truncate (`bool`, *optional*): Round the ends of the ramp to whole pairs. By default as shipped, otherwise
            `True`.
    """

    name = "yarn"
    title = "YaRN"
    url = "https://arxiv.org/abs/2309.00071"
    code = "https://github.com/jquesnelle/yarn"

    variant: Literal["code", "paper", "pose", "radix"] = "code"
    attention_factor: Positive | None = None
    beta_fast: float = 32
    beta_slow: float = 1
    truncate: bool | None = None

    def __post_init__(self) -> None:
        if not 0 < self.beta_slow < self.beta_fast:
            raise InvalidParameterError(
                f"Expected 0 < beta_slow < beta_fast, got {self.beta_slow} and {self.beta_fast}."
            )

    def rescale(self, rotary: Rotary, current: RotaryPlan, plan: ExtensionPlan) -> RotaryPlan:
        require_pairs(self, rotary)
        truncate = bool(rotary.shipped.get("truncate", True)) if self.truncate is None else self.truncate
        temperature, mscales = self._temperature(rotary, plan.factor)
        ramp, whole = self.ramp(rotary, plan.trained_length, truncate), powers(rotary.theta, rotary)
        keep = 1 - ramp
        if self.variant == "radix":
            mixed = whole * plan.factor**-ramp
        elif self.variant == "pose":
            mixed = whole / ((1 - keep) * plan.factor + keep)
        else:
            wavelengths = rotary.theta ** exponents(rotary)
            mixed = 1.0 / (plan.factor * wavelengths) * (1 - keep) + 1.0 / wavelengths * keep
        if self.variant != "code":
            return with_softmax_keys(as_longrope(rotary, mixed, plan, attention_factor=temperature), mscales)
        parameters = {
            "rope_type": "yarn",
            "factor": plan.factor,
            "attention_factor": temperature,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
            "original_max_position_embeddings": plan.trained_length,
            "truncate": truncate,
            **mscales,
        }
        return from_tensor(rotary, mixed, attention_factor=temperature, rope_parameters=parameters)

    def ramp(self, rotary: Rotary, length: int, truncate: bool) -> torch.Tensor:
        """Return 0 for kept pairs and 1 for interpolated ones, of shape (pairs,)."""
        if self.variant == "paper":
            rotations = length * powers(rotary.theta, rotary) / (2 * math.pi)
            return 1 - torch.clamp((rotations - self.beta_slow) / (self.beta_fast - self.beta_slow), 0, 1)
        low, high = (
            rotary.dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rotary.theta))
            for rotations in (self.beta_fast, self.beta_slow)
        )
        if truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary.dim - 1)
        high += 0.001 if low == high else 0  # as in the authors' code, which divides by the difference
        if self.variant == "radix":
            above = torch.arange(rotary.pairs, dtype=torch.float64) - low
            power = above * (above + 1) / ((high - low) * (high - low + 1))
            return torch.where(above <= 0, 0.0, power).clamp(max=1).float()
        return torch.clamp((torch.arange(rotary.pairs, dtype=torch.float32) - low) / (high - low), 0, 1)

    def _temperature(self, rotary: Rotary, factor: float) -> tuple[float, dict[str, float]]:
        """Return the attention factor, and the shipped keys that scale the softmax as well."""
        mscale, all_dim = (rotary.shipped.get(key) for key in ("mscale", "mscale_all_dim"))
        if self.attention_factor is not None:
            return self.attention_factor, {}
        if mscale and all_dim:
            shipped = {"mscale": mscale, "mscale_all_dim": all_dim}
            return yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim), shipped
        return yarn_mscale(factor), {}


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Return `0.1 m ln s + 1`, or 1 if nothing is extended."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True)
class DynamicYaRN(FrequencyMethod):
    """Apply YaRN with the factor that each row needs, so that short inputs keep their quality.

    [`YaRN`] with `s = max(1, l / L)` for a row of l tokens (Peng et al., 2023, section 3.3). As in
    [`DynamicNTK`], rows are independent and keys are cached unrotated.

    Args:
        beta_fast (`float`, *optional*, defaults to 32): rotations above which a pair is kept.
        beta_slow (`float`, *optional*, defaults to 1): rotations below which a pair is interpolated.
        truncate (`bool`, *optional*, defaults to `True`): round the ends of the ramp to whole pairs.
        temperature (`float`, *optional*, defaults to 0.1): cosine and sine are multiplied by `1 + t ln s`.
    """

    name = "dynamic-yarn"
    title = "dynamic YaRN"
    url = "https://arxiv.org/abs/2309.00071"
    code = "https://github.com/jquesnelle/yarn"

    beta_fast: float = 32
    beta_slow: float = 1
    truncate: bool = True
    temperature: Annotated[float, Bound("from 0 to 10", lambda number: 0 <= number <= 10)] = 0.1

    def __post_init__(self) -> None:
        YaRN(beta_fast=self.beta_fast, beta_slow=self.beta_slow)  # refuses values out of bounds

    def rescale(self, rotary: Rotary, current: RotaryPlan, plan: ExtensionPlan) -> RotaryPlan:
        require_pairs(self, rotary)
        yarn = YaRN(beta_fast=self.beta_fast, beta_slow=self.beta_slow, truncate=self.truncate)
        interpolated = yarn.ramp(rotary, plan.trained_length, self.truncate)
        whole = powers(rotary.theta, rotary)
        growth = Growth(
            moving=padded(rotary, whole * interpolated),
            power=padded(rotary, torch.ones(rotary.pairs)),
            kept=padded(rotary, whole * (1 - interpolated)),
            temperature=self.temperature,
        )
        return replace(unscaled(rotary), growth=growth, rope_parameters=None)
