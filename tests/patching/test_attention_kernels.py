"""Kernels for bands and rectangles: equality of the merged pieces with the dense softmax, and calls of each kernel.

CUDA kernels cannot run here. Substitutes that compute the same values are bound to their signatures.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_posext.patching.kernels as choice
from hf_posext import patch_model
from hf_posext.methods import DualChunk, ReRoPE, Sinks

from ..conftest import logits, tiny_llama, tokens
from .bands import attention_kernel, banded_attention
from .test_banded_attention import causal_mask, dense, problem

SCHEMAS = {
    name: getattr(torch.ops.aten, name).default._schema
    for name in ("_flash_attention_forward", "_scaled_dot_product_cudnn_attention")
}
EXACT = {"atol": 1e-12, "rtol": 0.0}  # float64, sums in another order


def attend(query: Any, key: Any, value: Any, scaling: float, causal: bool, left_window_window: int, right: int) -> Any:
    """Attend like FlashAttention-2, in the layout (batch, heads, tokens, dim).

    Sides of a window count from the diagonal that ends in the last query and the last key. -1 means no bound.
    """
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * scaling
    queries, keys = scores.shape[-2:]
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    hidden = (distance < 0) if causal or right == 0 else torch.zeros_like(distance, dtype=torch.bool)
    scores = scores.masked_fill(
        hidden | (distance > left_window_window) if left_window_window >= 0 else hidden, -torch.inf
    )
    return scores.softmax(-1) @ value.repeat_interleave(groups, 1), scores.logsumexp(-1)


class Substitutes:
    """Substitutes for the kernels of a machine, with a record of the calls."""

    def __init__(self, machine: str) -> None:
        self.machine = machine
        self.called: list[str] = []

    def flash(self, *args: Any, **kwargs: Any) -> Any:
        arguments = bound("_flash_attention_forward", args, kwargs)
        assert arguments["cum_seq_q"] is arguments["cum_seq_k"] is None and arguments["dropout_p"] == 0
        states = [arguments[name].transpose(1, 2) for name in ("query", "key", "value")]
        assert (arguments["max_q"], arguments["max_k"]) == (states[0].shape[2], states[1].shape[2])
        sides = (arguments.get("window_size_left", -1), arguments.get("window_size_right", -1))
        out, total = attend(*states, arguments["scale"], arguments["is_causal"], *sides)
        self.called.append("flash" if sides == (-1, -1) else "window")
        return out.transpose(1, 2), total, None, None, None

    def cudnn(self, *args: Any, **kwargs: Any) -> Any:
        arguments = bound("_scaled_dot_product_cudnn_attention", args, kwargs)
        assert arguments["attn_bias"] is None and arguments["compute_log_sumexp"]
        states = [arguments[name] for name in ("query", "key", "value")]
        assert not arguments["is_causal"] or states[0].shape[2] == states[1].shape[2], "aligned to which corner?"
        out, total = attend(*states, arguments["scale"], arguments["is_causal"], -1, -1)
        self.called.append("cudnn")
        return out, total[..., None], *[None] * 7


def bound(name: str, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return arguments by their names in the kernel's schema."""
    names = [argument.name for argument in SCHEMAS[name].arguments]
    assert set(kwargs) <= set(names[len(args) :])
    return {**dict(zip(names, args, strict=False)), **kwargs}


@pytest.fixture(params=["cudnn", "flash"])
def substitutes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Substitutes:
    """Substitute the kernels of a machine with cuDNN, and of one without."""
    kernels = Substitutes(request.param)
    monkeypatch.setattr(choice, "FLASH", kernels.flash)
    monkeypatch.setattr(choice, "CUDNN", kernels.cudnn)
    monkeypatch.setattr(choice, "PLANNED", 12)
    picked = choice.SDPBackend.CUDNN_ATTENTION if request.param == "cudnn" else choice.SDPBackend.FLASH_ATTENTION
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args, **kwargs: picked.value)
    with attention_kernel("torch"):
        yield kernels


