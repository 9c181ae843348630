"""A Llama as a GGUF file, as llama.cpp's converter lays it out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in the order of llama.cpp, which turns channels 2i and 2i + 1 where transformers turns i and i + d/2."""
    return weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def write_llama(
    model: LlamaForCausalLM,
    path: Path,
    *,
    quantized: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    scaling: Mapping[str, Any] | None = None,
    divisors: Sequence[float] | None = None,
    leave_out: str = "",
) -> Path:
    """Write a model with its shipped positions.

    Args:
        quantized: matrices in Q8_0.
        tokenizer: a byte-level BPE; no vocabulary by default.
        scaling: metadata under `rope.scaling`.
        divisors: of the frequencies, as the converter writes them for Llama 3.
        leave_out: name of a tensor that the file shall lack.
    """
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for key, value in (scaling or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(f"llama.rope.scaling.{key}", value)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(divisors, dtype=np.float32))
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        _add_vocabulary(writer, tokenizer)

    def add(name: str, tensor: torch.Tensor) -> None:
        if name == leave_out:
            return
        data = tensor.detach().float().contiguous().numpy()
        if quantized and data.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)

    add("token_embd.weight", model.model.embed_tokens.weight)
    add("output_norm.weight", model.model.norm.weight)
    if not config.tie_word_embeddings:
        add("output.weight", model.lm_head.weight)
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    for i, layer in enumerate(model.model.layers):
        for module, block in NAMES.items():
            weight = layer.get_submodule(module).weight
            add(f"blk.{i}.{block}.weight", _neighbours(weight, heads[module]) if module in heads else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    bpe = json.loads(tokenizer._tokenizer.to_str())["model"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])  # control, normal
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id or 0)
    writer.add_eos_token_id(tokenizer.eos_token_id or 0)
    writer.add_add_bos_token(len(tokenizer("")["input_ids"]) > 0)


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """Every tensor as it is stored."""
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
