"""What a run depends on, in plain JSON types: two runs of one identity measure the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ...plan import ExtensionPlan
from ..scoring.scorer import model_name
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
                "attention": getattr(model.config, "_attn_implementation", None),
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


@torch.no_grad()
def weights_fingerprint(model: nn.Module) -> str:
    """Of the names, shapes and dtypes of all parameters, and of some values of each; where they are sharded, every
    process has to ask."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(repr((name, tuple(weight.shape), str(weight.dtype))).encode())
        if weight.numel() and not weight.is_meta:  # offloaded weights are nowhere to be looked at
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            places = torch.arange(SAMPLES, device=whole.device) * (whole.numel() - 1) // (SAMPLES - 1)
            values = whole.reshape(-1)[places]
            digest.update(values.to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()
