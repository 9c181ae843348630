"""Rotation and merge by Triton, in its interpreter, against PyTorch's operations, and compiled for a GPU that is not
there; on one see `test_gpu.py`."""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import hf_posext.patching.attention_bands as attention_bands
import hf_posext.patching.rotary_layout as rotary_layout
from hf_posext.patching import attention_kernels
from hf_posext.patching.rotary_layout import Layout

NAME = "hf_posext.patching.triton_kernels"
HALVES = torch.arange(24).roll(12)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The kernels as the interpreter runs them, which is asked for where they are defined."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    found = importlib.import_module(NAME)
    for module in (attention_bands, rotary_layout):
        monkeypatch.setattr(module, "one_pass", lambda states: found)
    return found


def states(heads: int, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """As models have them: tokens before heads in memory, in rows of other states."""
    return torch.randn(2, tokens, heads, 30, dtype=dtype)[..., :24].transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("partners", [HALVES, torch.arange(24) ^ 1, torch.randperm(24)])
@pytest.mark.parametrize("rows", [1, 2])
def test_rotation(fused: ModuleType, partners: torch.Tensor, dtype: torch.dtype, rows: int) -> None:
    given = states(3, 37, dtype)  # not a multiple of the block, nor of a power of two
    phases = torch.randn(2, rows, 1, 37, 24).to(dtype).unbind()
    layout = Layout(0, HALVES, partners, torch.ones(24), None)
    found = layout.rotate(given, phases)
    cos, sin = (one.double() for one in phases)
    wanted = given.double() * cos + given[..., partners].double() * sin
    # rounded once, at the end
    torch.testing.assert_close(found, wanted.to(dtype), atol=2e-6, rtol=torch.finfo(dtype).eps)
    assert found.dtype == dtype and not torch.equal(found, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge(fused: ModuleType, dtype: torch.dtype) -> None:
    """Pieces of one softmax, the second for some of the queries, some of which have attended to nothing before."""
    scores, value = torch.randn(2, 3, 37, 20) * 4, torch.randn(2, 3, 20, 24)
    scores[:, :, 7:, 12:] += 20 * torch.randn(30, 1)  # one of the pieces may count for nothing

    def piece(rows: slice, keys: slice) -> tuple[torch.Tensor, torch.Tensor]:
        some = scores[:, :, rows, keys]
        return (some.softmax(-1) @ value[:, :, keys]).to(dtype), some.logsumexp(-1)

    later, whole = slice(3, 36), slice(0, 37)
    held, sums = piece(whole, slice(0, 12))
    held[:, :, :5], sums[:, :, :5] = 0, -torch.inf
    merged = attention_bands.Merged(torch.empty(2, 3, 37, 24), value)
    merged.add(whole, held, sums)
    merged.add(later, *piece(later, slice(12, 20)))
    wanted, total = piece(whole, slice(0, 20))
    (wanted[:, :, 3:5], total[:, :, 3:5]) = (one[:, :, :2] for one in piece(later, slice(12, 20)))
    wanted[:, :, :3], total[:, :, :3] = 0, -torch.inf
    (wanted[:, :, 36:], total[:, :, 36:]) = piece(slice(36, 37), slice(0, 12))
    # values up to 4, of which each piece and their sum are rounded; a log-sum-exp of 60 is known to 4e-6
    torch.testing.assert_close(merged.out, wanted, atol=4 * max(torch.finfo(dtype).eps, 4e-6), rtol=0)
    torch.testing.assert_close(merged.total, total, atol=0, rtol=1e-6)


@pytest.mark.parametrize("generation", [80, 90])
@pytest.mark.parametrize(("name", "wide"), [("_rotate", 4), ("_merge", 2)])
def test_kernels_compile(name: str, wide: int, generation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes Python that the compiler refuses. States are read 16 bytes at a time."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    kernel = getattr(importlib.import_module(NAME), name)
    sizes = {"WIDTH": 128, "COLUMNS": 128, "ROWS": 16}
    of_sums = {"held_sum": "*fp32", "out_sum": "*fp32", "partners": "*i64"}
    states = dict.fromkeys(("out", "states", "cos", "sin", "held"), "*bf16")
    kinds = of_sums | states | dict.fromkeys(sizes, "constexpr")
    aligned = [number for number, given in enumerate(kernel.arg_names) if given != "heads" and given not in sizes]
    source = ASTSource(
        fn=kernel,
        signature={given: kinds.get(given, "i32") for given in kernel.arg_names},
        constexprs=sizes,
        attrs={(number,): [["tt.divisibility", 16]] for number in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", generation, 32))
    assert compiled.asm["cubin"] and compiled.asm["ptx"].count("ld.global.v4.b32") >= wide


def test_a_compiler_that_is_missing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without the interpreter, a kernel on the CPU raises, as one does on a GPU without a C compiler."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    attention_kernels._one_pass.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert attention_kernels._one_pass(torch.device("cpu")) is None
        assert attention_kernels._one_pass(torch.device("cpu")) is None
    (said,) = caplog.messages
    assert said.startswith("Triton is not used on cpu: ")


def test_a_kernel_that_is_off(fused: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    attention_kernels._one_pass.cache_clear()
    assert attention_kernels._one_pass(torch.device("cpu")) is fused
    attention_kernels._one_pass.cache_clear()
    monkeypatch.setattr(fused, "rotate", lambda states, cos, sin, partners: states)
    with caplog.at_level(logging.WARNING):
        assert attention_kernels._one_pass(torch.device("cpu")) is None
    assert "it is off by" in caplog.text
    attention_kernels._one_pass.cache_clear()


def test_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, outside of autograd, where channels lie one behind the other."""
    monkeypatch.setattr(attention_kernels, "_one_pass", lambda device: "kernels")
    given = torch.zeros(1, 1, 4, 8)
    assert attention_kernels.one_pass(given) is None, "on the CPU"
