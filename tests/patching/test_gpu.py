"""Properties that only a GPU shows: its kernels, half precision, and decoding steps that do not wait for it.

These tests require a GPU (`pytest tests/patching/test_gpu.py`). Without one, `test_attention_kernels.py` binds kernels
by their signatures, and `test_other_device.py` has a device that refuses what a GPU refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache, PreTrainedModel, StaticCache

import hf_posext.patching.kernels as choice
from hf_posext import compare, patch_model
from hf_posext.methods import Method
from hf_posext.patching.kernels import choose, one_pass, one_step
from hf_posext.patching.modes import with_cache

from ..conftest import tiny_llama
from ..helpers import NOVELS, shipped_model, shipped_tokenizer
from .bands import Branch, attention_kernel, banded_attention
from .test_banded_attention import BANDS, dense
from .test_compiled_decoding import METHODS, two
from .test_other_device import CASES, IDS, REMAPPING
from .test_triton_decoding import by_products

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

HALF = {"atol": 2e-2, "rtol": 0.0}  # bfloat16 has 8 bits: sums of values up to 3, whose weights are rounded, too


@contextmanager
def no_waiting() -> Iterator[None]:
    """Make PyTorch raise an error wherever the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def readings(model: PreTrainedModel, method: str | Method) -> list[torch.Tensor]:
    """Return the logits of a text, a left-padded text, and cached steps, under a patch and without it."""
    ids, mask = IDS.to(model.device), torch.ones_like(IDS, device=model.device)
    mask[:, :5] = 0
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        with patch_model(model, method, factor=8, trained_length=16):
            outs = [model(ids).logits, model(ids, attention_mask=mask).logits[:, 5:]]
            outs += [
                model(piece, **with_cache(model.forward, cache)).logits
                for piece in ids[:, :34].split([30, 1, 1, 1, 1], 1)
            ]
        outs.append(model(ids).logits)
    return [out.cpu() for out in outs]


@pytest.mark.parametrize(("make", "method"), CASES)
def test_patched_models_give_what_they_give_on_the_cpu(
    make: Callable[[], PreTrainedModel], method: str | Method
) -> None:
    expected = readings(make(), method)
    for actual, reference in zip(readings(make().cuda(), method), expected, strict=True):
        torch.testing.assert_close(actual, reference, atol=1e-4, rtol=0)  # float32, sums in another order
    assert not torch.equal(expected[0], expected[-1]), "the patch does something"


@pytest.mark.parametrize("bands", ["window", "chunks"])
@pytest.mark.parametrize("queries", [256, 100, 1])
def test_kernels_in_half_precision(bands: str, queries: int) -> None:
    """Compare with the dense formula in float64, on the same rounded states."""
    torch.manual_seed(0)
    query = torch.randn(2, 8, queries, 64, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.randn(2, 2, 256, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    branches = [Branch(band, query + number / 4, key - number / 4) for number, band in enumerate(BANDS[bands])]
    positions = torch.arange(256, device="cuda")[None]
    options = {"mask": None, "aligned": True, "scaling": 0.1}
    assert choose(query, value) is not None and one_pass(query) is not None
    out = banded_attention(branches, value, positions[:, -queries:], positions, **options)
    exact = [Branch(branch.band, branch.query.double().cpu(), branch.key.double().cpu()) for branch in branches]
    places = positions[:, -queries:].cpu(), positions.cpu()
    expected = dense(
        exact, value.double().cpu(), *places, mask=places[1][:, None] <= places[0][..., None], scaling=0.1
    )
    torch.testing.assert_close(out.double().cpu(), expected, **HALF)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "key_heads", "dim", "bands"), [(8, 2, 64, 2), (32, 8, 128, 3), (6, 6, 80, 1)])
