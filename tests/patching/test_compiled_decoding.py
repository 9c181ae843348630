"""Decoding steps in one compiled graph, with a cache at fixed addresses, like CUDA graphs require."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from hf_posext import patch_model
from hf_posext.errors import EvaluationError
from hf_posext.methods import (
    DPE,
    Decay,
    DualChunk,
    DynamicNTK,
    Fade,
    JetLong,
    LeakyReRoPE,
    Method,
    ReRoPE,
    SelfExtend,
    StringShift,
)
from hf_posext.patching.modes import with_cache
from hf_posext.patching.remap import attention as attention_module

from ..conftest import tiny_llama, tokens
from ..helpers import positions_of
from ..zoo import build

BANDED: list[Method] = [
    SelfExtend(group=4, window=8),
    ReRoPE(window=14),  # keys leave the window in the middle of the steps
    LeakyReRoPE(window=8, stride=3.0),
    DualChunk(chunk=12, local=4),
    StringShift(shift=8),
    ReRoPE(window=14) + Fade(reference=6),
    LeakyReRoPE(window=8) + Decay(start=9) + Fade(reference=4, strength=0.5),
    DualChunk(chunk=12, local=4) + Fade(reference=3),
]
METHODS: list[str | Method] = [
    *BANDED,
    DynamicNTK(),
    JetLong(),
    JetLong(window=8, frequencies=True),
    DPE(scales=[4, 2], window=8),
    "yarn",
]
TEXT, SLOTS, STEPS = 10, 48, 14
CLOSE = {"atol": 1e-5, "rtol": 0.0}  # float32, sums in another order


class Reader:
    """Reader of a partly padded text into a cache, then of one token at a time."""

    def __init__(self, model: LlamaForCausalLM, cache: Any, padding: int) -> None:
        self.model, self.cache, self.padding, self.count = model, cache, padding, 0
        self.ids = tokens(64).to(model.device)
        self.mask = torch.ones_like(self.ids)
        self.mask[:, :padding] = 0

    @torch.no_grad()
    def read(self, count: int, forward: Any = None) -> torch.Tensor:
        """Return the logits of the last of `count` more tokens."""
        piece = slice(self.count, self.count + count)
        self.count += count
        slots = SLOTS if isinstance(self.cache, StaticCache) else self.count  # free slots are masked as later ones are
        logits: torch.Tensor = (forward or self.model)(
            input_ids=self.ids[:, piece],
            position_ids=positions_of(self.mask)[:, piece],
            attention_mask=self.mask[:, :slots] if self.padding else None,
            **with_cache(self.model.forward, self.cache),
        ).logits[:, -1]
        return logits


def two(model: LlamaForCausalLM, padding: int) -> tuple[Reader, Reader]:
    """Return a reader with a static cache and one with a growing cache, after both have read the text."""
    readers = (
        Reader(model, StaticCache(config=model.config, max_cache_len=SLOTS), padding),
        Reader(model, DynamicCache(config=model.config), padding),
    )
    for reader in readers:
        reader.read(TEXT)
    return readers


def one_graph(model: LlamaForCausalLM, backend: str = "eager") -> tuple[Any, CompileCounterWithBackend]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model.__call__, backend=counter, fullgraph=True), counter


def rotated_keys(method: str | Method, step: int) -> list[int]:
    """Return the slots of the new key and of the key that has just left the window. Position 0 needs no rotation."""
    name = method if isinstance(method, str) else method.label
    far = TEXT + step - (14 if name.startswith("rerope") else 8)
    leaving = [] if name.startswith(("dual-chunk", "string-shift")) or far <= 0 else [far]
    return [*leaving, TEXT + step]


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("method", METHODS)
def test_steps_in_one_graph(method: str | Method, padding: int) -> None:
    """Compare compiled steps with uncompiled ones, then a step, a piece of text, and steps in the same graph.

    A step of a remapping method changes only the new key and the key that leaves the window.
    """
    model = tiny_llama()
    with patch_model(model, method, factor=8, trained_length=16):
        static, growing = two(model, padding)
        forward, graphs = one_graph(model)
        for step in range(STEPS):
            before = static.cache.layers[0].keys.clone()
            torch.testing.assert_close(static.read(1, forward), growing.read(1), **CLOSE)
            changed = (static.cache.layers[0].keys != before).any(-1).any(1)[0].nonzero().flatten().tolist()
            if method in METHODS[:8] and not padding:
                assert changed == rotated_keys(method, step)
        assert graphs.frame_count == 1
        for count in (1, 4, 1):
            torch.testing.assert_close(static.read(count), growing.read(count), **CLOSE)
        for _ in range(3):
            torch.testing.assert_close(static.read(1, forward), growing.read(1), **CLOSE)
        assert graphs.frame_count == 1


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_5_text"])
def test_other_caches(family: str) -> None:
    """Check layers with rolling keys, and layers without keys: graphs may break, and all keys are rotated."""
    model: Any = build(family)
    patch_model(model, METHODS[1], factor=8, trained_length=16)
    static, growing = two(model, 0)
    torch._dynamo.reset()
    forward = torch.compile(model.__call__, backend="eager")
    for _ in range(6):
        torch.testing.assert_close(static.read(1, forward), growing.read(1), **CLOSE)


@pytest.mark.parametrize("method", METHODS[:4])
def test_copies_of_a_cache_go_on(method: Method) -> None:
    """Of a beginning that several texts share, copied before and after compiled steps."""
    model = tiny_llama()
    patch_model(model, method, factor=8, trained_length=16)
    readers = two(model, 0)
    forward, _ = one_graph(model)
    for _ in range(2):
        twins = [copy.copy(reader) for reader in readers]
        for twin in twins:
            twin.cache = copy.deepcopy(twin.cache)
        for static, growing in (readers, twins):
            for _ in range(3):
                torch.testing.assert_close(static.read(1, forward), growing.read(1), **CLOSE)


def test_a_cache_that_is_used_again() -> None:
    """Check a cache after `reset`, and a selection of rows after compiled steps."""
    model = tiny_llama()
    patch_model(model, METHODS[1], factor=8)
    static, _ = two(model, 0)
    forward, graphs = one_graph(model)
    rounds = []
    for _ in range(2):
        rounds.append(torch.cat([static.read(1, forward) for _ in range(4)]))
        static.cache.reset()
        static.count = 0
        static.read(TEXT)
    assert torch.equal(*rounds) and graphs.frame_count == 1
    static.read(1, forward)
    static.cache.reorder_cache(torch.tensor([0]))
    _, growing = two(model, 0)
    growing.read(1)
    torch.testing.assert_close(static.read(1, forward), growing.read(1), **CLOSE)


def test_a_token_that_does_not_follow() -> None:
    model = tiny_llama()
    patch_model(model, METHODS[1], factor=8)
    static, _ = two(model, 0)
    forward, _ = one_graph(model)
    static.read(1, forward)
    with pytest.raises(RuntimeError, match="must follow"), torch.no_grad():
        forward(
            input_ids=static.ids[:, :1],
            position_ids=torch.tensor([[40]]),
            **with_cache(model.forward, static.cache),
        )


def test_another_model_cannot_read_the_cache_in_a_graph() -> None:
    model = tiny_llama()
    with patch_model(model, METHODS[1], factor=8):
        static, _ = two(model, 0)
        static.read(1, one_graph(model)[0])
    with pytest.raises(EvaluationError, match="no other model can read"):
        static.read(1)


def test_a_text_outside_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a graph breaks at chunks on an unproven device, and that a full graph is refused."""
    monkeypatch.setattr(attention_module, "UNPROVEN_ON", "cpu")
    model, ids = tiny_llama(), tokens(30)
    patch_model(model, METHODS[3], factor=8, trained_length=16)
    with torch.no_grad():
        expected = model(ids).logits
        full_graph, _ = one_graph(model)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="function _banded_attention"):
            full_graph(ids)
        torch._dynamo.reset()
        broken_graph = torch.compile(model.__call__, backend="eager")(ids).logits
    torch.testing.assert_close(broken_graph, expected, **CLOSE)


@pytest.mark.parametrize("method", [METHODS[1], METHODS[3], METHODS[6]])
def test_steps_that_inductor_compiles(method: Method) -> None:
    model = tiny_llama()
    patch_model(model, method, factor=8)
    static, growing = two(model, 0)
    forward, graphs = one_graph(model, "inductor")
    for _ in range(4):
        torch.testing.assert_close(static.read(1, forward), growing.read(1), **CLOSE)
    assert graphs.frame_count == 1
