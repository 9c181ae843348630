"""Half as much is tried when memory runs out, the log says so, and values stay as they were."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from hf_posext import patch_model
from hf_posext.errors import OutOfMemoryError
from hf_posext.evaluation.forwards import Room, ran_out
from hf_posext.evaluation.protocols import MaskedScorer
from hf_posext.evaluation.scorer import Memory, TokenScorer
from hf_posext.methods import DynamicYaRN

from ..conftest import tiny_llama, tokens
from ..zoo import build
from .helpers import character_tokenizer, naive_nll

# Rows and chunks of other shapes round differently, as in test_prefill.py.
ROUNDING = {"rel": 2e-6, "abs": 2e-6}


def real_failure() -> None:
    """The error of torch on a CPU: a petabyte is more than any machine has."""
    torch.empty(2**50, dtype=torch.uint8)


def failure_of_cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation for the rest.")


def limit(module: nn.Module, tokens: int, fail: Any = real_failure) -> list[int]:
    """A module runs out of memory with more tokens (of all rows) than that; grows by those of every forward."""
    sizes: list[int] = []

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        sizes.append(args[0].shape[0] * args[0].shape[1])
        if sizes[-1] > tokens:
            fail()

    module.register_forward_pre_hook(hook)
    return sizes


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage().split(": ")[0] for record in caplog.records if record.name.startswith("hf_posext")]


def test_what_counts_as_out_of_memory() -> None:
    for fail in (real_failure, failure_of_cuda):
        with pytest.raises(RuntimeError) as caught:
            fail()
        assert ran_out(caught.value)
    assert ran_out(torch.OutOfMemoryError("in other words"))
    assert not ran_out(RuntimeError("The size of tensor a (4) must match the size of tensor b (8)"))
    assert not ran_out(ValueError("DefaultCPUAllocator: can't allocate memory"))


@pytest.mark.parametrize("fail", [real_failure, failure_of_cuda])
def test_batches_are_halved(llama: LlamaForCausalLM, fail: Any, caplog: pytest.LogCaptureFixture) -> None:
    ids = tokens(40, rows=11)
    expected = TokenScorer(llama).token_nll(ids).double().numpy()
    sizes = limit(llama.model.layers[1], 130, fail)
    scorer = TokenScorer(llama)
    assert scorer.token_nll(ids).double().numpy() == pytest.approx(expected, **ROUNDING)
    assert messages(caplog) == [
        "out of memory, so windows in a batch go from 11 to 5",
        "out of memory, so windows in a batch go from 5 to 2",
    ]
    assert sizes[3:] == [11 * 40, 5 * 40, *[2 * 40] * 5, 40], "after three forwards of the check"
    scorer.token_nll(tokens(20, rows=11))
    assert sizes[-3:] == [4 * 20, 4 * 20, 3 * 20], "the amount of tokens stays, whatever the windows"


def test_masked_texts_are_halved(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    model = build("bert", task="masked-lm")
    texts, targets = tokens(30, rows=9), torch.arange(9)
    expected = MaskedScorer(model, tokenizer).token_nll(texts, targets)
    limit(model.bert.encoder.layer[1], 100)
    assert MaskedScorer(model, tokenizer).token_nll(texts, targets).numpy() == pytest.approx(
        expected.numpy(), **ROUNDING
    )
    assert [message[-6:] for message in messages(caplog)] == ["9 to 4", "4 to 2"]


def test_slices_of_logits_are_halved(llama: LlamaForCausalLM, caplog: pytest.LogCaptureFixture) -> None:
    ids = tokens(50)
    limit(llama.lm_head, 20)
    forwards = limit(llama.model.layers[0], 10**9)
    nll = TokenScorer(llama).token_nll(ids)[0].double().numpy()
    assert messages(caplog) == [
        "out of memory, so rows of logits go from 49 to 24",
        "out of memory, so rows of logits go from 24 to 12",
    ]
    assert forwards[3:] == [50], "the trunk runs once"
    llama.lm_head._forward_pre_hooks.clear()
    assert nll == pytest.approx(naive_nll(llama, ids[0]), **ROUNDING)


@pytest.mark.parametrize(
    ("chunk", "expected"), [(None, ["560 to 280", "280 to 140"]), (200, ["200 to 100"]), (10_000, ["560 to 280"] * 1)]
)
def test_chunks_are_halved(
    llama: LlamaForCausalLM, chunk: int | None, expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the text was to be read as a whole."""
    ids = tokens(560)
    reference = naive_nll(llama, ids[0])
    limit(llama.model.layers[1].mlp, {None: 150, 200: 150, 10_000: 300}[chunk])
    scorer = TokenScorer(llama, Memory(prefill_chunk=chunk))
    nll = scorer.token_nll(ids)[0].double().numpy()
    assert messages(caplog) == [f"out of memory, so tokens in a chunk go from {step}" for step in expected]
    assert nll == pytest.approx(reference, **ROUNDING)
    assert scorer.token_nll(ids)[0].double().numpy() == pytest.approx(reference, **ROUNDING)
    assert len(caplog.records) == len(expected), "the shorter chunk stays"


