"""LongCE: the loss of each token, weighted by how much more the long context tells about it than a short one.

Fang et al., 2024: What is Wrong with Perplexity for Long-context Language Modeling?, https://arxiv.org/abs/2410.23771.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ..evaluation import longce_weights
from ..patching.modes import evaluation_mode


@dataclass
class LongCE:
    """
    The `compute_loss_func` of a Trainer whose labels are the tokens themselves.

    The short contexts are windows of twice `short_length` that move by `short_length`, so that each token has
    `short_length` to `2 * short_length - 1` tokens before it; that costs two forwards of short rows, without
    gradients, beside the one of the long row. Tokens of the first window have no shorter context, and weigh 1.

    Args:
        model (`torch.nn.Module`): the model in training.
        short_length (`int`): in tokens.
        bos (`int`): special tokens that rows begin with, so that windows must, too.
    """

    model: nn.Module
    short_length: int
    bos: int

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        nll = token_nll(outputs["logits"], labels)
        weights = longce_weights(nll.detach(), self.short_nll(labels, nll.detach()))
        return (weights * nll).sum() / (nll.numel() if num_items_in_batch is None else num_items_in_batch)

    @torch.no_grad()
    def short_nll(self, ids: torch.Tensor, long_nll: torch.Tensor) -> torch.Tensor:
        """NLL (batch, length - 1) given the short contexts; that of the long one where there is no shorter."""
        short, size = long_nll.clone(), self.short_length
        with evaluation_mode(self.model):
            for begin in range(size, ids.shape[1] - size, size):
                window = ids[:, begin : begin + 2 * size].clone()
                window[:, : self.bos] = ids[:, : self.bos]
                nll = token_nll(self.model(input_ids=window, use_cache=False)["logits"], window)
                scored = nll[:, size - 1 :]  # the first value is that of token 1 of the window
                at = begin + size - 1
                short[:, at : at + scored.shape[1]] = scored
        return short


def token_nll(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """NLL (batch, length - 1) of tokens 1, 2, ... of each row, float32."""
    return cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
