"""Models on another device: no tensor of a patch or a measurement may stay on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from hf_posext import compare, diagnose, patch_model
from hf_posext.methods import DualChunk, LeakyReRoPE, LogN, Method, ReRoPE, SelfExtend, Sinks, StringShift
from hf_posext.patching.modes import with_cache

from ..conftest import tiny_bloom, tiny_gpt2, tiny_llama, tiny_xglm, tokens
from ..helpers import NOVELS, shipped_model, shipped_tokenizer
from ..zoo import build
from .pretend_device import DEVICE, OnDevice, PretendDevice, moved

REMAPPING: list[str | Method] = [
    SelfExtend(group=4, window=8),
    ReRoPE(window=8) + LogN(),
    LeakyReRoPE(window=8, stride=3.0),
    DualChunk(chunk=12, local=4),
    StringShift(shift=8),
    Sinks(window=12),
]
CASES: list[tuple[Callable[[], PreTrainedModel], str | Method]] = [
    *((tiny_llama, method) for method in ("yarn", "dynamic-ntk", *REMAPPING)),
    *((lambda: build("gemma2"), method) for method in REMAPPING[:2]),  # windows, a softcap
    *((lambda: build("gemma3_text"), method) for method in ("yarn", REMAPPING[3])),  # two sets of frequencies
    *((lambda: build("qwen3_5_text"), method) for method in ("dynamic-yarn", REMAPPING[1])),  # positions on three axes
    (tiny_bloom, "alibi-ntk"),
    (tiny_gpt2, "table-linear"),
    (tiny_xglm, "sinusoid-linear"),
]
IDS = tokens(40)
CLOSE = {"atol": 1e-5, "rtol": 0.0}  # float32: on the CPU a fused kernel attends, elsewhere products and a softmax


def readings(model: PreTrainedModel, method: str | Method, on_device: bool) -> list[torch.Tensor]:
    """Return the logits of a text, a left-padded text, and cached steps, under a patch and without it."""

    def read(ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        arguments = ({"input_ids": ids} | kwargs).items()
        inputs = {
            name: value.as_subclass(OnDevice) if on_device and isinstance(value, torch.Tensor) else value
            for name, value in arguments
        }
        with torch.no_grad():
            logits: torch.Tensor = model(**inputs).logits
        return logits.as_subclass(torch.Tensor)

    mask = torch.ones_like(IDS)
    mask[:, :5] = 0
    with patch_model(model, method, factor=8, trained_length=16):
        outs = [read(IDS), read(IDS, attention_mask=mask)[:, 5:]]
        caches = [DynamicCache(config=model.config)]
        if model._can_compile_fullgraph and not model.config.model_type.startswith("qwen3_5"):
            caches.append(StaticCache(config=model.config, max_cache_len=48))
        for cache in caches:
            outs += [
                read(piece, **with_cache(model.forward, cache)) for piece in IDS[:, :34].split([30, 1, 1, 1, 1], 1)
            ]
    return [*outs, read(IDS)]


@pytest.mark.parametrize(("make", "method"), CASES)
def test_patched_models_give_what_they_give_on_the_cpu(
    make: Callable[[], PreTrainedModel], method: str | Method
) -> None:
    on_cpu, on_device = make(), moved(make())
    with PretendDevice():
        actual = readings(on_device, method, on_device=True)  # type: ignore[arg-type]
    expected = readings(on_cpu, method, on_device=False)
    for out, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(out, reference, **CLOSE)
    assert not torch.equal(expected[0], expected[-1]), "the patch does something"


@pytest.mark.parametrize(("make", "method"), [CASES[0], CASES[1], CASES[2], *CASES[-3:]])
def test_a_default_device_is_not_that_of_a_plan(make: Callable[[], PreTrainedModel], method: str | Method) -> None:
    """Check `torch.set_default_device`, the device of tensors that are created without one."""
    model = moved(make())
    with DEVICE, PretendDevice():
        actual = readings(model, method, on_device=True)  # type: ignore[arg-type]
    for out, reference in zip(actual, readings(make(), method, on_device=False), strict=True):
        torch.testing.assert_close(out, reference, **CLOSE)


@pytest.mark.parametrize(("make", "method"), [CASES[0], CASES[2], *CASES[-8:]])
def test_models_are_patched_where_the_default_device_has_no_numbers(
    make: Callable[[], PreTrainedModel], method: str | Method
) -> None:
    model, expected = make(), readings(make(), method, on_device=False)[0]
    with torch.device("meta"):
        patch_model(model, method, factor=8, trained_length=16)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    ("make", "method"), [*((tiny_llama, method) for method in ("yarn", "dynamic-ntk", *REMAPPING)), CASES[-3]]
)
def test_a_step_of_decoding_waits_as_often_as_without_a_patch(
    make: Callable[[], PreTrainedModel], method: str | Method, static: bool
) -> None:
    def waits(model: Any) -> list[str]:
        cache = StaticCache(config=model.config, max_cache_len=48) if static else DynamicCache(config=model.config)
        for piece in IDS[:, :33].as_subclass(OnDevice).split([30, 1, 1, 1], 1):
            device.waits.clear()
            model(piece, **with_cache(model.forward, cache))
        return sorted(device.waits)

    model: Any = moved(make())
    with PretendDevice() as device, torch.no_grad():
        unpatched = waits(model)
        patch_model(model, method, factor=8, trained_length=16)
        assert waits(model) == unpatched


@pytest.mark.parametrize("default", [False, True])
def test_measurements_give_what_they_give_on_the_cpu(default: bool) -> None:
    tokenizer = shipped_tokenizer()
    text = NOVELS.read_text().splitlines()[0][20_000:24_000]
    settings = {"factor": 2, "lengths": [64, 600], "prefill_chunk": 200, "passkey": 1}
    measurements = []
    for on_device in (True, False):
        model = shipped_model()
        with ExitStack() as stack:
            if on_device:
                moved(model)
                stack.enter_context(DEVICE if default else nullcontext())
                stack.enter_context(PretendDevice())
            results = compare(model, tokenizer, [text], ["none", "self-extend"], **settings)
            verdict = diagnose(model, target_length=2048).verdict
        numbers = [row[name] for row in results.rows for name in ("perplexity", "gain", "passkey")]
        measurements.append((numbers, verdict))
    (numbers_there, told_there), (numbers_here, told_here) = measurements
    assert (
        numbers_there == pytest.approx(numbers_here, rel=1e-5) and len(numbers_there) == 12 and told_there == told_here
    )


def test_the_device_refuses_what_a_gpu_refuses() -> None:
    with PretendDevice() as device:
        tensor = torch.arange(3, device="cuda")
        assert tensor.device.type == "cuda" and (tensor + torch.tensor(1)).tolist() == [1, 2, 3]
        assert device.waits == ["tolist"]
        with pytest.raises(RuntimeError, match="same device"):
            tensor + torch.arange(3)
        assert tensor.cpu().device.type == "cpu" and (tensor.cpu() + torch.arange(3)).sum() == 6
