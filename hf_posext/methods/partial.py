"""Rotation of the fast pairs only (p-RoPE), or of none (NoPE)."""

from dataclasses import dataclass
from typing import Annotated

from ..decode import Bound
from ..plan import ExtensionPlan, RotaryPlan
from ..scheme import Rotary
from .rotary import FrequencyMethod, frequencies, from_tensor


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

    proportion: Annotated[float, Bound("from 0 to 1", lambda share: 0 <= share <= 1)] = 0.75

    def rescale(self, rotary: Rotary, current: RotaryPlan, plan: ExtensionPlan) -> RotaryPlan:
        rotating = int(self.proportion * rotary.dim // 2)
        inv_freq = frequencies(current, rotary)
        inv_freq[rotating:] = 0.0
        native, parameters = current.rope_parameters or {}, None
        if native.get("rope_type") == "default":
            theta = native["rope_theta"]
            parameters = {"rope_type": "proportional", "rope_theta": theta, "partial_rotary_factor": self.proportion}
        return from_tensor(rotary, inv_freq, attention_factor=current.attention_factor, rope_parameters=parameters)


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
