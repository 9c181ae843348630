"""Builds a tiny random model of (nearly) any model type of the installed transformers, in some 30 ms.

No checkpoint is read. A default config of the type is made, every size that it names is shrunk (`SIZES`), the few
types that need more than that are listed with their reason in `overrides.py`, and the weights are drawn at random.
"""

from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .overrides import KEEP_DEFAULT, OVERRIDES

TRAINED_LENGTH = 64
"""Length, in tokens, that every model of the zoo claims to have been trained at."""

VOCABULARY = 128

_TASKS = {
    "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked-lm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq-lm": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "base": modeling_auto.MODEL_MAPPING_NAMES,
}


def _sizes() -> dict[str, int]:
    """Names of each size in the configs of transformers, with the small value that it gets here."""
    named = {
        VOCABULARY: "vocab_size vocab_size_per_layer_input",
        # Six layers show both kinds of layer of every mixed model: gemma3 has one full layer in six.
        6: "num_hidden_layers n_layer n_layers num_layers",
        2: "encoder_layers decoder_layers num_decoder_layers num_encoder_layers",
        64: (
            "hidden_size d_model n_embd dim embed_dim word_embed_proj_dim embedding_size lru_width "
            "intermediate_size ffn_hidden_size ffn_dim d_ff d_inner n_inner mlp_hidden_size "
            "intermediate_size_mlp encoder_ffn_dim decoder_ffn_dim"
        ),
        32: (
            "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
            "shared_intermediate_size ffn_intermediate_size q_lora_rank"
        ),
        16: (
            "head_dim attention_head_dim global_head_dim v_head_dim qk_head_dim kv_lora_rank "
            "linear_key_head_dim linear_value_head_dim mamba_head_dim mamba_headdim mamba_d_head "
            "hidden_size_per_layer_input kv_channels sliding_window attention_window"
        ),
        8: "qk_rope_head_dim qk_nope_head_dim mamba_n_heads mamba_num_heads mamba_d_state state_size chunk_size",
        4: (
            "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
            "linear_num_value_heads mamba_d_conv num_experts num_local_experts n_routed_experts moe_num_experts"
        ),
    }
    sizes = {name: size for size, names in named.items() for name in names.split()}
    sizes |= dict.fromkeys("num_key_value_heads linear_num_key_heads mamba_expand".split(), 2)
    sizes |= dict.fromkeys("num_experts_per_tok num_experts_per_token moe_k moe_topk".split(), 2)
    sizes |= dict.fromkeys(
        "n_group topk_group n_shared_experts first_k_dense_replace n_groups mamba_n_groups".split(), 1
    )
    sizes |= dict.fromkeys(
        (
            "max_position_embeddings original_max_position_embeddings n_positions n_ctx max_seq_len context_length "
            "max_target_positions max_source_positions"
        ).split(),
        TRAINED_LENGTH,
    )
    return sizes | {"mamba_chunk_size": 8, "mamba_d_ssm": 128, "num_kv_shared_layers": 0}


SIZES = _sizes()
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """The default config of `model_type` with every size shrunk, its sub-configs included.

    An override counts in the config and in each sub-config that has a field of that name.
    """
    unused = set(overrides)
    config_class = CONFIG_MAPPING[model_type]
    if getattr(config_class, "has_no_defaults_at_init", False):
        config_class = model_class(model_type).config_class  # of the decoder alone
    arguments = _tiny_arguments(config_class(), overrides, unused)
    if unused:
        raise TypeError(f"{config_class.__name__} has no field {', '.join(sorted(unused))}")
    return config_class(**arguments)


def _tiny_arguments(config: PreTrainedConfig, overrides: dict[str, Any], unused: set[str]) -> dict[str, Any]:
    aliases, fields = config.attribute_map or {}, vars(config)
    # Only what the type has, under its own name, and as one number: an optional size that is off stays off.
    common = {
        name: value
        for name, value in (SIZES | SPECIAL_TOKENS).items()
        if name not in aliases and isinstance(fields.get(name), int)
    }
    parts: dict[str, Any] = {}
    for name in config.sub_configs or {}:
        part = fields.get(name)
        if isinstance(part, PreTrainedConfig):
            parts[name] = _tiny_arguments(part, overrides, unused) | {"model_type": part.model_type}
    of_type = OVERRIDES.get(config.model_type, {})
    requested = {name: value for name, value in overrides.items() if name in fields or name in of_type}
    unused -= set(requested)
    return {name: value for name, value in (common | parts | of_type | requested).items() if value is not KEEP_DEFAULT}


def model_class(model_type: str, task: str = "causal-lm") -> type[PreTrainedModel]:
    """The class that the Auto mapping of `task` names for `model_type`."""
    name = _TASKS[task][model_type]
    return getattr(transformers, name if isinstance(name, str) else name[0])


def build(model_type: str, seed: int = 0, task: str = "causal-lm", **overrides: Any) -> PreTrainedModel:
    """
    A tiny random model: float32, CPU, eval mode.

    Args:
        model_type (`str`): a key of transformers' `CONFIG_MAPPING`.
        seed (`int`, *optional*, defaults to 0): of the weights.
        task (`str`, *optional*, defaults to `"causal-lm"`): `"causal-lm"`, `"masked-lm"`, `"seq2seq-lm"` or `"base"`.
        overrides: fields of the config, set over what the zoo chooses.
    """
    config = tiny_config(model_type, **overrides)
    cls = model_class(model_type, task)
    if cls.config_class is not None and not isinstance(config, cls.config_class):
        config = config.get_text_config(decoder=True)  # the mapping names the text model of a multimodal config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config).eval()
        sharpen(model)
    return model


@torch.no_grad()
def sharpen(model: nn.Module) -> None:
    """
    Makes positions matter to the logits of a freshly initialised model.

    At initialisation attention is nearly uniform, so a wrong phase moves nothing, and norm weights are all one, so a
    norm applied on the wrong side of the rotation is invisible. Both would let a broken patch pass.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.mul_(4.0)
        elif parameter.ndim == 1 and ("norm" in name.lower() or name.endswith("bias")):
            parameter.add_(0.3 * torch.randn_like(parameter))


def token_ids(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids, `(batch, length)`, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 100, (batch, length), generator=generator)
