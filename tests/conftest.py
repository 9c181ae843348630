"""Models small enough to build in every test, and the shipped ones."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    XGLMConfig,
    XGLMForCausalLM,
)

from hf_posext.patching.signatures import with_cache

torch.set_num_threads(1)

CACHE = tempfile.TemporaryDirectory(prefix="hf_posext-tests-")
"""Instead of the user's; goes when the tests end."""

os.environ["HF_DATASETS_CACHE"] = CACHE.name  # nothing above imports datasets

EXAMPLES = Path(__file__).parent.parent / "examples"
TRAINED = 64
"""Tokens that the random models of the tests claim to be trained on."""


class ErrorOnDeprecation(logging.Handler):
    """A deprecation that transformers reports about our calls fails the test (peft's idea)."""

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecat" in record.getMessage().lower():
            raise AssertionError(f"transformers deprecation: {record.getMessage()}")


@pytest.fixture(autouse=True)
def deprecations_fail() -> Iterator[None]:
    handler = ErrorOnDeprecation()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


def sharpen(model: PreTrainedModel) -> PreTrainedModel:
    """Larger weights, so that attention depends on positions well above rounding."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    return model.eval()


def tiny_llama(**overrides: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": TRAINED}
    config = LlamaConfig(**{**sizes, **heads, "pad_token_id": 0, **overrides})
    return sharpen(LlamaForCausalLM(config))


def tiny_gpt2(**overrides: object) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": TRAINED}
    return sharpen(GPT2LMHeadModel(GPT2Config(**{**sizes, **overrides})))


def tiny_bloom(**overrides: object) -> BloomForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4, "pad_token_id": 0}
    return sharpen(BloomForCausalLM(BloomConfig(**{**sizes, **overrides})))


def tiny_t5(**overrides: object) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = T5Config(**{**sizes, "relative_attention_max_distance": 32, "decoder_start_token_id": 0, **overrides})
    return sharpen(T5ForConditionalGeneration(config))


def tiny_xglm(**overrides: object) -> XGLMForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "d_model": 64, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "pad_token_id": 0}
    return sharpen(XGLMForCausalLM(XGLMConfig(**{**sizes, "max_position_embeddings": TRAINED, **overrides})))


def longer_gpt2() -> GPT2LMHeadModel:
    """With rows past the trained length, so that the model runs there before it is patched."""
    return tiny_gpt2(n_positions=3 * TRAINED)


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "rotary": tiny_llama,
    "learned": longer_gpt2,
    "alibi": tiny_bloom,
    "relative": tiny_t5,
    "sinusoidal": tiny_xglm,
}
"""For each kind of scheme that a method extends, the model that the contracts run on."""


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return tiny_llama()


def tokens(count: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids of shape (rows, count), none of them the pad token."""
    return torch.randint(1, 128, (rows, count), generator=torch.Generator().manual_seed(seed))


def arguments(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a forward takes: the ids, or always the same text to encode and the ids to decode."""
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids}
    return {"input_ids": tokens(3 * TRAINED, seed=9).expand(len(ids), -1), "decoder_input_ids": ids}


def realigned(model: PreTrainedModel) -> PreTrainedModel:
    """
    The weights at addresses of torch's own choice, a multiple of 64 bytes, as those of a model built in memory are.

    Weights that were read are mapped from the file, at any multiple of 8; on some processors a product of matrices
    rounds differently there, and two models that are equal to the bit would give other last digits.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor, cache: object = None, **kwargs: object) -> torch.Tensor:
    return model(**arguments(model, ids), **with_cache(model.forward, cache), **kwargs).logits
