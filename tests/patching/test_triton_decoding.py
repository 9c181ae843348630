"""Decoding steps by Triton, in its interpreter, and compiled for a GPU that is not present. See `test_gpu.py`, too."""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import triton.language as tl
from transformers import DynamicCache
from triton.language import standard

import hf_posext.patching.kernels as choice
from hf_posext import patch_model
from hf_posext.methods import LogN, Method
from hf_posext.patching.modes import with_cache
from hf_posext.patching.remap import rotated_keys

from ..conftest import tiny_llama, tokens
from .bands import attention_kernel
from .pretend_device import PretendDevice
from .test_compiled_decoding import BANDED
from .test_triton_kernels import compiled_for

NAME = "hf_posext.patching.kernels.triton_kernels"


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import the kernels for the interpreter, which is chosen where kernels are defined.

    That is too late for Triton's own functions. They are replaced by what they call.
    """
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name, combine in (("max", standard._elementwise_max), ("sum", standard._sum_combine)):
        monkeypatch.setattr(tl, name, lambda states, axis, combine=combine: tl.reduce(states, axis, combine))
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    kernels = importlib.import_module(NAME)
    monkeypatch.setattr(kernels, "TILE", 16 * 4 * 16)  # so that short texts have several blocks and pieces
    return kernels


def by_products(
    query: Any, key: Any, value: Any, partners: Any, phases: Any, starts: Any, leaving: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output of [`Step`], and the keys after it, by matrix products in float64."""
    query, key, value, phases = (tensor.double() for tensor in (query, key, value, phases))
    if leaving >= 0:
        last = key[:, :, leaving]
        key = key.clone()
        key[:, :, leaving] = last * phases[:, 0, -1:] + last[..., partners[1]] * phases[:, 1, -1:]
    rotated = query * phases[:, :1, :-1] + query[..., partners[0]] * phases[:, 1:, :-1]
    group, stops = query.shape[1] // key.shape[1], (key.shape[2], *starts)
    repeated = key.repeat_interleave(group, 1)
    scores = [
        rotated[:, :, band, None] @ repeated[:, :, starts[band] : stops[band]].mT / 7 for band in range(len(starts))
    ]
    weights = torch.cat(scores[::-1], -1).softmax(-1)
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter cannot multiply bfloat16
@pytest.mark.parametrize(
    ("rows", "heads", "key_heads", "keys", "dim", "starts", "leaving"),
    [
        (2, 8, 2, 150, 32, (100, 0), 99),
        (2, 4, 4, 130, 24, (0,), -1),  # one band, no key that leaves
        (1, 6, 2, 100, 40, (70, 33, 0), -1),  # dim and group are no powers of two
        (1, 4, 1, 200, 16, (199, 0), 198),  # the nearest band contains only the newest key
        (1, 4, 2, 10, 16, (0, 0), -1),  # the farther band is empty
    ],
)
def test_it_equals_matrix_products(
    interpreted: Any,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    rows: int,
    heads: int,
    key_heads: int,
    keys: int,
    dim: int,
    starts: tuple[int, ...],
    leaving: int,
) -> None:
    monkeypatch.setattr(interpreted, "PROGRAMS", 6 * rows * key_heads)
    torch.manual_seed(0)
    query = torch.randn(rows, heads, 1, dim).to(dtype)
    key, value = (torch.randn(rows, key_heads, keys + 9, dim)[:, :, :keys].to(dtype) for _ in range(2))
    partners = torch.stack([torch.arange(dim).roll(dim // 2), torch.arange(dim).flip(0)])
    phases = torch.randn(rows if dim == 32 else 1, 2, len(starts) + 1, dim)
    expected, expected_key = by_products(query, key, value, partners, phases, starts, leaving)
    before = key.clone()
    step = interpreted.Step(query, key, partners, phases, starts, 1 / 7)
    # the rounding of rotated states and of weights to the dtype
    close = {"atol": 20 * torch.finfo(dtype).eps, "rtol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(step(query, key, value, leaving).double(), expected, **close)
    torch.testing.assert_close(key.double(), expected_key, **close)
    rest_of_keys = [number for number in range(keys) if number != leaving]
    assert torch.equal(key[:, :, rest_of_keys], before[:, :, rest_of_keys])
    # the next layer, whose key has been rotated already
    out = step(query, key, value, -1)
    torch.testing.assert_close(out.double(), expected, **close)
    assert out.shape == (rows, 1, heads, dim) and out.is_contiguous()


METHODS: list[Method] = [BANDED[0], BANDED[1] + LogN(), *BANDED[2:]]


@pytest.mark.parametrize("method", METHODS)
def test_steps_of_a_model(interpreted: Any, monkeypatch: pytest.MonkeyPatch, method: Method) -> None:
    """Compare steps, and the keys in the cache after them, with those without Triton."""
    model, ids = tiny_llama(), tokens(30)
    leaving_slots = []
    step = interpreted.Step.__call__
    monkeypatch.setattr(
        interpreted.Step, "__call__", lambda *arguments: (leaving_slots.append(arguments[4]), step(*arguments))[1]
    )

    @torch.no_grad()
    def steps() -> tuple[list[torch.Tensor], DynamicCache]:
        cache = DynamicCache(config=model.config)
        return [
            model(piece, **with_cache(model.forward, cache)).logits for piece in ids.split([10] + [1] * 20, 1)
        ], cache

    with patch_model(model, method, factor=8, trained_length=16):
        expected, cache = steps()
        monkeypatch.setattr(rotated_keys, "one_step", lambda *arguments: interpreted.Step)
        fused, fused_cache = steps()
    for actual, reference in zip(fused, expected, strict=True):
        torch.testing.assert_close(actual, reference, atol=1e-5, rtol=0)  # float32, sums in another order
    for layer, fused_layer in zip(cache.layers, fused_cache.layers, strict=True):
        torch.testing.assert_close(layer.keys, fused_layer.keys, atol=1e-5, rtol=0)
    assert len(leaving_slots) == 2 * 19, "the first step rotates all keys"
    assert (max(leaving_slots) > 0) == (not method.label.startswith(("dual-chunk", "string-shift")))


@pytest.mark.parametrize("generation", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_it_compiles(dtype: str, generation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile the kernel, because the interpreter accepts more Python. Keys and values are read 16 bytes at a time."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    kernels = importlib.import_module(NAME)
    kernel = kernels._attend
    sizes: dict[str, Any] = {"HEADS": 8, "GROUP": 4, "BANDS": 2, "WIDTH": 128, "COLUMNS": 128, "ROWS": 16}
    sizes |= {"BLOCK": 32, "PRECISION": "ieee"} if dtype == "fp32" else {"BLOCK": 64, "PRECISION": "tf32"}
    sizes |= {"PIECES": kernels.PIECES, "FADES": True}
    kinds = dict.fromkeys(("out", "query", "key", "value"), f"*{dtype}") | dict.fromkeys(sizes, "constexpr")
    kinds |= {
        "fading": "*fp32",
        "pieces": "*fp32",
        "phases": "*fp32",
        "partners": "*i64",
        "finished": "*i32",
        "scaling": "fp32",
    }
    compiled = compiled_for(generation, kernel, kinds, sizes, [*kernels.COUNTS, "scaling"])
    assert compiled.asm["cubin"] and compiled.metadata.shared < 100 * 2**10, "what a small GPU has"
    assert "cp.async.cg.shared.global" in compiled.asm["ptx"]


def tried(*sizes: Any) -> Any:
    choice._step_of.cache_clear()
    return choice._step_of(torch.device("cpu"), torch.float32, *sizes)


def test_a_trial(interpreted: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Check that a kernel that is off, or raises an error, is not used."""
    step = interpreted.Step
    assert tried(4, 2, 16, 3) is step
    assert tried(4, 2, 16, 4) is None and tried(128, 1, 16, 2) is None and not caplog.messages, "more than it holds"
    with caplog.at_level(logging.WARNING):
        monkeypatch.setattr(interpreted, "Step", lambda *arguments: step(*arguments[:4], (100, 0), *arguments[5:]))
        assert tried(4, 2, 16, 2) is None and "it is off by" in caplog.text
        monkeypatch.setattr(interpreted, "Step", lambda *arguments: 1 / 0)
        assert tried(4, 2, 16, 2) is None and "ZeroDivisionError" in caplog.text
    choice._step_of.cache_clear()


def test_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the conditions: a GPU, one query, adjacent states, and no forced kernel."""
    monkeypatch.setattr(choice, "one_pass", lambda states: "kernels")
    monkeypatch.setattr(choice, "_step_of", lambda *arguments: arguments[2:])
    ask = choice.one_step
    with PretendDevice():
        query, key = torch.zeros(2, 4, 1, 8, device="cuda"), torch.zeros(2, 2, 9, 8, device="cuda")
        assert ask(query, key, key, 2) == (4, 2, 8, 2) and ask(query, key[:, :, :5], key[:, :, :5], 1) == (4, 2, 8, 1)
        assert ask(query.expand(-1, -1, 2, -1), key, key, 2) is None, "two queries"
        assert ask(query, key, key[..., :4], 2) is None and ask(query, key, key[:, :, ::2], 2) is None
        assert ask(query.repeat(1, 2, 1, 1)[:, ::2], key, key, 2) is None
        assert ask(query, key, key.half(), 2) is None and ask(query.half(), key, key, 2) is None
        assert ask(query, key, key.clone().requires_grad_(), 2) is None
        with attention_kernel("torch"):
            assert ask(query, key, key, 2) is None
        monkeypatch.setattr(choice, "one_pass", lambda states: None)
        assert ask(query, key, key, 2) is None
    assert ask(query.cpu(), key.cpu(), key.cpu(), 2) is None
