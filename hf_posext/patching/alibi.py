"""Gives the heads of an ALiBi model other slopes, exact whatever dtype the model computes in.

transformers rounds the biases of BLOOM and Falcon to the dtype of the model, which in bfloat16 is whole positions a
few hundred tokens on. Here they are computed in float32 and added to the mask.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import NoEffectError, UnsupportedModelError
from ..plan import ExtensionPlan
from .journal import Journal
from .mixin import Mixin, mix


class _Slopes(Mixin):
    """What the classes below share: the slopes of a plan, and the biases that they make."""

    _posext_slopes: torch.Tensor

    def _posext_slopes_on(self, device: torch.device) -> torch.Tensor:
        """The slopes, float32; they stay on the device, as the host would wait for it to get them in every layer."""
        if self._posext_slopes.device != device:
            self._posext_slopes = self._posext_slopes.to(device)
        return self._posext_slopes

    def _posext_biases(self, mask: torch.Tensor) -> torch.Tensor:
        """Slope times position of each key, float32 of shape (batch, heads, 1, keys).

        Positions are counted over the keys that the last query sees, as transformers counts them over the attention
        mask: padding has none.
        """
        real = (mask[:, 0, -1] > torch.finfo(mask.dtype).min / 2).long()
        positions = (real.cumsum(-1) - 1) * real
        return self._posext_slopes_on(mask.device)[None, :, None, None] * positions[:, None, None]


class BloomSlopes(_Slopes):
    """Mixed into the attention layers of BLOOM."""

    def forward(self, *args: Any, alibi: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> Any:
        mask = attention_mask + self._posext_biases(attention_mask)
        return super().forward(*args, alibi=alibi.new_zeros(1, 1, 1), attention_mask=mask, **kwargs)


class FalconSlopes(_Slopes):
    """Mixed into the attention layers of Falcon, whose mask has the biases already, over the root of the head width.

    Kernels of SDPA want the mask in the dtype of the states. What each query adds to all of its keys alike counts for
    nothing, so that the mask gets distances, which are small, and so exact, where attention is.
    """

    num_heads: int
    hidden_size: int

    def forward(
        self, hidden_states: torch.Tensor, *, alibi: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any
    ) -> Any:
        biases = self._posext_biases(attention_mask)
        lowest = torch.finfo(attention_mask.dtype).min
        unseen = attention_mask < lowest / 2
        own = biases.masked_fill(unseen, 0).amax(-1, keepdim=True)  # that of the last token that a query sees
        scaled = (biases - own) / math.sqrt(self.hidden_size // self.num_heads)
        mask = scaled.masked_fill(unseen, lowest).to(attention_mask.dtype)
        return super().forward(hidden_states, alibi=biases, attention_mask=mask, **kwargs)


class MptSlopes(_Slopes):
    """Mixed into MPT itself, which makes float32 biases once for all layers."""

    def build_mpt_alibi_tensor(
        self, num_heads: int, sequence_length: int, alibi_bias_max: int = 8, device: Any = None
    ) -> torch.Tensor:
        distances = torch.arange(1 - sequence_length, 1, dtype=torch.float32, device=device)
        return self._posext_slopes_on(distances.device)[:, None, None] * distances


_MIXINS = {"BloomAttention": BloomSlopes, "FalconAttention": FalconSlopes, "MptModel": MptSlopes}


def apply_slopes(model: PreTrainedModel, plan: ExtensionPlan, journal: Journal) -> str:
    """Put the slopes of a plan into a model.

    Returns:
        `str`: why a saved checkpoint needs this package.

    Raises:
        NoEffectError: the slopes are those that the model has.
        UnsupportedModelError: no layer of the model is known to take other biases.
    """
    if plan.slopes == plan.scheme.slopes:
        raise NoEffectError(
            f"{plan.describe()} leaves the slopes as they are; give a factor above 1, or method 'none'"
        )
    sites = [
        (module, _MIXINS[type(module).__name__]) for module in model.modules() if type(module).__name__ in _MIXINS
    ]
    if not sites:
        raise UnsupportedModelError(
            f"{plan.scheme.model_type} has ALiBi in attention layers of a class that hf_posext does not know; "
            "load it with attn_implementation='sdpa' or 'eager'"
        )
    for module, mixin in sites:
        journal.set(module, "_posext_slopes", torch.tensor(plan.slopes, dtype=torch.float32))
        journal.set(module, "__class__", mix(mixin, type(module)))
    return "no config of transformers can say the slopes of ALiBi"
