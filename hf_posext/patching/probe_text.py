"""A short text for a live model, and what the model gives for it by the path that its users run."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .modes import evaluation_mode

PROBE_TOKENS = 16


def probe_text(model: PreTrainedModel, count: int = PROBE_TOKENS) -> torch.Tensor:
    """Some token ids of shape `(1, count)`, none of them the padding token.

    They are on the CPU where the model has no device: accelerate's hooks move them if it is offloaded.
    """
    config = model.config.get_text_config(decoder=True)
    ids = torch.arange(3, 3 + 2 * count, device="cpu") % getattr(config, "vocab_size", 2**15)
    ids = ids[ids != (-1 if getattr(config, "pad_token_id", None) is None else config.pad_token_id)][:count]
    return ids[None] if model.device.type == "meta" else ids[None].to(model.device)


def logits_of_probe(model: PreTrainedModel) -> torch.Tensor:
    """The first output for a short text, without gradients, in evaluation mode."""
    with evaluation_mode(model), torch.no_grad():
        out: torch.Tensor = model(input_ids=probe_text(model), use_cache=False)[0]
    return out
