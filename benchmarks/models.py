"""Random models and texts for measurements. Random weights show equality and cost, not quality."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "initializer_range": 0.2},
    "small": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4}
    | {"num_key_value_heads": 2},
    "attention": {"hidden_size": 512, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 8}
    | {"num_key_value_heads": 2},
    "llama-3-8b": {"hidden_size": 4096, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 32}
    | {"num_key_value_heads": 8},
    "billion": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
}
SHAPES["layer"] = SHAPES["billion"] | {"num_hidden_layers": 1, "tie_word_embeddings": False}
"""Sizes of the random models.

`tiny` has larger weights, which make equal numbers meaningful. `small` is 256 wide and 6 layers deep. `attention` and
`llama-3-8b` are one layer with little more than attention, the second with the heads of that model. `billion` has the
shape of Llama-3.2-1B, and `layer` is one of its layers."""

BOS = "<s>"


def config(shape: str, vocabulary: int, trained: int = 512, **changes: Any) -> LlamaConfig:
    return LlamaConfig(vocab_size=vocabulary, max_position_embeddings=trained, **SHAPES[shape] | changes)


def llama(shape: str, vocabulary: int, trained: int = 512, device: str = "cpu", **changes: Any) -> LlamaForCausalLM:
    """Return a Llama with random weights, in float32 on a CPU and in bfloat16 on a GPU."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config(shape, vocabulary, trained, **changes), dtype=dtype)
    return model.eval()


def text(tokens: int, vocabulary: int) -> torch.Tensor:
    """Return a row of random tokens that begins with token 0, the BOS of [`tokenizer`]."""
    row = torch.randint(1, vocabulary, (tokens,), generator=torch.Generator().manual_seed(0))
    row[0] = 0
    return row


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose token `n` is the word `n`. Token 0 is BOS, which it does not add by itself."""
    numbers = {str(number): number for number in range(1, vocabulary)}
    words = Tokenizer(models.WordLevel({BOS: 0, **numbers}, unk_token=BOS))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token=BOS)


def words(row: torch.Tensor) -> str:
    """Return the text that the tokenizer encodes as these tokens."""
    return " ".join(str(token) if token else BOS for token in row.tolist())