def test_a_step_in_one_kernel(heads: int, key_heads: int, dim: int, bands: int, dtype: torch.dtype) -> None:
    """Compare with matrix products in float64, with keys in several pieces."""
    torch.manual_seed(0)
    like = {"device": "cuda", "dtype": dtype}
    query = torch.randn(2, heads, 1, dim, **like)
    key, value = (torch.randn(2, key_heads, 3000, dim, **like) for _ in range(2))
    partners = torch.stack([torch.arange(dim, device="cuda").roll(dim // 2)] * 2)
    phases, starts = torch.randn(2, 2, bands + 1, dim, device="cuda"), (2500, 900, 0)[3 - bands :]
    inputs = [tensor.cpu() for tensor in (query, key, value, partners, phases)]
    expected, expected_key = by_products(*inputs, starts, 2499)
    out = one_step(query, key, value, bands)(query, key, partners, phases, starts, 1 / 7)(query, key, value, 2499)
    eps = torch.finfo(dtype).eps  # rotated states and weights are rounded to the dtype
    torch.testing.assert_close(out.double().cpu(), expected, atol=40 * eps, rtol=0)
    torch.testing.assert_close(key.double().cpu(), expected_key, atol=2e-6, rtol=eps)


@pytest.mark.parametrize("method", REMAPPING[:5])
def test_steps_of_a_model_in_one_kernel(method: Method) -> None:
    """Compare steps by Triton with steps by matrix products in float32, and check that Triton is used."""
    model: Any = tiny_llama(head_dim=64).cuda()
    pieces = IDS[:, :40].cuda().split([20] + [1] * 20, 1)

    @torch.no_grad()
    def steps() -> list[torch.Tensor]:
        cache = DynamicCache(config=model.config)
        return [model(piece, **with_cache(model.forward, cache)).logits for piece in pieces]

    choice._step_of.cache_clear()
    with patch_model(model, method, factor=8, trained_length=16):
        fused, tried = steps(), choice._step_of.cache_info().hits
        with attention_kernel("plain"):
            expected = steps()
    assert tried and choice._step_of.cache_info().hits == tried
    for actual, reference in zip(fused, expected, strict=True):
        torch.testing.assert_close(actual, reference, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", REMAPPING)
def test_patched_models_in_half_precision(method: Method) -> None:
    """Compare kernels with matrix products in a whole model."""
    model: Any = tiny_llama(head_dim=64).cuda().bfloat16()
    ids = IDS.cuda()
    with patch_model(model, method, factor=8, trained_length=16), torch.no_grad():
        fused = model(ids).logits
        with attention_kernel("plain"):
            expected = model(ids).logits
    torch.testing.assert_close(fused, expected, atol=0.02 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("make", "method"), CASES[:8])
def test_no_step_of_decoding_waits(
    make: Callable[[], PreTrainedModel], method: str | Method, dtype: torch.dtype, static: bool
) -> None:
    model: Any = make().cuda().to(dtype)
    cache = StaticCache(config=model.config, max_cache_len=48) if static else DynamicCache(config=model.config)
    prompt, *steps = IDS[:, :36].cuda().split([30, 1, 1, 1, 1, 1, 1], 1)
    with patch_model(model, method, factor=8, trained_length=16), torch.no_grad():
        model(prompt, **with_cache(model.forward, cache))
        model(steps[0], **with_cache(model.forward, cache))  # kernels are tried at the first
        for step in steps[1:]:
            with no_waiting():
                model(step, **with_cache(model.forward, cache))


@pytest.mark.parametrize("method", METHODS[:-1])
def test_steps_as_a_cuda_graph(method: str | Method) -> None:
    """Record one graph and replay it."""
    model: Any = tiny_llama().cuda()
    patch_model(model, method, factor=8, trained_length=16)
    static, growing = two(model, 0)
    torch._dynamo.reset()
    counters.clear()
    forward = torch.compile(model.__call__, mode="reduce-overhead", fullgraph=True)
    for _ in range(10):
        torch.testing.assert_close(static.read(1, forward), growing.read(1), atol=1e-4, rtol=0)  # float32
    assert not counters["inductor"]["cudagraph_skips"] and counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("method", REMAPPING[:4])
def test_gradients(method: Method) -> None:
    def gradients(model: Any) -> list[torch.Tensor]:
        with patch_model(model, method, factor=8, trained_length=16):
            ids = IDS.to(model.device)
            model(ids, labels=ids).loss.backward()
        return [parameter.grad.cpu() for parameter in model.parameters() if parameter.grad is not None]

    for grad, reference in zip(gradients(tiny_llama().cuda()), gradients(tiny_llama()), strict=True):
        torch.testing.assert_close(grad, reference, atol=1e-5 * max(1.0, float(reference.abs().max())), rtol=0)


def test_measurements_give_what_they_give_on_the_cpu() -> None:
    tokenizer = shipped_tokenizer()
    text = NOVELS.read_text().splitlines()[0][20_000:24_000]
    perplexities = []
    for device in ("cuda", "cpu"):
        model = shipped_model().to(device)
        results = compare(model, tokenizer, [text], ["none", "self-extend"], factor=2, lengths=[64, 600])
        perplexities.append([row["perplexity"] for row in results.rows])
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-4) and len(perplexities[0]) == 4