@pytest.mark.parametrize("sinks", [None, torch.randn(4).double()])
@pytest.mark.parametrize("bands", ["window", "chunks", "fading", "fading chunks"])
@pytest.mark.parametrize("counts", [(100, 100), (30, 100), (1, 100), (10, 12), (1, 1), (25, 49)])
def test_pieces_of_kernels_equal_dense(
    counts: tuple[int, int], bands: str, sinks: torch.Tensor | None, substitutes: Substitutes
) -> None:
    arguments, causal = problem(bands, *counts), causal_mask(*counts)
    out = banded_attention(*arguments, mask=None, aligned=True, scaling=0.3, sinks=sinks)
    torch.testing.assert_close(out, dense(*arguments, mask=causal, scaling=0.3, sinks=sinks), **EXACT)
    assert substitutes.called and out.is_contiguous(), "some models view it"


def test_which_kernel_takes_which_piece(substitutes: Substitutes) -> None:
    """Check that FlashAttention takes the window, and that far keys are one causal call of the preferred kernel.

    cuDNN, which plans each number of keys anew, is not used for a few queries.
    """
    for queries, far in ((100, "cudnn"), (5, "flash")):
        arguments = problem("window", queries, 100)
        banded_attention(*arguments, mask=None, aligned=True, scaling=0.3)
        assert substitutes.called[:2] == ["window", far if substitutes.machine == "cudnn" else "flash"]
        substitutes.called.clear()


def test_a_kernel_is_tried_before_it_is_used(substitutes: Substitutes) -> None:
    query, value = torch.zeros(1, 4, 8, 16), torch.zeros(1, 2, 8, 16)
    choice._tried.clear()
    assert choice.works(choice.torch_kernel, query, value)
    tried = list(substitutes.called)
    assert choice.works(choice.torch_kernel, query, value) and substitutes.called == tried, "once"


@pytest.mark.parametrize("fault", ["raises", "window", "scale"])
def test_a_kernel_that_fails_or_computes_something_else_is_left_alone(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def kernel(query: Any, key: Any, value: Any, *, scaling: float, causal: bool, window: int | None) -> Any:
        if fault == "raises":
            raise RuntimeError("no kernel image\nand more")
        scaling = 1.1 * scaling if fault == "scale" else scaling
        sides = -1 if window is None else window - (0 if fault == "window" else 1)
        return attend(query, key, value, scaling, causal, sides, -1 if window is None else 0)

    query, value = torch.zeros(1, 4, 8, 16), torch.zeros(1, 2, 8, 16)
    with caplog.at_level("WARNING"):
        assert not choice.works(kernel, query, value) and not choice.works(kernel, query, value)
    (warning,) = caplog.messages
    assert warning.startswith("kernel is not used on cpu in torch.float32: ") and "\n" not in warning
    assert ("no kernel image" if fault == "raises" else "off by") in warning


def test_what_kernels_cannot_do_goes_to_the_plain_form(substitutes: Substitutes) -> None:
    arguments, causal = problem("window", 30, 100), causal_mask(30, 100)
    for options in ({"mask": causal}, {"mask": None, "softcap": 5.0}):
        out = banded_attention(*arguments, aligned=True, scaling=0.3, **options)
        torch.testing.assert_close(out, dense(*arguments, **{**options, "mask": causal}, scaling=0.3), **EXACT)
    arguments = problem("sinks", 30, 100)
    out = banded_attention(*arguments, mask=None, aligned=True, scaling=0.3)
    torch.testing.assert_close(out, dense(*arguments, mask=causal, scaling=0.3), **EXACT)
    assert not substitutes.called


@pytest.mark.parametrize("method", [ReRoPE(window=8), DualChunk(chunk=12, local=4), Sinks(window=12)])
def test_a_model_on_each_kernel_that_runs_here(method: Any) -> None:
    model, ids = tiny_llama(), tokens(50)
    patch_model(model, method, factor=8, trained_length=16)
    expected = logits(model, ids, use_cache=False)
    for name in ("cpu", "plain"):
        with attention_kernel(name):
            actual = logits(model, ids, use_cache=False)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)  # float32 sums in another order
    assert torch.equal(logits(model, ids, use_cache=False), expected)
