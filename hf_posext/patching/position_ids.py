"""Check that a model respects the given positions, before training."""

from __future__ import annotations

import inspect

import torch
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from .detect import text_config
from .modes import evaluation_mode

HALF = 8
"""Tokens in each half of the probe."""


def check_packing(model: PreTrainedModel) -> None:
    """Refuse a model that attends across documents in one row, where only positions that begin anew tell them apart.

    Raises:
        UnsupportedModelError: it takes no positions, or what one document says changes what the next one gives.
    """
    positions = torch.arange(HALF).repeat(2)
    first, second = _logits(model, positions, None)[:, HALF:]
    if not torch.equal(first, second):
        raise UnsupportedModelError(
            f"{type(model).__name__} reads across the documents of a packed row. Leave out pack, so that each row is "
            "of one document"
        )


def check_skipping(model: PreTrainedModel) -> None:
    """Refuse a model that takes no notice of a jump in its positions, or takes it for the border of two documents.

    Raises:
        UnsupportedModelError: it does.
    """
    near, far = torch.arange(2 * HALF), torch.arange(2 * HALF)
    far[HALF:] += HALF
    whole, jump = (_logits(model, positions, torch.ones(2, 2 * HALF)) for positions in (near, far))
    if torch.equal(whole[:, HALF:], jump[:, HALF:]):
        raise UnsupportedModelError(
            f"{type(model).__name__} takes no notice of position_ids, so positions cannot be skipped. Leave out pose."
        )
    if torch.equal(*jump[:, HALF:]):
        raise UnsupportedModelError(
            f"{type(model).__name__} takes a jump in its positions for another document. Leave out pose."
        )


def _logits(model: PreTrainedModel, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the logits of two rows that differ only in their first half."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(
            f"{type(model).__name__} takes no position_ids, which pack and pose depend on. Leave both out."
        )
    vocabulary = text_config(model.config).vocab_size
    ids = (torch.arange(4 * HALF).view(2, 2 * HALF) + 3) % vocabulary
    ids[1, HALF:] = ids[0, HALF:]
    given = {"input_ids": ids, "position_ids": positions.expand(2, -1), "attention_mask": mask}
    with evaluation_mode(model), torch.no_grad():
        placed = {name: None if value is None else value.to(model.device) for name, value in given.items()}
        logits: torch.Tensor = model(**placed, use_cache=False)[0]
    return logits
