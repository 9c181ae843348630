"""The last product of a model, hidden states times vocabulary, slice after slice into the same memory.

A fresh tensor for every slice costs as much as the softmax on it: 392 rows of 128,256 logits are 201 MB, which the
system hands out, and takes back, page by page.

Where a device sums products of half precision in float32 and can hand those sums out, it does: logits in bfloat16 are
off by up to 0.016 nats a token, such sums by 5e-5.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn


class Projection:
    """
    Stands for the `forward` of a linear layer without bias. What it gives is overwritten by what it gives next.

    Args:
        layer (`torch.nn.Linear`): the layer.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self._memory: torch.Tensor | None = None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden (`torch.Tensor` of shape `(..., width)`): hidden states.

        Returns:
            `torch.Tensor` of shape `(..., vocabulary)`: valid until the next call.
        """
        weight = self.layer.weight
        if hidden.dtype != weight.dtype or torch.is_autocast_enabled(hidden.device.type):
            return nn.functional.linear(hidden, weight)
        rows = hidden.flatten(0, -2)
        wide = sums_in_float32(weight.device, weight.dtype)
        if self._memory is None or len(self._memory) < len(rows):
            self._memory = rows.new_empty(len(rows), len(weight), dtype=torch.float32 if wide else weight.dtype)
        into = self._memory[: len(rows)]
        kept = {"out_dtype": torch.float32} if wide else {}
        logits = torch.mm(rows, weight.T, out=into, **kept)
        return logits.view(*hidden.shape[:-1], -1)


@functools.cache
def sums_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return `True` if a device gives products of matrices in half precision as float32; it is asked once."""
    if dtype not in (torch.float16, torch.bfloat16):
        return False
    some = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        return bool((torch.mm(some, some, out_dtype=torch.float32) == 16).all())
    except (RuntimeError, TypeError):  # not there, on this device or before PyTorch 2.8
        return False


def projection_of(model: Any) -> Projection | None:
    """The last product of a model, if it is no more than that: no bias, no adapter, no quantised or shared weights."""
    layer = model.get_output_embeddings()
    plain = type(layer) is nn.Linear and layer.bias is None and "forward" not in vars(layer)
    return Projection(layer) if plain and type(layer.weight.data) is torch.Tensor else None