def test_batches_go_before_chunks(llama: LlamaForCausalLM, caplog: pytest.LogCaptureFixture) -> None:
    ids = tokens(200, rows=2)
    expected = TokenScorer(llama).token_nll(ids).double().numpy()
    limit(llama.model.layers[1], 120)
    assert TokenScorer(llama).token_nll(ids).double().numpy() == pytest.approx(expected, **ROUNDING)
    assert messages(caplog) == [
        "out of memory, so windows in a batch go from 2 to 1",
        "out of memory, so tokens in a chunk go from 200 to 100",
    ]


def test_giving_up_says_what_to_type(llama: LlamaForCausalLM) -> None:
    limit(llama.model.layers[1], 16, failure_of_cuda)
    advice = "Pass shorter lengths, load the model with dtype=torch.bfloat16, or choose offload_cache=True on a CUDA"
    with pytest.raises(
        OutOfMemoryError, match=f"^Expected memory for 200 tokens, got .*not even in chunks of 100. {advice}"
    ) as error:
        TokenScorer(llama).token_nll(tokens(200))
    assert "(CUDA out of memory. Tried to allocate 2.00 GiB.)" in str(error.value)
    assert "\n" not in str(error.value)


def test_models_that_cannot_read_in_chunks_give_up(caplog: pytest.LogCaptureFixture) -> None:
    model = build("openai-gpt", n_positions=200)
    limit(model.transformer.h[1], 100)
    with pytest.raises(OutOfMemoryError, match="for 200 tokens, got .* and not in chunks either: it has no cache"):
        TokenScorer(model).token_nll(tokens(200))
    assert not messages(caplog)


def test_a_chunk_that_memory_asked_for_is_not_forced_on_other_patches(llama: LlamaForCausalLM) -> None:
    """After a static method has run out of memory, one that cannot read in chunks reads shorter texts as a whole."""
    sizes = limit(llama.model.layers[1], 150)
    scorer, ids = TokenScorer(llama), tokens(140)
    scorer.token_nll(tokens(200))
    with patch_model(llama, DynamicYaRN(factor=4)):
        assert scorer.token_nll(ids)[0].double().numpy() == pytest.approx(naive_nll(llama, ids[0]), **ROUNDING)
        with pytest.raises(OutOfMemoryError, match="positions of dynamic-yarn follow the length of the input"):
            scorer.token_nll(tokens(200))
    assert 140 in sizes


def test_other_errors_pass(llama: LlamaForCausalLM) -> None:
    def broken() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    limit(llama.model.layers[1], 30, broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        TokenScorer(llama).token_nll(tokens(40, rows=4))


def test_room_does_every_item_once() -> None:
    room, sizes, handled = Room("items", 10), [], []  # type: tuple[Room, list[int], list[int]]

    def run(items: range, fits: int = 3) -> None:
        for part in room.parts(items, cost=1):
            with part:
                sizes.append(part.end - part.begin)
                if sizes[-1] > fits:
                    real_failure()
                handled.extend(range(part.begin, part.end))

    run(range(4, 20))
    assert handled == list(range(4, 20))
    assert sizes == [10, 5, *[2] * 8]
    run(range(3, 3))
    run(range(3, -5))
    assert len(sizes) == 10
    room.amount = 10
    with pytest.raises(RuntimeError, match="allocate"):
        run(range(3), fits=0)
    assert sizes[10:] == [3, 1], "a single item that does not fit is an error"
    fixed = Room("items", 10, gives_way=False)
    with pytest.raises(RuntimeError, match="allocate"):
        for part in fixed.parts(range(3), cost=1):
            with part:
                real_failure()


def test_what_did_not_fit_is_freed_before_the_next_attempt() -> None:
    model = tiny_llama()
    tensors: list[Any] = []
    alive: list[int] = []

    class Buffer:
        """Stands for a large tensor of a forward that fails."""

    def hook(module: nn.Module, args: Any) -> None:
        local = Buffer()
        alive.append(sum(reference() is not None for reference in tensors))
        if args[0].shape[1] > 100:
            tensors.append(weakref.ref(local))
            real_failure()

    model.model.layers[1].register_forward_pre_hook(hook)
    TokenScorer(model).token_nll(tokens(200))
    assert len(tensors) == 1 and sum(alive) == 0
