"""One attention layer without its projections: what a remapping method changes, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import models
import published
import torch
from torch import nn

from hf_posext import patch_model
from hf_posext.methods import DualChunk, LeakyReRoPE, Method, ReRoPE, SelfExtend, StringShift

PROJECTIONS = ("q_proj", "k_proj", "v_proj")

ROWS = 8
"""Queries of which the exact output is computed."""


def remapping(window: int, chunk: int, group: int) -> dict[str, Method]:
    """The methods that are measured, by the size of what they read as it is."""
    return {
        "self-extend": SelfExtend(group=group, window=window),
        "rerope": ReRoPE(window=window),
        "leaky-rerope": LeakyReRoPE(window=window, stride=float(group)),
        "dual-chunk": DualChunk(chunk=chunk, local=chunk // 6),
        "string-shift": StringShift(shift=window, local=window // 8),
    }


class Given(nn.Module):
    """Stands for a projection: gives the same states whatever comes."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states.transpose(1, 2).contiguous()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.states


class Layer:
    """
    Rotation and attention of given random states, as a model calls them.

    Args:
        shape (`str`): of `models.SHAPES`.
        length (`int`): tokens.
        trained (`int`): what the model claims to be trained on.
        method (`Method`, *optional*): what positions to see.
        code (`Callable`, *optional*): of `published`, to be called in place of a patched model.
        device (`str`): `"cpu"`, in float32, or `"cuda"`, in bfloat16.
        depth (`int`): how many such layers there are, one behind the other; phases are made once, as in a model.
    """

    def __init__(
        self,
        shape: str,
        length: int,
        trained: int,
        method: Method | None = None,
        code: Callable[..., torch.Tensor] | None = None,
        device: str = "cpu",
        depth: int = 1,
    ) -> None:
        self.method, self.code, self.depth = method, code, depth
        model = models.llama(shape, 64, trained, device, num_hidden_layers=1)
        self.inv_freq = model.model.rotary_emb.inv_freq.clone()
        if method is not None and code is None:
            patch_model(model, method, factor=max(2, length // trained))
        self.rotary, self.attention = model.model.rotary_emb, model.model.layers[0].self_attn
        config = model.config
        generator = torch.Generator(device).manual_seed(0)
        given = {"dtype": model.dtype, "device": device, "generator": generator}
        heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
        self.states = tuple(torch.randn(1, count, length, self.attention.head_dim, **given) for count in heads)
        for name, states in zip(PROJECTIONS, self.states, strict=True):
            setattr(self.attention, name, Given(states))
        self.attention.o_proj = nn.Identity()
        self.hidden = torch.zeros(1, length, 1, dtype=model.dtype, device=device)
        self.positions = torch.arange(length, device=device)[None]

    @torch.inference_mode()
    def __call__(self) -> torch.Tensor:
        """The output of all heads, `(tokens, heads, dim)`; the same of each layer."""
        if self.code is None:
            return self._attend()
        for _ in range(self.depth):
            found: torch.Tensor = self.code(self.method, self.states, self.rotary)[0]
        return found

    def train(self) -> tuple[torch.Tensor, ...]:
        """Forward and backward: gradients of the given states, where all of the output counts alike."""
        given = [getattr(self.attention, name).states.requires_grad_() for name in PROJECTIONS]
        return torch.autograd.grad(self._attend().sum(), given)

    def _attend(self) -> torch.Tensor:
        angles = self.rotary(self.hidden, self.positions)
        for _ in range(self.depth):
            found: torch.Tensor = self.attention(self.hidden, position_embeddings=angles, attention_mask=None)[0]
        return found.view(self.hidden.shape[1], self.states[0].shape[1], -1)

    def error(self) -> float:
        """The largest distance of some of the output from float64, in relation to the largest output."""
        rows = torch.linspace(0, self.hidden.shape[1] - 1, ROWS, device=self.hidden.device).long()
        wanted = published.exact(self.method, self.states, self.inv_freq, rows)
        return float((self()[rows].double() - wanted).abs().max() / wanted.abs().max())
