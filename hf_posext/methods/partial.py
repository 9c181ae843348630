"""p-RoPE: only the fast pairs rotate."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InvalidParameterError
from ..plan import ExtensionPlan, RotaryPlan
from ..scheme import Rotary
from .base import register
from .frequencies import FrequencyMethod, frequencies, from_tensor


@register
@dataclass(frozen=True)
class Partial(FrequencyMethod):
    """Stop the slowest pairs, so that they carry content at any distance.

    The fastest `floor(p d / 2)` pairs keep their frequency, the rest get 0. Meant for training or recalibration
    afterwards. Barbero et al., *Round and Round We Go! What makes Rotary Positional Encodings useful?*, 2024.

    Args:
        proportion (`float`, *optional*, defaults to 0.75): `p`, the share of pairs that rotate.
    """

    name = "partial"
    title = "partial rotation (p-RoPE)"
    url = "https://arxiv.org/abs/2410.06205"
    needs_factor = False
    covers_local_layers = True

    proportion: float = 0.75

    def __post_init__(self) -> None:
        if not 0 <= self.proportion <= 1:
            raise InvalidParameterError(f"Expected a partial proportion of 0 to 1, got {self.proportion}.")

    def rescale(self, rotary: Rotary, current: RotaryPlan, plan: ExtensionPlan) -> RotaryPlan:
        turning = int(self.proportion * rotary.dim // 2)
        inv_freq = frequencies(current, rotary)
        inv_freq[turning:] = 0.0
        native = current.rope_parameters or {}
        parameters = None
        if native.get("rope_type") == "default":
            theta = native["rope_theta"]
            parameters = {"rope_type": "proportional", "rope_theta": theta, "partial_rotary_factor": self.proportion}
        return from_tensor(rotary, inv_freq, attention_factor=current.attention_factor, rope_parameters=parameters)
