"""A model on its way into training: refused in time, or given what is trained."""

from __future__ import annotations

import copy
import warnings

import torch
from peft import PeftConfig, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel, set_seed

from ..errors import InvalidParameterError, UnsupportedModelError
from ..evaluation.tokens import check_vocabulary
from ..patching.position_ids import check_packing, check_skipping
from .rows import Rows
from .settings import Preset, Settings, adapter_config, tie_again

HALF = (torch.float16, torch.bfloat16)

SETTLED = (
    "`is_gradient_checkpointing` is deprecated",
    "Model has `tie_word_embeddings=True`",
    "fan_in_fan_out is set to",
)
"""What peft warns of in vain: a name that it uses itself, ties that `tie_again` makes, and what it sets right."""


def check_model(model: nn.Module, *, adapted: bool, bf16: bool) -> None:
    """Refuse a model that cannot be trained.

    Args:
        model (`PreTrainedModel`): without an adapter.
        adapted (`bool`): whether an adapter is trained, and not the weights.
        bf16 (`bool`): whether the training computes in bfloat16.

    Raises:
        UnsupportedModelError: no causal language model, one with an adapter, or 4-bit weights that are to be trained.
        InvalidParameterError: weights in half precision without `bf16`.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModelError(
            f"Expected a transformers model without an adapter, got {name}. Pass the PreTrainedModel itself, or "
            "model.merge_and_unload() of one with an adapter"
        )
    if model.config.is_encoder_decoder or not model.can_generate():
        raise UnsupportedModelError(
            f"Expected a causal language model, got {name}. Load a decoder: AutoModelForCausalLM.from_pretrained(...)"
        )
    quantized = getattr(model, "is_quantized", False)
    if quantized and not adapted:
        raise UnsupportedModelError(f"the weights of {name} are quantized, and cannot be trained; use an adapter")
    if model.dtype in HALF and not (bf16 or quantized):
        raise InvalidParameterError(
            f"{name} is {str(model.dtype).removeprefix('torch.')}. Pass bf16=True, so that what is trained is kept in "
            "float32, or load the model with dtype=torch.float32"
        )


def check_fit(model: PreTrainedModel, rows: Rows, settings: Settings) -> None:
    """
    Raises:
        InvalidParameterError: a tokenizer of another model.
        UnsupportedModelError: the model does not honour the positions of packed or skipping rows.
    """
    check_vocabulary(model, rows.dataset["input_ids"])
    if settings.pack:
        check_packing(model)
    if settings.pose is not None:
        check_skipping(model)


def trainable(
    model: PreTrainedModel, preset: Preset, settings: Settings, adapter: PeftConfig | None = None
) -> nn.Module:
    """The model, or a `PeftModel` around it, that requires gradients where the preset trains, in float32 there.

    Raises:
        InvalidParameterError: peft finds nothing to put the adapter on.
    """
    set_seed(settings.seed)
    network: nn.Module = model
    if adapter is not None or preset.rank is not None:
        config = adapter_config(preset, model) if adapter is None else copy.deepcopy(adapter)
        if getattr(model, "is_quantized", False):
            checkpointing = {"use_gradient_checkpointing": settings.gradient_checkpointing}
            prepare_model_for_kbit_training(
                model, **checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        try:
            with warnings.catch_warnings():
                for message in SETTLED:
                    warnings.filterwarnings("ignore", message)
                network = get_peft_model(model, config)
        except ValueError as error:
            raise InvalidParameterError(f"peft cannot put the adapter on {type(model).__name__}: {error}") from error
        tie_again(network)
    for weight in network.parameters():
        if weight.requires_grad and weight.dtype in HALF:
            weight.data = weight.data.float()
    return network


def count(network: nn.Module) -> dict[str, int]:
    """Parameters that are trained, and those of the model in all, the adapter's not among them."""
    weights = list(network.named_parameters())
    trained = sum(weight.numel() for _, weight in weights if weight.requires_grad)
    wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    layers = tuple(f"{path}." for path, module in network.named_modules() if isinstance(module, wrappers))
    wrapped = (".base_layer.", ".original_module.")
    base = sum(
        weight.numel()
        for name, weight in weights
        if not name.startswith("prompt_encoder.")
        and (not name.startswith(layers) or any(mark in name for mark in wrapped))
    )
    return {"trained": trained, "model": base}
