"""Tiny adapters of the three kinds that issue reports speak of, trained for a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from tests.conftest import tokens

NORMS = ["embed_tokens", "norm", "input_layernorm", "post_attention_layernorm"]
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "lora-plus": {"modules_to_save": NORMS}, "dora": {"use_dora": True}}


def with_adapter(model: PreTrainedModel, **options: Any) -> PeftModel:
    """An adapter that is not the identity."""
    torch.manual_seed(1)
    defaults = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(**{**defaults, **options})).eval()


def train(model: PeftModel, length: int, steps: int = 3) -> None:
    """A few steps of gradient descent on random tokens."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    for step in range(steps):
        ids = tokens(length, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def structure(model: torch.nn.Module) -> dict[str, Any]:
    """Everything that PEFT and training change except for values: modules, classes, attributes, hooks, weights."""
    modules = {
        path: (id(module), type(module), frozenset(vars(module)), frozenset(module._forward_hooks))
        for path, module in model.named_modules()
    }
    weights = {path: (w.dtype, w.requires_grad, w.grad is None) for path, w in model.named_parameters()}
    adapters = frozenset(getattr(model, "peft_config", ()))
    return {"modules": modules, "weights": weights, "adapters": adapters, "config": model.config.to_dict()}


def files(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, with its content."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
