"""The scaling of Llama 3.1."""

import math
from dataclasses import dataclass

import torch

from ..errors import InvalidParameterError
from ..plan import ExtensionPlan, RotaryPlan
from ..scheme import Rotary
from .rotary import FrequencyMethod, from_tensor, powers


@dataclass(frozen=True)
class Llama3(FrequencyMethod):
    """Interpolate slow pairs and keep fast ones, with a smooth step between and no temperature.

    Pairs with a wavelength above `L / low_freq_factor` are divided by `s`, those below `L / high_freq_factor` are
    kept, between them `(1 - t) / s + t` with `t = (L / wavelength - low) / (high - low)`. Dubey et al., *The Llama 3
    Herd of Models*, 2024, and the code released with it.

    Args:
        low_freq_factor (`float`, *optional*, defaults to 1): rotations within the trained length below which a pair is
            interpolated.
        high_freq_factor (`float`, *optional*, defaults to 4): rotations above which it is kept.
    """

    name = "llama3"
    title = "Llama-3.1 scaling"
    url = "https://arxiv.org/abs/2407.21783"
    code = "https://github.com/meta-llama/llama-models"

    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise InvalidParameterError(
                "Expected 0 < low_freq_factor < high_freq_factor, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}."
            )

    def rescale(self, rotary: Rotary, current: RotaryPlan, plan: ExtensionPlan) -> RotaryPlan:
        low, high, length = self.low_freq_factor, self.high_freq_factor, plan.trained_length
        inv_freq = powers(rotary.theta, rotary)
        wavelength = 2 * math.pi / inv_freq
        stepped = torch.where(wavelength > length / low, inv_freq / plan.factor, inv_freq)
        smooth = (length / wavelength - low) / (high - low)
        smoothed = (1 - smooth) * stepped / plan.factor + smooth * stepped
        between = ~(wavelength < length / high) & ~(wavelength > length / low)
        parameters = {
            "rope_type": "llama3",
            "factor": plan.factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": length,
        }
        return from_tensor(rotary, torch.where(between, smoothed, stepped), rope_parameters=parameters)
