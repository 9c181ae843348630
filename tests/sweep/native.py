"""Inputs of both sweeps, and their independent reference: the same weights in a model that transformers configures."""

import copy
import math
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hf_posext import detect_scheme
from tests.zoo import TRAINED_LENGTH, token_ids

SCALING_KEYS = (
    "rope_type type factor original_max_position_embeddings attention_factor beta_fast beta_slow "
    "low_freq_factor high_freq_factor short_factor long_factor"
).split()
MSCALE_KEYS = ("mscale", "mscale_all_dim")


@torch.no_grad()
def logits(model: PreTrainedModel, length: int, stride: int = 1) -> torch.Tensor:
    """Logits `(length, vocabulary)` of one row of tokens at positions 0, stride, 2 * stride, ..."""
    return model(
        input_ids=token_ids(length),
        # Without a mask, positions with gaps would be taken for a pack of several sequences.
        attention_mask=torch.ones(1, length, dtype=torch.long),
        position_ids=stride * torch.arange(length)[None],
        use_cache=False,
    ).logits[0]


def given_length(model: PreTrainedModel) -> int | None:
    """The trained length to pass for a model, which recurrent_gemma alone does not contain."""
    return None if detect_scheme(model).trained_length else TRAINED_LENGTH


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The part of a model's config that speaks of its decoder."""
    return model.config.get_text_config(decoder=True)


def rope_parameters(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """The rope parameters of each set of frequencies; the name is empty where there is one set for all layers."""
    parameters = config.rope_parameters
    if not any(isinstance(value, dict) for value in parameters.values()):
        return {"": parameters}
    return {name: value for name, value in parameters.items() if value}


def is_shipped_scaled(model: PreTrainedModel) -> bool:
    """Return whether the model comes with its frequencies scaled already."""
    types = {parameters.get("rope_type") for parameters in rope_parameters(text_config(model)).values()}
    return not types <= {None, "default", "proportional"}


def native_scaling(method: str, factor: float, long_factor: list[float]) -> dict[str, Any]:
    """The rope parameters by which transformers is asked for a method."""
    scaling: dict[str, Any] = {"rope_type": method, "factor": factor}
    # Linear scaling does not need the last one; the forward of some models does (phimoe, ministral3).
    scaling["original_max_position_embeddings"] = TRAINED_LENGTH
    if method == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if method == "longrope":
        scaling |= {"long_factor": long_factor, "short_factor": long_factor}
    return scaling


def native_model(model: PreTrainedModel, method: str, factor: float, long_factor: list[float]) -> PreTrainedModel:
    """
    A model of the same class and weights whose config asks transformers for the method.

    What else the shipped rope parameters say (`partial_rotary_factor`, `truncate`, `llama_4_scaling_beta`) stays.
    """
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    scaling = native_scaling(method, factor, long_factor)
    if text.model_type == "phimoe" and method in ("yarn", "longrope"):
        # Its forward takes the attention factor from keys of its own, whatever the rope type.
        by_paper = 0.1 * math.log(factor) + 1 if method == "yarn" else math.sqrt(1 + math.log(factor, TRAINED_LENGTH))
        scaling |= {"short_mscale": by_paper, "long_mscale": by_paper}
    elif text.model_type == "phimoe":
        scaling |= {"short_mscale": 1.0, "long_mscale": 1.0}
    # DeepSeek's rule for the attention factor is a part of the YaRN that a model ships with, and of no other method.
    replaced = {*SCALING_KEYS, *(() if method == "yarn" else MSCALE_KEYS)}
    scaled = {
        name: {key: value for key, value in shipped.items() if key not in replaced} | scaling
        for name, shipped in rope_parameters(text).items()
    }
    text.rope_parameters = scaled[""] if "" in scaled else text.rope_parameters | scaled
    if hasattr(text, "original_max_position_embeddings"):
        text.original_max_position_embeddings = TRAINED_LENGTH  # Phi-3 believes this one, not the rope parameters
    limit = text.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    setattr(text, limit, int(factor * TRAINED_LENGTH))
    reference = type(model)(config).eval()
    reference.load_state_dict(model.state_dict())
    return reference


def frequencies(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The rotary frequencies of a model, by the path of their buffer."""
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")}


def why_no_reference(model: PreTrainedModel) -> str:
    """Reason why the installed transformers' own scaling of a model is no reference; nothing where it is one."""
    try:
        scaled = frequencies(native_model(model, "linear", 4, []))
    except ValueError as error:
        return f"transformers refuses: {error}"
    for name, buffer in frequencies(model).items():
        count, expected = scaled[name].numel(), buffer.numel()
        if count != expected:
            return f"transformers' own scaling gives {count} frequencies, where the model has {expected}"
    return ""
