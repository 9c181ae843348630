"""A run that takes half a second: a random model of 64 tokens, random characters, two optimizer steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_posext.training import PRESETS, Finetuned, Preset, finetune
from hf_posext.training.finetune import trainable
from hf_posext.training.settings import Settings

from ..conftest import tiny_llama
from ..evaluation.helpers import character_tokenizer, random_texts

QUICK: dict[str, Any] = {"factor": 2, "steps": 2, "batch_size": 1, "accumulation": 1, "warmup": 0}


def preset(name: str, **changed: Any) -> Preset:
    """A preset with a learning rate at which two steps change a random model."""
    return replace(PRESETS[name], learning_rate=1e-2, **changed)


def train(output: Path, model: Any = None, method: Any = "yarn", **changed: Any) -> Finetuned:
    """`finetune` as above, some of it changed."""
    settings = {"preset": preset("lora"), **QUICK, **changed}
    texts = settings.pop("texts", random_texts(3, 300))
    tokenizer = settings.pop("tokenizer", None) or character_tokenizer()
    return finetune(model or tiny_llama(), tokenizer, texts, method, output=output, **settings)


def adapted(model: Any, adapter: Preset, seed: int = 0) -> Any:
    """A model with what the preset puts on it, not trained yet."""
    return trainable(model, adapter, Settings(64, 1, 1, 1, 0, False, None, None, None, False, False, None, 1, seed))


def weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all weights."""
    return {name: weight.detach().clone() for name, weight in network.state_dict().items()}


def assert_same_bits(network: nn.Module, reference: nn.Module) -> None:
    first, second = weights(network), weights(reference)
    assert first.keys() == second.keys()
    assert [name for name, weight in first.items() if not torch.equal(weight, second[name])] == []
