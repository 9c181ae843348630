"""Gradients of attention over bands by the fused kernel, against autograd through the plain formula in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import hf_posext.patching.kernels.banded as banded
from hf_posext import patch_model
from hf_posext.methods import ReRoPE, SelfExtend

from ..conftest import tiny_llama, tokens
from ..helpers import padded, positions_of
from .bands import attention_kernel, banded_attention
from .test_banded_attention import causal_mask, dense, problem
from .test_remapping import CASES, naive_llama

LENGTH = 100
EXACT = {"atol": 1e-12, "rtol": 1e-10}  # float64; sums in another order
KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Calls(TorchDispatchMode):
    """Counter of calls of the kernel's backward."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is KERNEL
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use blocks so short that some rectangles need no bias, and the last one is shorter."""
    monkeypatch.setattr(banded, "SCORE_BYTES", 2**12)
    monkeypatch.setattr(banded, "FUSED_ROWS", 7)
    yield


def gradients(model: Any, losses: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(torch.stack(losses).sum(), list(model.parameters())))


def nll(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits[:-1], ids[1:], reduction="sum")


@pytest.mark.parametrize("padding", [0, 9])
@pytest.mark.parametrize("case", ["self-extend", "rerope", "dual-chunk", "string-shift", "rerope+log-n+decay+fade"])
def test_gradients_of_a_model_equal_the_formula(case: str, padding: int) -> None:
    """Compare gradients of all weights, with two query heads per key head, for one text, and for two with padding."""
    method, relative, options = CASES[case]
    model = tiny_llama().double()
    texts = [tokens(LENGTH - padding, seed=1)[0], tokens(LENGTH)[0]][0 if padding else 1 :]
    expected = gradients(model, [nll(naive_llama(model, text, relative, **options), text) for text in texts])  # type: ignore[arg-type]
    patch_model(model, method, factor=8)
    ids, mask = padded(*(text[None] for text in texts))
    inputs = {"attention_mask": mask, "position_ids": positions_of(mask)} if padding else {}
    grads = {}
    for kernel in ("cpu", "plain"):
        with Calls() as calls, attention_kernel(kernel):
            logits = model(ids, use_cache=False, **inputs).logits
            losses = [nll(row[-len(text) :], text) for row, text in zip(logits, texts, strict=True)]
            grads[kernel] = gradients(model, losses)
        assert bool(calls.count) == (kernel == "cpu")
    for fused, plain, exact in zip(grads["cpu"], grads["plain"], expected, strict=True):
        torch.testing.assert_close(fused, plain, atol=1e-12 * plain.abs().max().item(), rtol=0)  # other order of sums
        # the phases of the model are float32, off by up to 6e-8 of 100 radians
        torch.testing.assert_close(fused, exact, atol=1e-5 * exact.abs().max().item(), rtol=0)


def leaves(arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    return [arguments[1], *(state for branch in arguments[0] for state in (branch.query, branch.key))]


@pytest.mark.parametrize("padded", [-torch.inf, torch.finfo(torch.float64).min, torch.finfo(torch.float32).min])
def test_rows_that_attend_to_nothing_have_no_gradient(padded: float) -> None:
    """Check queries that attend to nothing, or to nothing in one band: no NaN, and all weights sum to 1."""
    arguments = problem("window", 100, 100, learning=True)
    allowed = torch.ones(100, 100).tril().bool().repeat(2, 1, 1, 1)
    allowed[0, ..., :30] = False
    mask = torch.zeros(2, 1, 100, 100, dtype=torch.float64).masked_fill(~allowed, padded)
    weights = torch.randn(2, 100, 4, 8, dtype=torch.float64)
    out = banded_attention(*arguments, mask=mask, aligned=True, scaling=0.3)
    nothing = ~allowed.any(-1, keepdim=True)
    attending = ~nothing.transpose(1, 2)
    expected = dense(*arguments, mask=allowed | nothing, scaling=0.3) * attending
    torch.testing.assert_close(out * attending, expected, **EXACT)
    grads, expected_grads = (
        torch.autograd.grad((result * weights).sum(), leaves(arguments)) for result in (out, expected)
    )
    torch.testing.assert_close(grads, expected_grads, **EXACT)


def test_what_the_kernel_cannot_differentiate_takes_the_plain_form() -> None:
    arguments = problem("window", 60, 100, learning=True)
    mask = torch.zeros(1, 1, 60, 100, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"aligned": True, "scaling": 0.3}
    with Calls() as calls:
        (grad,) = torch.autograd.grad(banded_attention(*arguments, mask=mask, **options).sum(), [mask])
        for unsupported in ({"softcap": 5.0}, {"dropout": 0.5}):
            banded_attention(*arguments, mask=None, **options, **unsupported).sum().backward()
    assert grad.abs().max() > 0 and calls.count == 0

    branches, value, *places = arguments
    banded.SCORE_BYTES = 2**30  # checkpoints, which blocks of the plain form need, are not for torch.func

    def loss(of: torch.Tensor) -> torch.Tensor:
        return banded_attention(branches, of, *places, mask=None, **options).square().sum()

    expected = torch.autograd.grad(loss(value), [value])[0]
    torch.testing.assert_close(torch.func.grad(loss)(value), expected, **EXACT)
    compiled = torch.compile(loss, backend="eager")
    with Calls() as calls:
        torch.testing.assert_close(torch.autograd.grad(compiled(value), [value])[0], expected, **EXACT)


@pytest.mark.parametrize("shared", [False, True], ids=["rotated", "shared"])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_second_derivatives_equal_those_of_the_formula(shared: bool, sinks: bool) -> None:
    """Compare derivatives of a gradient, as penalties and influence functions ask for them."""
    branches, value, *places = problem("window", 60, 100, learning=True)
    if shared:  # a band that rotates nothing has the states of another
        branches = [branches[0]._replace(band=branch.band) for branch in branches]
    options: dict[str, Any] = {"scaling": 0.3}
    extra = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_()
    inputs = list(dict.fromkeys(leaves((branches, value, *places)))) + [extra] * sinks
    out = banded_attention(
        branches, value, *places, mask=None, aligned=True, sinks=extra if sinks else None, **options
    )
    first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in first), inputs)
    exact = dense(branches, value, *places, mask=causal_mask(60, 100), **options, sinks=extra if sinks else None)
    expected_first = torch.autograd.grad(exact.square().sum(), inputs, create_graph=True)
    expected = torch.autograd.grad(sum(grad.square().sum() for grad in expected_first), inputs)
    torch.testing.assert_close(first, expected_first, **EXACT)
    torch.testing.assert_close(second, expected, atol=1e-10, rtol=1e-8)  # float64; sums of sums in another order


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # its new name came in 5.2x
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_the_model(reentrant: bool) -> None:
    model = tiny_llama().train()
    patch_model(model, ReRoPE(window=16), factor=8)
    ids = tokens(LENGTH)
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with Calls() as calls:
            model(ids, labels=ids, use_cache=False).loss.backward()
        assert calls.count
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *grads)), "the same is computed again"


def test_autocast() -> None:
    """Check autocast with and without gradients: rotated states are float32, values bfloat16."""
    model = tiny_llama()
    patch_model(model, SelfExtend(group=4, window=12), factor=8)
    ids = tokens(LENGTH)
    with torch.autocast("cpu", torch.bfloat16), Calls() as calls:
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        with torch.no_grad():
            assert torch.equal(model(ids, labels=ids, use_cache=False).loss, loss)
    assert calls.count
    mixed = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    exact = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    # 8 bits in each of some products in a row
    assert (mixed - exact).norm() < 0.03 * exact.norm()
