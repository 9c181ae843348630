"""What a run depends on, in plain JSON types: two runs of one identity measure the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...patching.input_length import forget_length
from ...plan import ExtensionPlan
from ..scoring.scorer import autocast_dtype, model_name
from ..texts.tokens import TokenizedDocuments
from .setup import Setup

SAMPLES = 32
"""Values of each tensor that stand for all of them: training changes every one."""


def run_identity(
    setup: Setup, models: Sequence[Any], plans: Sequence[ExtensionPlan | None], **others: Any
) -> dict[str, Any]:
    """
    All that the measurements of a run depend on.

    How memory is saved is not among it: it changes no more than rounding, and a run that was killed for want of memory
    shall be able to continue with smaller chunks.

    Args:
        setup ([`Setup`]): the documents and how they are read.
        models (`Sequence[PreTrainedModel]`): those that read them.
        plans (`Sequence[ExtensionPlan | None]`): what is in force on them, one after another.
        others: plain JSON types.
    """
    options, versions = setup.options, dict(setup.provenance["versions"])
    return {
        "versions": {name: versions[name] for name in ("hf_posext", "torch", "transformers")},
        "models": [
            {
                "model": model_name(model),
                "dtype": str(model.dtype).removeprefix("torch."),
                "device": model.device.type,
                "autocast": autocast_dtype(model),
                "matmul": torch.get_float32_matmul_precision(),
                "attention": getattr(model.config, "_attn_implementation", None),
                "quantization": quantization(model),
                "weights": weights_fingerprint(model),
            }
            for model in models
        ],
        "plans": [None if plan is None else plan.to_dict() for plan in plans],
        "lengths": setup.lengths,
        "protocol": setup.protocol.name,
        "stride": options.stride,
        "tail": options.tail,
        "start": options.start,
        "seed": options.seed,
        "tokens": tokens_fingerprint(setup.documents),
        **others,
    }


def tokens_fingerprint(documents: TokenizedDocuments) -> str:
    """Of the ids and tokens of all documents, in their order."""
    digest = hashlib.sha256(repr((documents.ids, documents.bos, tuple(documents.tokens.shape))).encode())
    digest.update(documents.tokens.numpy().tobytes())
    return digest.hexdigest()


def quantization(model: Any) -> str | None:
    """How the weights of a model are quantised, as its config contains it."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    settings = config if isinstance(config, dict) else config.to_dict()
    return json.dumps(settings, sort_keys=True, default=str)


@torch.no_grad()
def weights_fingerprint(model: nn.Module) -> str:
    """
    Fingerprint of all that a model computes with: names, shapes, dtypes, and some values of every tensor.

    Tensors are parameters, what quantised layers save beside their weights, and buffers, also those that are not
    saved. Where weights are sharded, every process has to call it.
    """
    forget_length(model)  # a dynamic rotary module remembers in its buffers what was read
    tensors = dict(model.named_parameters()) | dict(model.named_buffers(remove_duplicate=False)) | model.state_dict()
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, torch.Tensor):
            _add(digest, name, tensor)
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: torch.Tensor) -> None:
    digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    elif is_traceable_wrapper_subclass(tensor):  # quantised by torchao: the numbers are in its parts
        for part in tensor.__tensor_flatten__()[0]:
            _add(digest, f"{name}.{part}", getattr(tensor, part))
        return
    if tensor.numel() and not tensor.is_meta:  # offloaded weights are nowhere to be looked at
        places = torch.arange(SAMPLES, device=tensor.device) * (tensor.numel() - 1) // (SAMPLES - 1)
        values = tensor.reshape(-1)[places]
        values = torch.view_as_real(values) if values.is_complex() else values
        digest.update(values.to("cpu", torch.float64).numpy().tobytes())
