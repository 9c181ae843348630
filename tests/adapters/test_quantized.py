"""Adapters on quantized bases, which have no weights in floating point where layers are linear.

No package of quantization is installed here. The layers are like those of bitsandbytes (another dtype) and of torchao
(a class of tensors with few operations).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_posext import load_adapter, patch_model, unpatch_model
from hf_posext.adapters import save_adapter, verify_adapter
from hf_posext.patching.modes import evaluation_mode
from tests.adapters.helpers import structure, with_adapter
from tests.conftest import TRAINED, logits, realigned, tiny_llama, tokens

IDS = tokens(3 * TRAINED)


class Int8Linear(nn.Linear):
    """Layer with whole numbers as its weight, and a scale for each row."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((layer.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def dequantized(self) -> torch.Tensor:
        return self.weight * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.dequantized())


class Int8Tensor(torch.Tensor):
    """Weight that claims to be float32, and takes few operations: `linear`, `detach`, and moves."""

    def __new__(cls, values: torch.Tensor, scale: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)  # type: ignore[attr-defined]

    def __init__(self, values: torch.Tensor, scale: torch.Tensor) -> None:
        self.values, self.scale = values, scale

    def dequantized(self) -> torch.Tensor:
        return self.values * self.scale

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is linear:
            return linear(args[0], args[1].dequantized(), *args[2:])
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].values, args[0].scale)
        raise NotImplementedError(f"{function} of Int8Tensor")


def quantized(kind: str) -> PreTrainedModel:
    """A model whose attention and MLP are quantized, as transformers marks it."""
    model = tiny_llama()
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and path != "lm_head":
            packed = Int8Linear(layer)
            if kind == "layers":
                model.set_submodule(path, packed)
            else:
                layer.weight = nn.Parameter(Int8Tensor(packed.weight.data, packed.scale), requires_grad=False)
    model.is_quantized = True
    model.hf_quantizer = type("Quantizer", (), {"is_trainable": True, "is_serializable": lambda self: False})()
    return model


def dequantized(kind: str) -> PreTrainedModel:
    model = tiny_llama()
    packed = quantized(kind)
    with torch.no_grad():
        for path, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and path != "lm_head":
                source: Any = packed.get_submodule(path)
                layer.weight.copy_((source if kind == "layers" else source.weight).dequantized())
    return model


@pytest.mark.parametrize("kind", ["layers", "tensors"])
@pytest.mark.parametrize("method", ["yarn", "rerope"])
def test_an_adapter_is_trained_saved_and_opened_on_the_quantized_base(method: str, kind: str, tmp_path: Path) -> None:
    model, twin = quantized(kind), dequantized(kind)
    plain, before = logits(model, IDS), structure(model)
    for base in (model, twin):
        patch_model(base, method, factor=4)
    assert torch.equal(logits(model, IDS), logits(twin, IDS))
    network = with_adapter(model)
    rows = Dataset.from_dict({"input_ids": tokens(TRAINED, 2).tolist(), "labels": tokens(TRAINED, 2).tolist()})
    options: dict[str, Any] = {"max_steps": 2, "save_steps": 1, "learning_rate": 1e-2, "report_to": "none"}
    arguments = TrainingArguments(str(tmp_path / "run"), use_cpu=True, disable_tqdm=True, **options)
    trainer = Trainer(network, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    save_adapter(network.eval(), tmp_path / "adapter")
    trained = logits(realigned(network), IDS)
    assert (trained - logits(twin, IDS)).abs().max() > 0.01
    for path in (tmp_path / "final", tmp_path / "run" / "checkpoint-2", tmp_path / "adapter"):
        for base in (quantized(kind), dequantized(kind)):
            opened = load_adapter(path, base)
            assert torch.equal(logits(realigned(opened), IDS), trained)
    merged = load_adapter(tmp_path / "adapter", dequantized(kind)).merge_and_unload()
    # one matrix instead of three, in float32
    torch.testing.assert_close(logits(merged, IDS), trained, atol=5e-5, rtol=1e-4)
    changed = quantized(kind)
    with torch.no_grad():
        changed.model.norm.weight.mul_(1.1)
    assert "its model.norm.weight has other values" in verify_adapter(changed, tmp_path / "adapter").reasons[-1]
    network.unload()
    unpatch_model(model)
    assert torch.equal(logits(model, IDS), plain)
    assert structure(model)["modules"].keys() == before["modules"].keys()


def test_probes_leave_weights_that_evaluation_would_repack() -> None:
    """bitsandbytes repacks 4-bit weights for a CPU in evaluation mode, and cannot undo it."""
    repacked: list[str] = []

    class Repacking(Int8Linear):
        support_avx512bf16_for_cpu = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.training:
                repacked.append("weight")
            return super().forward(x)

    model = tiny_llama()
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and path != "lm_head":
            model.set_submodule(path, Repacking(layer).eval())
    expected = copy.deepcopy(model)
    for method in ("yarn", "rerope", "dual-chunk"):
        patch_model(model, method, factor=4)
        unpatch_model(model)
    assert not repacked and not any(module.training for module in model.modules())
    with evaluation_mode(model):
        result = logits(model, IDS)
    assert not repacked and torch.equal(result, logits(expected, IDS))
