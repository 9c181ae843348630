"""CoPE: the rotation of the slowest pairs fades out."""

import math
from dataclasses import dataclass
from typing import Annotated

import torch

from ..decode import Bound
from ..errors import InvalidParameterError
from ..plan import ExtensionPlan, RotaryPlan
from ..scheme import Rotary
from .rotary import FrequencyMethod, frequencies, from_tensor


@dataclass(frozen=True)
class CoPE(FrequencyMethod):
    """Slow down the slowest pairs, the slowest of them to a standstill. Meant for training.

    Of the slowest `clip` pairs, the m-th (0 is the fastest of them) rotates by
    `inv_freq * (1 + cos(pi m / (clip - 1))) / 2`. Li et al., arXiv 2602.05258, 2026. The published default is a clip
    of 20 of 64 pairs after training on 64K tokens with a base of 1e7. Without training, it leaves short inputs
    unchanged and breaks past them: see `finetune`.

    Args:
        clip (`int`, *optional*): Number of pairs, 2 or more. By default the pairs whose wavelength is longer than the
            trained length.
    """

    name = "cope"
    title = "CoPE (soft clipping of slow pairs)"
    url = "https://arxiv.org/abs/2602.05258"
    code = "https://github.com/hrlics/CoPE"
    needs_factor = False

    clip: Annotated[int, Bound("of at least 2", lambda pairs: pairs >= 2)] | None = None

    def rescale(self, rotary: Rotary, current: RotaryPlan, plan: ExtensionPlan) -> RotaryPlan:
        inv_freq = frequencies(current, rotary)
        clip = self.clip
        if clip is None:
            clip = int((inv_freq.double() * plan.trained_length < 2 * math.pi).sum())
        if not 2 <= clip <= rotary.pairs:
            raise InvalidParameterError(
                f"Expected a cope clip of 2 to {rotary.pairs} pairs, got {clip}. "
                f"Pass clip={max(2, rotary.pairs // 2)}."
            )
        share = torch.arange(clip, dtype=torch.float64) / (clip - 1)
        inv_freq[-clip:] = (inv_freq[-clip:].double() * (1 + torch.cos(math.pi * share)) / 2).float()
        return from_tensor(rotary, inv_freq, attention_factor=current.attention_factor, rope_parameters=None)
