"""The last product of a model, hidden states times vocabulary, slice after slice into the same memory.

A fresh tensor for every slice costs as much as the softmax on it: 512 rows of 128,256 logits are 262 MB, which the
system hands out, and takes back, page by page.
"""

from __future__ import annotations

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
        if self._memory is None or len(self._memory) < len(rows):
            self._memory = rows.new_empty(len(rows), len(weight))
        logits = torch.mm(rows, weight.T, out=self._memory[: len(rows)])
        return logits.view(*hidden.shape[:-1], -1)


def projection_of(model: Any) -> Projection | None:
    """The last product of a model, if it is no more than that: no bias, no adapter, no quantised or shared weights."""
    layer = model.get_output_embeddings()
    plain = type(layer) is nn.Linear and layer.bias is None and "forward" not in vars(layer)
    return Projection(layer) if plain and type(layer.weight.data) is torch.Tensor else None
