"""Attention layers without their projections: only the part that a remapping method changes."""

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
"""Number of queries whose exact output is computed."""


def remapping(window: int, chunk: int, group: int) -> dict[str, Method]:
    """Return the measured methods, for a window, a chunk and a group size."""
    return {
        "self-extend": SelfExtend(group=group, window=window),
        "rerope": ReRoPE(window=window),
        "leaky-rerope": LeakyReRoPE(window=window, stride=float(group)),
        "dual-chunk": DualChunk(chunk=chunk, local=chunk // 6),
        "string-shift": StringShift(shift=window, local=window // 8),
    }


class Given(nn.Module):
    """Projection that returns the same states for any input."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states.transpose(1, 2).contiguous()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.states


class Layer:
    """
    Rotation and attention of random states, called like in a model.

    Args:
        shape (`str`): a name in `models.SHAPES`.
        length (`int`): number of tokens.
        trained (`int`): trained length of the model.
        method (`Method`, *optional*): method to patch the model with.
        code (`Callable`, *optional*): function of `published` to call instead of a patched model.
        device (`str`): `"cpu"`, in float32, or `"cuda"`, in bfloat16.
        depth (`int`): number of consecutive layers. Phases are computed once, like in a model.
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
        options = {"dtype": model.dtype, "device": device, "generator": generator}
        heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
        self.states = tuple(torch.randn(1, count, length, self.attention.head_dim, **options) for count in heads)
        for name, states in zip(PROJECTIONS, self.states, strict=True):
            setattr(self.attention, name, Given(states))
        self.attention.o_proj = nn.Identity()
        self.hidden = torch.zeros(1, length, 1, dtype=model.dtype, device=device)
        self.positions = torch.arange(length, device=device)[None]

    @torch.inference_mode()
    def __call__(self) -> torch.Tensor:
        """Return the output of all heads, `(tokens, heads, dim)`. It is the same for each layer."""
        if self.code is None:
            return self._attend()
        for _ in range(self.depth):
            out: torch.Tensor = self.code(self.method, self.states, self.rotary)[0]
        return out

    def train(self) -> tuple[torch.Tensor, ...]:
        """Run forward and backward, and return the gradients of the states for the sum of the output."""
        states = [getattr(self.attention, name).states.requires_grad_() for name in PROJECTIONS]
        return torch.autograd.grad(self._attend().sum(), states)

    def _attend(self) -> torch.Tensor:
        angles = self.rotary(self.hidden, self.positions)
        for _ in range(self.depth):
            out: torch.Tensor = self.attention(self.hidden, position_embeddings=angles, attention_mask=None)[0]
        return out.view(self.hidden.shape[1], self.states[0].shape[1], -1)

    def error(self) -> float:
        """Return the largest error of `ROWS` rows against float64, relative to the largest output."""
        rows = torch.linspace(0, self.hidden.shape[1] - 1, ROWS, device=self.hidden.device).long()
        expected = published.exact(self.method, self.states, self.inv_freq, rows)
        return float((self()[rows].double() - expected).abs().max() / expected.abs().max())
