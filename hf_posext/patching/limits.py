"""Raises the limits that would otherwise cap a patched model at its old length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .journal import Journal
from .sites import LENGTH_FIELDS


def length_fields(model: PreTrainedModel) -> Iterator[tuple[PreTrainedConfig, str, int]]:
    """Every field of the config, and of that of the text part, that holds the longest input: config, name, tokens."""
    text = model.config.get_text_config(decoder=True)
    for config in {id(config): config for config in (model.config, text)}.values():
        for name in dict.fromkeys(config.attribute_map.get(name, name) for name in LENGTH_FIELDS):
            held = getattr(config, name, None)
            if isinstance(held, int):
                yield config, name, held


def set_limit(model: PreTrainedModel, config: PreTrainedConfig, name: str, length: int, journal: Journal) -> None:
    """Set one field of a config, and the generation limit if it is the same."""
    old = getattr(config, name)
    journal.set(config, name, length)
    generation = getattr(model, "generation_config", None)
    if generation is not None and generation.max_length == old:
        journal.set(generation, "max_length", length)


def raise_limits(model: PreTrainedModel, length: int, tokenizer: Any | None, journal: Journal) -> None:
    """`max_position_embeddings` and its likes in the config and its text part, the generation limit, the tokenizer's.

    A limit that is already higher stays.
    """
    for config, name, held in length_fields(model):
        if held < length:
            set_limit(model, config, name, length, journal)
    if tokenizer is not None and tokenizer.model_max_length < length:
        journal.set(tokenizer, "model_max_length", length)
