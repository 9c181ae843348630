"""Raises the limits that would otherwise cap a patched model at its old length."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from .detect import text_config
from .journal import Journal


def raise_limits(model: PreTrainedModel, length: int, tokenizer: Any | None, journal: Journal) -> None:
    """`max_position_embeddings` of the config and its text part, the generation limit, the tokenizer's limit.

    A limit that is already higher stays.
    """
    for config in {id(config): config for config in (model.config, text_config(model.config))}.values():
        name = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
        old = getattr(config, name, None)
        if isinstance(old, int) and old < length:
            journal.set(config, name, length)
            generation = getattr(model, "generation_config", None)
            if generation is not None and generation.max_length == old:
                journal.set(generation, "max_length", length)
    if tokenizer is not None and tokenizer.model_max_length < length:
        journal.set(tokenizer, "model_max_length", length)
