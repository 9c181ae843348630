"""Raises the limits that would otherwise cap a patched model at its old length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .sites import LENGTH_FIELDS, text_configs
from .undo import UndoLog


def length_fields(model: PreTrainedModel) -> Iterator[tuple[PreTrainedConfig, str, int]]:
    """Every field of the configs of the text parts that holds the longest input: config, name, tokens."""
    for config in text_configs(model):
        for name in dict.fromkeys(config.attribute_map.get(name, name) for name in LENGTH_FIELDS):
            held = getattr(config, name, None)
            if isinstance(held, int):
                yield config, name, held


def set_limit(model: PreTrainedModel, config: PreTrainedConfig, name: str, length: int, log: UndoLog) -> None:
    """Set one field of a config, and the generation limit if it is the same."""
    old = getattr(config, name)
    log.set(config, name, length)
    generation = getattr(model, "generation_config", None)
    if generation is not None and generation.max_length == old:
        log.set(generation, "max_length", length)


def raise_limits(model: PreTrainedModel, length: int, tokenizer: Any | None, log: UndoLog) -> None:
    """`max_position_embeddings` and its likes in the config and its text part, the generation limit, the tokenizer's.

    A limit that is already higher stays.
    """
    for config, name, held in length_fields(model):
        if held < length:
            set_limit(model, config, name, length, log)
    if tokenizer is not None and tokenizer.model_max_length < length:
        log.set(tokenizer, "model_max_length", length)
