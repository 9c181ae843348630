"""Settings of single model types beside the common sizes of `builder.py`, each with its reason.

A key is a model type; it applies also where that type is a sub-config of another. `KEEP_DEFAULT` withdraws a common
size.
"""

from typing import Any

KEEP_DEFAULT = object()

# Multi-head latent attention: every head has its own keys, and `head_dim` must be the rotated width.
_LATENT = {"num_key_value_heads": 4, "head_dim": 8}

# A lightning indexer attends to its top-k tokens only. Wider than any test sequence, it selects all of them, so that
# a phase that differs in the last bit cannot choose another token.
_INDEXER = {"index_topk": 256, "index_head_dim": 16, "index_n_heads": 2}

# Their default config has no width of its own to shrink: it is null, and the layers need one.
_NO_HEAD_DIM = {"head_dim": 16}

# These ship already extended. Twice a trained length of 64 keeps the kind of scaling and its other hyper-parameters.
_SHIPPED_LENGTHS = {"factor": 2.0, "original_max_position_embeddings": 64}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "beta_fast": 32.0, "beta_slow": 1.0}


def _layers(*pattern: str) -> list[str]:
    """`pattern` repeated over the six layers of the zoo."""
    return list(pattern) * (6 // len(pattern))


def _default_rope(theta: float = 10_000.0, **extras: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **extras}


OVERRIDES: dict[str, dict[str, Any]] = {
    # Latent attention
    "axk1": _LATENT,
    "axk2": _LATENT | _INDEXER,
    "bailing_hybrid": _LATENT
    | {"layer_group_size": 3, "linear_head_dim": 16, "n_group": 1, "topk_group": 1}
    | {"max_position_embeddings": 64},  # an alias in its config, which the common sizes leave out
    "deepseek_v2": _LATENT | {"num_experts_per_tok": 2},  # null by default
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT | _INDEXER,
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT | _INDEXER,
    "longcat_flash": _LATENT,
    "minicpm3": _LATENT,
    "sarvam_mla": _LATENT,
    "youtu": _LATENT,
    "dbrx": {
        # Its attention reads fields that the default attention config lacks.
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {
        # Its sliding layers are sized by legacy `swa_` arguments, which have no field in the config.
        **{"num_key_value_heads": 4, "head_dim": 16, "shared_experts_intermediate_size": 32},
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 24},
        **{"swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16},
        **_INDEXER,
    },
    # No head width by default
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},  # null by default
    "hunyuan_v1_dense": _NO_HEAD_DIM,
    "hunyuan_v1_moe": _NO_HEAD_DIM,
    "minimax": _NO_HEAD_DIM,
    "ministral": _NO_HEAD_DIM,
    "mixtral": _NO_HEAD_DIM,
    "nemotron": {"num_key_value_heads": 2},  # null by default
    # Head width derived from the hidden size
    "falcon": {"num_kv_heads": 2},
    # Layers that run several times in one forward, with a cache for each time
    "dory": {"n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2}
    | {"layer_types": _layers("sliding_attention", "full_attention")},
    "inkling2_loop_text": {"n_layers_per_attn_res_block": 2, "loop_layer_index_start": 2, "loop_layer_index_end": 4}
    | {"unpadded_vocab_size": 128, "loop_gate_rank": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2}
    | {"swa_head_dim": 16},
    "lfm2_moe": {"layer_types": _layers("conv", "full_attention")},
    "mimo_v2_flash": {"head_dim": 24},  # a third of it is rotated, and must be an even width
    # Two widths
    "gemma4_text": {"global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    # Mixed layers whose default pattern is longer than the zoo's models, or not made from their depth
    "bamba": {"attn_layer_indices": [2, 5]},
    "granitemoehybrid": {
        # Its rotary module exists only where the position embedding is asked for. All versions know the older names.
        "layer_types": _layers("mamba", "attention"),
        "position_embedding_type": "rope",
    },
    "cohere_compass_text": {
        "layer_types": _layers("full_attention", "sliding_attention"),
        "rope_parameters": {"full_attention": _default_rope(), "sliding_attention": _default_rope()},
    },
    "laguna": {"layer_types": _layers("full_attention", "sliding_attention")},
    "mellum": {"layer_types": _layers("full_attention", "sliding_attention")},
    "zaya": {
        "layer_types": _layers("hybrid", "hybrid_sliding"),
        "sliding_window": 16,  # null by default
        **{"num_experts_per_tok": 1, "router_hidden_size": 16},  # top-1 routing is all it has
    },
    "granite_swa": {"layer_rope_theta": [10_000.0, 500_000.0, 0] * 2},  # two bases and a layer without positions
    "granitemoe_swa": {"layer_rope_theta": [10_000.0, 500_000.0, 0] * 2},
    "qwen4_exp_text": {
        "layer_types": _layers("linear_attention", "indexed_attention"),
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16},  # must be given together
        **{"indexer_budget": 256, "indexer_compress_ratio": 4, "hc_lowrank": 16},
    },
    "zamba2": {
        "layers_block_type": _layers("linear_attention", "hybrid"),
        "use_mem_rope": True,  # rotary positions are an option, off by default
    },
    # Already extended
    "apertus": {"rope_parameters": _LLAMA3 | _SHIPPED_LENGTHS, "max_position_embeddings": 128},
    "apertus1p5_text": {"rope_parameters": _LLAMA3 | _SHIPPED_LENGTHS, "max_position_embeddings": 128},
    "cwm": {"rope_parameters": _LLAMA3 | _SHIPPED_LENGTHS, "max_position_embeddings": 128},
    "gpt_oss": {"rope_parameters": _YARN | {"truncate": False} | _SHIPPED_LENGTHS, "max_position_embeddings": 128},
    "ministral3": {
        "rope_parameters": _YARN
        | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
        | _SHIPPED_LENGTHS,
        "max_position_embeddings": 128,
    },
    # No rotary frequencies
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]], "window_size": 16},
    "mamba2": {"num_heads": 8},  # heads x head width must equal the expanded hidden size
    "prophetnet": {"num_hidden_layers": KEEP_DEFAULT},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 8]},
    "xlnet": {"max_position_embeddings": KEEP_DEFAULT},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "xlm": {"emb_dim": 64},
    "xlstm": {"qk_dim_factor": 1.0},  # its native kernel mixes up query and value widths where they differ
    "zamba": {"layers_block_type": _layers("linear_attention", "hybrid")},
}
