"""Models whose classes or weights a wrapper manages: FSDP2, DDP, offloading by accelerate, and parametrizations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from hf_posext import patch_model, unpatch_model
from hf_posext.errors import UnsupportedModelError
from hf_posext.patching.remap.rotary import RotatesLate
from hf_posext.patching.undo import mix, source_file

from ..conftest import TRAINED, logits, tiny_bloom, tiny_gpt2, tiny_llama, tokens
from ..zoo import build

IDS = tokens(60)


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: Any) -> PreTrainedModel:
    """All attention modules and the model itself, in the only process."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for module in [part for part in model.modules() if "Attention" in type(part).__name__]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


CASES: dict[str, tuple[Any, str, dict[str, int]]] = {
    "bloom": (tiny_bloom, "alibi-linear", {"trained_length": 64}),
    "llama": (tiny_llama, "rerope(window=8)", {}),
    "mistral": (lambda: build("mistral"), "self-extend(group=4, window=8)", {"trained_length": 16}),
    "deepseek_v3": (lambda: build("deepseek_v3"), "yarn", {}),
}


@pytest.mark.parametrize("first", ["patch", "shard"])
@pytest.mark.parametrize("family", CASES)
def test_a_sharded_model_is_patched_like_any(family: str, first: str) -> None:
    make, method, lengths = CASES[family]
    model = make()
    plain = logits(model, IDS)
    with patch_model(model, method, factor=4, **lengths):
        right = logits(model, IDS)
    if first == "shard":
        sharded(model)
    patch_model(model, method, factor=4, **lengths)
    if first == "patch":
        sharded(model)
    assert torch.equal(logits(model, IDS), right)
    model(input_ids=IDS, labels=IDS).loss.backward()  # shards the weights again
    assert torch.equal(logits(model, IDS), right)
    unpatch_model(model)
    assert torch.equal(logits(model, IDS), plain)


def test_a_table_is_not_replaced_where_a_wrapper_manages_its_weights() -> None:
    """FSDP2 would put the former table back after the first step, and DDP would not reduce the gradient of the new."""
    for wrapped in (sharded(tiny_gpt2()), DistributedDataParallel(tiny_gpt2())):
        with pytest.raises(UnsupportedModelError, match="Patch the model before it is wrapped"):
            patch_model(wrapped, "table-linear", factor=4)
    model = tiny_gpt2()
    patch_model(model, "table-linear", factor=4)
    right = logits(model, IDS)
    sharded(model)
    for _ in range(2):
        assert torch.equal(logits(model, IDS), right)
        with pytest.raises(UnsupportedModelError, match="Undo the patch before the model is wrapped"):
            unpatch_model(model)
        model(input_ids=IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
@pytest.mark.parametrize(
    ("make", "method"),
    [
        (tiny_llama, "yarn"),
        (tiny_llama, "rerope(window=16)"),
        (tiny_gpt2, "table-linear"),
        (tiny_bloom, "alibi-linear"),
    ],
)
def test_a_model_that_is_offloaded_while_patched(
    offload: Callable[..., Any], make: Callable[[], Any], method: str, tmp_path: Path
) -> None:
    model = make()
    before = logits(model, IDS)
    patch_model(model, method, factor=4, trained_length=TRAINED)
    right = logits(model, IDS)
    offload(model, *((tmp_path,) if offload is disk_offload else ()), execution_device=torch.device("cpu"))
    assert torch.equal(logits(model, IDS), right)
    if method == "table-linear":  # the hooks would bring the longer table back in the next forward
        with pytest.raises(UnsupportedModelError, match="Expected transformer.wpe in memory, got it offloaded"):
            unpatch_model(model)
        assert torch.equal(logits(model, IDS), right)
        remove_hook_from_submodules(model)
    unpatch_model(model)
    assert torch.equal(logits(model, IDS), before)


def test_the_file_of_a_class_that_was_made_at_run_time() -> None:
    layer = tiny_llama().model.layers[0]
    file = source_file(type(layer))
    assert file.__name__ == "transformers.models.llama.modeling_llama"
    parametrize.register_parametrization(layer.mlp.up_proj, "weight", nn.Identity())
    assert source_file(type(layer.mlp.up_proj)) is source_file(nn.Linear)
    rotary: Any = tiny_llama().model.rotary_emb
    rotary.__class__ = mix(RotatesLate, type(rotary))
    for module in (layer, rotary):
        fully_shard(module, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        assert source_file(type(module)) is file
