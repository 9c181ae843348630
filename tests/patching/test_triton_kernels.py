"""Rotation and merge by Triton, in its interpreter, against PyTorch's operations, and compiled for a GPU that is not
present. See also `test_gpu.py`."""

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

import hf_posext.patching.kernels as choice
import hf_posext.patching.remap.layout as layout_module
from hf_posext.patching.kernels import banded
from hf_posext.patching.remap.layout import Layout

from .pretend_device import PretendDevice

NAME = "hf_posext.patching.kernels.triton_kernels"


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import the kernels for the interpreter, which is chosen where kernels are defined."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    kernels = importlib.import_module(NAME)
    for module in (banded, layout_module):
        monkeypatch.setattr(module, "one_pass", lambda states: kernels)
    return kernels


def states(heads: int, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """Return states like those of models: tokens before heads in memory, in rows of other states."""
    return torch.randn(2, tokens, heads, 30, dtype=dtype)[..., :24].transpose(1, 2)


def spy(fused: Any) -> list[int]:
    """Record the widths of halves of all states that are rotated from now on."""
    halves: list[int] = []
    rotate = fused.rotate
    fused.rotate = lambda states, cos, sin, half: (halves.append(half), rotate(states, cos, sin, half))[1]
    return halves


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("half", [12, 7, 8, 3])
@pytest.mark.parametrize("rows", [1, 2])
def test_rotation(fused: ModuleType, half: int, dtype: torch.dtype, rows: int) -> None:
    """Compare rotations of all channels, or some, of tokens that are no multiple of a block."""
    inputs, partners = states(3, 37, dtype), torch.arange(24)
    partners[: 2 * half] = partners[: 2 * half].roll(half)
    weights = (torch.arange(24) < 2 * half).float()
    layout = Layout(0, partners, partners, weights, direct=False)
    cos, sin = layout.phases(*torch.randn(2, rows, 37, 24).unbind(), dtype)
    calls = spy(fused)
    rotated = layout.rotate(inputs, (cos, sin))
    expected = inputs.double() * cos.double() + inputs[..., partners].double() * sin.double()
    # rounded once, at the end
    torch.testing.assert_close(rotated, expected.to(dtype), atol=2e-6, rtol=torch.finfo(dtype).eps)
    assert calls and rotated.dtype == dtype and torch.equal(rotated[..., 2 * half :], inputs[..., 2 * half :])


def test_other_layouts_are_rotated_by_pytorch(fused: ModuleType) -> None:
    """Check pairs of neighbors, and an irregular layout."""
    for partners in (torch.arange(24) ^ 1, torch.arange(24).flip(0)):
        inputs, weights = states(3, 37, torch.float32), torch.ones(24)
        layout = Layout(0, partners, partners, weights, direct=False)
        cos, sin = layout.phases(*torch.randn(2, 1, 37, 24).unbind(), torch.float32)
        calls = spy(fused)
        torch.testing.assert_close(layout.rotate(inputs, (cos, sin)), inputs * cos + inputs[..., partners] * sin)
        assert not calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge(fused: ModuleType, dtype: torch.dtype) -> None:
    """Merge a piece for some of the queries, some of which have attended to nothing before."""
    scores, value = torch.randn(2, 3, 37, 20) * 4, torch.randn(2, 3, 20, 24)
    scores[:, :, 7:, 12:] += 20 * torch.randn(30, 1)  # one of the pieces may count for nothing

    def piece(rows: slice, keys: slice) -> tuple[torch.Tensor, torch.Tensor]:
        part = scores[:, :, rows, keys]
        return (part.softmax(-1) @ value[:, :, keys]).to(dtype), part.logsumexp(-1)

    later, everything = slice(3, 36), slice(0, 37)
    merged, sums = piece(everything, slice(0, 12))
    merged[:, :, :5], sums[:, :, :5] = 0, -torch.inf
    banded.merge(merged[:, :, later], sums[:, :, later], *piece(later, slice(12, 20)))
    expected, total = piece(everything, slice(0, 20))
    (expected[:, :, 3:5], total[:, :, 3:5]) = (result[:, :, :2] for result in piece(later, slice(12, 20)))
    expected[:, :, :3], total[:, :, :3] = 0, -torch.inf
    (expected[:, :, 36:], total[:, :, 36:]) = piece(slice(36, 37), slice(0, 12))
    # values up to 4, of which each piece and their sum are rounded; a log-sum-exp of 60 is known to 4e-6
    torch.testing.assert_close(merged, expected, atol=4 * max(torch.finfo(dtype).eps, 4e-6), rtol=0)
    torch.testing.assert_close(sums, total, atol=0, rtol=1e-6)


def compiled_for(generation: int, kernel: Any, kinds: dict[str, str], sizes: dict[str, Any], odd: list[str]) -> Any:
    """Compile a kernel for a GPU. All arguments are multiples of 16, except for sizes and those in `odd`."""
    even = [number for number, name in enumerate(kernel.arg_names) if name not in (*odd, *sizes)]
    source = ASTSource(
        fn=kernel,
        signature={name: kinds.get(name, "i32") for name in kernel.arg_names},
        constexprs=sizes,
        attrs={(number,): [["tt.divisibility", 16]] for number in even},
    )
    return triton.compile(source, target=GPUTarget("cuda", generation, 32))


@pytest.mark.parametrize("generation", [80, 90])
@pytest.mark.parametrize(("name", "wide"), [("_rotate", 4), ("_merge", 2)])
def test_kernels_compile(name: str, wide: int, generation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile the kernel, because the interpreter accepts more Python. States are read 16 bytes at a time."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    kernel = getattr(importlib.import_module(NAME), name)
    sizes = {"WIDTH": 128, "HALF": 48, "COLUMNS": 128, "ROWS": 16}
    sizes = {size: sizes[size] for size in kernel.arg_names if size in sizes}
    of_sums = {"held_sum": "*fp32", "out_sum": "*fp32"}
    states = dict.fromkeys(("out", "states", "cos", "sin", "held"), "*bf16")
    kinds = of_sums | states | dict.fromkeys(sizes, "constexpr")
    compiled = compiled_for(generation, kernel, kinds, sizes, ["heads"])
    assert compiled.asm["cubin"] and compiled.asm["ptx"].count("ld.global.v4.b32") >= wide


def test_a_compiler_that_is_missing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Check a kernel that raises an error, like on a GPU without a C compiler."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    choice._one_pass.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert choice._one_pass(torch.device("cpu")) is None
        assert choice._one_pass(torch.device("cpu")) is None
    (message,) = caplog.messages
    assert message.startswith("Triton is not used on cpu: ")


def test_a_kernel_that_is_off(fused: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    choice._one_pass.cache_clear()
    assert choice._one_pass(torch.device("cpu")) is fused
    choice._one_pass.cache_clear()
    monkeypatch.setattr(fused, "rotate", lambda states, cos, sin, half: states)
    with caplog.at_level(logging.WARNING):
        assert choice._one_pass(torch.device("cpu")) is None
    assert "it is off by" in caplog.text
    choice._one_pass.cache_clear()


def test_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the conditions: the current GPU, no autograd or transforms, and adjacent channels."""
    monkeypatch.setattr(choice, "_one_pass", lambda device: "kernels")
    assert choice.one_pass(torch.zeros(1, 1, 4, 8)) is None
    with PretendDevice():
        states_there = torch.zeros(1, 1, 4, 8, device="cuda")
        assert choice.one_pass(states_there) == "kernels"
        assert choice.one_pass(states_there.mT) is None and choice.one_pass(states_there.double()) is None
        learning = torch.zeros(1, 1, 4, 8, device="cuda").requires_grad_()
        assert choice.one_pass(learning) is None
        with torch.no_grad():
            assert choice.one_pass(learning) == "kernels"
        answers = []
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        assert choice.one_pass(states_there) is None
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        torch.func.vmap(lambda row: answers.append(choice.one_pass(row)) or row)(states_there)
        assert answers == [None]
