"""Isolation of the state of a forward: threads, nested calls, hooks and copies of one patched model."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

from hf_posext import patch_model, unpatch_model
from hf_posext.errors import EvaluationError
from hf_posext.methods import LogN, Method, YaRN
from hf_posext.patching.modes import CHECKPOINTING, with_cache

from ..conftest import logits, tiny_llama, tokens
from ..zoo import build
from .test_remapping_inputs import ALL

METHODS: dict[str, Method] = ALL | {"yarn+log-n": YaRN() + LogN()}
CLOSE = {"atol": 1e-5, "rtol": 0.0}  # float32 sums in another order; logits spread by 4


def patched(name: str, model: PreTrainedModel | None = None) -> Any:
    model = model or tiny_llama()
    patch_model(model, METHODS[name], factor=8, trained_length=16)
    return model


def calls() -> list[dict[str, Any]]:
    """Return inputs of different lengths, positions and padding."""
    padded = torch.cat([torch.zeros(1, 9).long(), tokens(21, seed=1)], 1)
    return [
        {"input_ids": tokens(40)},
        {"input_ids": padded, "attention_mask": (padded != 0).long()},
        {"input_ids": tokens(40, seed=2), "position_ids": 3 * torch.arange(40)[None]},
        {"input_ids": tokens(24, rows=2, seed=3), "position_ids": torch.arange(12).repeat(2)[None].expand(2, -1)},
    ]


@pytest.fixture
def impatient() -> Iterator[None]:
    """Make threads switch often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def in_threads(work: Callable[[int], torch.Tensor], count: int, rounds: int) -> list[list[torch.Tensor]]:
    """Run functions in threads at once and return their results. An error in any of them is raised."""
    results: list[list[torch.Tensor]] = [[] for _ in range(count)]
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            results[index] += [work(index) for _ in range(rounds)]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error
    return results


@pytest.mark.parametrize("name", METHODS)
def test_forwards_in_threads(name: str, impatient: None) -> None:
    model, inputs = patched(name), calls()
    for call in inputs[:2]:
        call["use_cache"] = False

    @torch.no_grad()
    def forward(index: int) -> torch.Tensor:
        out: torch.Tensor = model(**inputs[index]).logits
        return out

    alone = [forward(index) for index in range(4)]
    for index, outs in enumerate(in_threads(forward, 4, 6)):
        assert all(torch.equal(out, alone[index]) for out in outs)


@pytest.mark.parametrize("name", ["rerope", "dual-chunk", "dynamic-ntk"])
def test_generation_in_threads(name: str, impatient: None) -> None:
    model = patched(name)
    prompts = [tokens(count, seed=count) for count in (20, 33, 26, 15)]

    def generate(index: int) -> torch.Tensor:
        ids = prompts[index]
        settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        generated: torch.Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        return generated

    alone = [generate(index) for index in range(4)]
    for index, outs in enumerate(in_threads(generate, 4, 2)):
        assert all(torch.equal(out, alone[index]) for out in outs)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # its new name came in 5.2x
def test_training_in_threads(impatient: None) -> None:
    """Check checkpoints that run layers again in backward, while other threads continue."""
    model = patched("rerope").train()
    model.gradient_checkpointing_enable()
    inputs = calls()

    def gradient(index: int) -> torch.Tensor:
        loss = model(**inputs[index], use_cache=False).logits.square().mean()
        (grad,) = torch.autograd.grad(loss, [model.model.layers[0].self_attn.q_proj.weight])
        return grad

    alone = [gradient(index) for index in range(4)]
    for index, grads in enumerate(in_threads(gradient, 4, 3)):
        assert all(torch.equal(grad, alone[index]) for grad in grads)


