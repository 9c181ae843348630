"""What comes out of a training, whole or not there."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

from ..adapters import save_adapter
from ..patching import Patch


def save(network: nn.Module, patch: Patch, trainer: Trainer, output: Path) -> Path:
    """
    The adapter into `output/adapter`, or the model into `output/model`, with its plan.

    Args:
        network (`PeftModel` or `PreTrainedModel`): trained; shards of it are put together on every process.
        patch ([`Patch`]): in force on it.
        trainer (`Trainer`): that trained it.
        output (`Path`): of the run.
    """
    adapted = isinstance(network, PeftModel)
    path = output / ("adapter" if adapted else "model")
    if trainer.is_fsdp_enabled:
        _gather(network)
    if trainer.args.should_save:
        partial = path.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        if adapted:
            save_adapter(network, partial)
        else:
            patch.save_pretrained(partial)
        partial.rename(path)
    return path


@torch.no_grad()
def _gather(network: nn.Module) -> None:
    """Every weight whole, on the CPU, where FSDP left shards; it is not for training any more."""
    whole: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            if isinstance(weight, DTensor):
                if id(weight) not in whole:  # tied weights stay tied
                    whole[id(weight)] = nn.Parameter(weight.full_tensor().cpu(), requires_grad=weight.requires_grad)
                setattr(module, name, whole[id(weight)])
