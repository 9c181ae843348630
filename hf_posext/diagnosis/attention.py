"""How sharp attention is by position: entropy, and the spread of the scores that make it."""

from __future__ import annotations

import pandas as pd
import torch
from transformers import PreTrainedModel

from ..evaluation.texts.tokens import TokenizedDocuments
from ..patching.attention_scores import last_query_scores

LAYERS = 4
QUERIES = 64
MASKED = -6e4
"""Masks add the least number of a dtype; that of float16 is -65504."""

DOCUMENTS = 2
"""Texts that are read for it: enough to see a trend, and cheap."""


def attention_table(model: PreTrainedModel, documents: TokenizedDocuments, device: torch.device) -> pd.DataFrame:
    """A line for each of some sixty positions and up to four layers, first and last among them.

    Columns: `position`, `layer`, `entropy` (nats; `exp` of it is how many tokens a head looks at), `spread` (standard
    deviation of the scores over the keys that are seen, biases and masks of the model included). Means over heads and
    documents.

    Raises:
        UnsupportedModelError: attention cannot be watched.
    """
    chunk = max(2, documents.length // QUERIES)
    lines = []
    for tokens in documents.tokens[:DOCUMENTS]:
        for position, layers in last_query_scores(model, tokens.to(device), chunk):
            for layer in sample(len(layers)):
                entropy, spread = sharpness(layers[layer])
                lines.append({"position": position, "layer": layer, "entropy": entropy, "spread": spread})
    return pd.DataFrame(lines).groupby(["layer", "position"], as_index=False).mean()


def sample(count: int) -> list[int]:
    """Up to four layers, evenly spaced, first and last among them."""
    return sorted({round(step * (count - 1) / (LAYERS - 1)) for step in range(LAYERS)})


def sharpness(scores: torch.Tensor) -> tuple[float, float]:
    """Entropy of the weights, and standard deviation of the scores of keys that are not masked; means over heads.

    Args:
        scores (`torch.Tensor` of shape `(heads, keys)`): as the softmax gets them, float32.
    """
    seen = scores > MASKED
    logs = scores.masked_fill(~seen, -torch.inf).log_softmax(-1)
    entropy = -(logs.exp() * logs.masked_fill(~seen, 0)).sum(-1)
    count = seen.sum(-1).clamp(min=1)
    mean = (scores.masked_fill(~seen, 0)).sum(-1) / count
    variance = ((scores - mean[:, None]).masked_fill(~seen, 0) ** 2).sum(-1) / count
    return float(entropy.mean()), float(variance.sqrt().mean())