@pytest.mark.parametrize("name", ["rerope", "dynamic-ntk", "log-n"])
def test_a_forward_within_a_forward(name: str) -> None:
    """Check a layer hook that calls the same model, another patched model, and one that fails."""
    model, neighbour = patched(name), patched("self-extend")
    ids = tokens(40)
    expected = logits(model, ids)
    inner: list[torch.Tensor] = []
    busy = False

    def ask(*_: Any) -> None:
        nonlocal busy
        if not busy:
            busy = True
            inner.append(logits(model, ids[:, :25], **gaps))
            inner.append(logits(neighbour, ids))
            with pytest.raises(IndexError):
                logits(model, ids + 1000)
            busy = False

    gaps = {"position_ids": 2 * torch.arange(25)[None], "use_cache": False}
    expected_inner = logits(model, ids[:, :25], **gaps), logits(neighbour, ids)
    handle = model.model.layers[0].mlp.register_forward_hook(ask)
    cache = DynamicCache(config=model.config)
    stepped = torch.cat(
        [logits(model, piece, **with_cache(model.forward, cache)) for piece in ids.split([30, 1, 9], 1)], 1
    )
    handle.remove()
    expected = (
        expected if "dynamic" not in name else torch.cat([expected[:, :0], stepped], 1)
    )  # follows the length that is read
    torch.testing.assert_close(stepped, expected, **CLOSE)
    for actual, right in zip(inner, expected_inner * 3, strict=True):
        assert torch.equal(actual, right)


def test_a_failed_forward_leaves_nothing(llama: LlamaForCausalLM) -> None:
    patched("rerope", llama)
    ids = tokens(40)
    expected = logits(llama, ids)
    cache = DynamicCache(config=llama.config)
    logits(llama, ids[:, :20], **with_cache(llama.forward, cache))

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = llama.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        logits(llama, ids[:, 20:21], **with_cache(llama.forward, cache))
    handle.remove()
    assert torch.equal(logits(llama, ids), expected)
    with pytest.raises(EvaluationError, match="got 21 keys"):  # the first layer has the new key, the second has not
        logits(llama, ids[:, 20:21], **with_cache(llama.forward, cache))


def test_a_hook_that_changes_the_cache(llama: LlamaForCausalLM) -> None:
    """Check that a cache replaced by an earlier hook is followed, and by a later hook detected."""
    ids, cache = tokens(40), DynamicCache(config=llama.config)
    puts = lambda module, args, kwargs: (args, kwargs | with_cache(module.forward, cache))  # noqa: E731
    handle = llama.model.register_forward_pre_hook(puts, with_kwargs=True)
    patched("rerope", llama)
    stepped = torch.cat([logits(llama, piece) for piece in ids.split([30, 1, 9], 1)], 1)
    handle.remove()
    torch.testing.assert_close(stepped, logits(llama, ids), **CLOSE)
    cache = DynamicCache(config=llama.config)
    llama.model.register_forward_pre_hook(puts, with_kwargs=True)
    with pytest.raises(EvaluationError, match="registered after the patch"):
        logits(llama, ids[:, :1], use_cache=False)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_copies_and_pickles(name: str, kind: str) -> None:
    """Check a rotary module with two mixins."""
    model, ids = build(kind), tokens(60)
    before = logits(model, ids)
    patched(name, model)
    expected = logits(model, ids)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
    ):
        assert torch.equal(logits(twin, ids), expected)
        unpatch_model(twin)
        assert torch.equal(logits(twin, ids), before)
    assert torch.equal(logits(model, ids), expected)


def test_an_interrupted_forward_is_forgotten_by_the_next() -> None:
    """Check states after an interrupt, for which PyTorch calls no hook. Nested forwards keep theirs."""
    model, neighbour = patched("rerope"), tiny_llama()
    patch_model(neighbour, METHODS["rerope"], factor=8, trained_length=16)
    expected, inner = logits(model, tokens(40)), logits(neighbour, tokens(24))
    cache = DynamicCache(config=model.config)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with model.model.layers[1].register_forward_pre_hook(fail), pytest.raises(KeyboardInterrupt):
        logits(model, tokens(40), **with_cache(model.forward, cache))
    reference = weakref.ref(cache)
    del cache
    gc.collect()
    assert reference() is not None  # by the state of that forward
    inner_logits = []
    with model.model.layers[1].register_forward_pre_hook(
        lambda *_: inner_logits.append(logits(neighbour, tokens(24)))
    ):
        assert torch.equal(logits(model, tokens(40)), expected)
    gc.collect()
    assert reference() is None and torch.equal(inner_logits[0], inner)


def test_a_checkpoint_keeps_nothing_of_the_model() -> None:
    model = patched("rerope").train()
    getattr(model, f"{CHECKPOINTING}_enable")()
    loss = model(input_ids=tokens(40), use_cache=False).logits.square().mean()
    torch.autograd.grad(loss, [model.model.layers[0].self_attn.q_proj.weight])
    reference = weakref.ref(model)
    del model, loss
    gc.collect()
    assert reference() is None
