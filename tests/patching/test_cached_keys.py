"""Rotated keys in the cache: rotations of a step, repeated rotations, and tensors that the host must not read."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaForCausalLM, StaticCache
from transformers.cache_utils import DynamicLayer

import hf_posext.patching.remap.cache as cache_module
import hf_posext.patching.remap.forward as forward_module
import hf_posext.patching.remap.rotated_keys as rotated_keys
from hf_posext import patch_model
from hf_posext.errors import EvaluationError
from hf_posext.methods import DualChunk, LeakyReRoPE, LogN, Method, ReRoPE, SelfExtend, Sinks, StringShift, YaRN
from hf_posext.patching.remap.layout import Layout

from ..conftest import logits, tiny_llama, tokens
from ..helpers import padded, positions_of
from ..zoo import build

METHODS: dict[str, Method] = {
    "rerope": ReRoPE(window=8),
    "yarn+leaky-rerope": YaRN() + LeakyReRoPE(window=8, stride=3.0),  # attention factor: rotations scale
    "self-extend": SelfExtend(group=4, window=8),
    "dual-chunk": DualChunk(chunk=12, local=4),
    "string-shift": StringShift(shift=8),
    "sinks": Sinks(window=12),
    "log-n": LogN(),
}
IDS = tokens(48)
CLOSE = {"atol": 1e-5, "rtol": 0.0}  # float32 sums in another order; logits spread by 4


def patched(name: str) -> LlamaForCausalLM:
    model = tiny_llama()
    patch_model(model, METHODS[name], factor=8, trained_length=16)
    return model


def steps(model: LlamaForCausalLM, cache: DynamicCache, bounds: list[int], ids: torch.Tensor = IDS) -> torch.Tensor:
    """Return the logits of the pieces between the bounds."""
    pairs = zip(bounds, bounds[1:], strict=False)
    return torch.cat([logits(model, ids[:, start:stop], cache=cache) for start, stop in pairs], 1)


@pytest.mark.parametrize("name", METHODS)
def test_steps_chunks_and_crops_equal_one_forward(name: str) -> None:
    """Compare single tokens, a chunk, and a crop with one forward. A copy of the cache continues separately."""
    model = patched(name)
    expected = logits(model, IDS, use_cache=False)
    cache = DynamicCache(config=model.config)
    stepped = steps(model, cache, [0, 20, 21, 22, 23, 31, 32, 33])
    torch.testing.assert_close(stepped, expected[:, :33], **CLOSE)
    twin = copy.deepcopy(cache)
    cache.crop(-5)
    torch.testing.assert_close(steps(model, cache, [28, 29, 30, 34, 35, 36]), expected[:, 28:36], **CLOSE)
    torch.testing.assert_close(steps(model, twin, [33, 34, 35]), expected[:, 33:35], **CLOSE)


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt_oss", "mistral"])
@pytest.mark.parametrize("name", METHODS)
def test_crops_bring_back_keys_behind_the_window(name: str, kind: str) -> None:
    """Draft models do that: their layers record keys behind their window."""
    # all layers of Mistral have one: no longer than the trained length of 16, yarn would have no effect
    model = build(kind, sliding_window=18 if kind == "mistral" else 16)
    patch_model(model, METHODS[name], factor=8, trained_length=16)
    expected = logits(model, IDS, use_cache=False)
    cache = DynamicCache(config=model.config)
    records = hasattr(cache, "activate_past_recording")
    if records:
        cache.activate_past_recording()
    torch.testing.assert_close(steps(model, cache, [0, 23, 24]), expected[:, :24], **CLOSE)
    last = 24
    for back, bounds in ((3, [1, 2, 7, 8, 9]), (5, [1, 4, 5]), (0, [1, 2, 3])) if records else ():
        cache.crop(-back)
        after = [last - back, *(last - back + bound for bound in bounds)]
        stepped = steps(model, cache, after)
        last = after[-1]
        torch.testing.assert_close(stepped, expected[:, after[0] : last], **CLOSE)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
@pytest.mark.parametrize("name", METHODS)
def test_the_last_layers_use_the_keys_of_others(name: str, kind: str, static: bool) -> None:
    """The cache has no layers of theirs, or (transformers 5.24) empty ones; half of them see a window of 16."""
    types = ["sliding_attention", "full_attention"] * 3
    model = build(kind, num_kv_shared_layers=2, layer_types=types)
    patch_model(model, METHODS[name], factor=8, trained_length=16)
    expected = logits(model, IDS, use_cache=False)
    cache = StaticCache(config=model.config, max_cache_len=48) if static else DynamicCache(config=model.config)
    stepped = steps(model, cache, [0, 23, 24, 25, 31, 32, 33])
    # a fifth of the logits' spread of 20 is from the last layers; float32 sums in another order
    torch.testing.assert_close(stepped, expected[:, :33], atol=1e-4, rtol=0)


def test_a_mask_for_other_keys_is_refused() -> None:
    """As by the unpatched model, with an error."""
    model = tiny_llama()
    mask = torch.ones(1, 1, 20, 22, dtype=torch.bool).tril(2)
    for method in (None, ReRoPE(window=8), DualChunk(chunk=12, local=4)):
        patch = patch_model(model, method or "none", factor=8, trained_length=16)
        with patch, pytest.raises(EvaluationError if method else RuntimeError):
            logits(model, IDS[:, :20], attention_mask=mask)


@pytest.mark.parametrize("kind", ["dynamic", "static", "sliding"])
def test_a_step_rotates_the_key_that_leaves(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a step changes only the key that leaves the window: all other cached keys keep their bits.

    The model rotates the new key. The cache may have free slots, or drop keys behind a window of 16.
    """
    model = build("gemma2") if kind == "sliding" else tiny_llama()
    patch_model(model, METHODS["self-extend"], factor=8, trained_length=16)
    static = StaticCache(config=model.config, max_cache_len=64)
    cache = static if kind == "static" else DynamicCache(config=model.config)
    assert any(layer.is_sliding for layer in cache.layers) is (kind == "sliding")
    steps(model, cache, [0, 30, 31])
    before = [layer.keys[:, :, :31].clone() for layer in cache.layers]
    rotated: list[int] = []
    for rotate in (Layout.rotate, Layout.rotate_):

        def counted(self: Layout, states: torch.Tensor, phases: Any, rotate: Any = rotate) -> Any:
            rotated.append(states.shape[2])
            return rotate(self, states, phases)

        monkeypatch.setattr(Layout, rotate.__name__, counted)
    steps(model, cache, [31, 32])
    for layer, old in zip(cache.layers, before, strict=True):
        new = layer.keys[:, :, :32][:, :, :-1]
        old = old[:, :, -new.shape[2] :]
        changed = (new != old).any(-1).flatten(0, 1).any(0).nonzero().flatten()
        assert (new.shape[2] - changed).tolist() == [8]  # so far behind the new one
    assert max(rotated) == 1


@pytest.mark.parametrize("name", METHODS)
def test_padded_rows_equal_rows_alone(name: str) -> None:
    model = patched(name)
    short = IDS[:, : 48 - 9]
    ids, mask = padded(short, IDS)
    positions = positions_of(mask)
    cache, pieces = DynamicCache(config=model.config), []
    bounds = [0, 36, 37, 38, 42, 43, 44, 45, 46, 47, 48]
    for start, stop in zip(bounds, bounds[1:], strict=False):
        inputs: dict[str, Any] = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        pieces.append(logits(model, ids[:, start:stop], cache=cache, **inputs))
    rows = torch.cat(pieces, 1)
    torch.testing.assert_close(rows[1:], logits(model, IDS, use_cache=False), **CLOSE)
    torch.testing.assert_close(rows[:1, 9:], logits(model, short, use_cache=False), **CLOSE)


def test_a_position_that_does_not_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that keys are rotated again after a gap in positions, which is an error if the host cannot see it."""
    model = patched("rerope")
    cache = DynamicCache(config=model.config)
    steps(model, cache, [0, 20, 21])
    monkeypatch.setattr(rotated_keys, "step_keys", None)  # what must not be called
    gap = {"position_ids": torch.tensor([[30]]), "attention_mask": torch.ones(1, 22).long()}
    last = logits(model, IDS[:, 21:22], cache=copy.deepcopy(cache), **gap)
    where = torch.cat([torch.arange(21), torch.tensor([30])])[None]
    expected = logits(model, IDS[:, :22], position_ids=where, attention_mask=gap["attention_mask"], use_cache=False)
    torch.testing.assert_close(last, expected[:, -1:], **CLOSE)
    wait_for_devices(monkeypatch)
    with pytest.raises(RuntimeError, match="must follow those in the cache"):
        logits(model, IDS[:, 21:22], cache=cache, **gap)


def wait_for_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the host wait for each tensor that it reads, like on a GPU."""
    for module in (cache_module, forward_module):
        monkeypatch.setattr(module, "seen_for_free", lambda tensor: False)


class Waits(TorchFunctionMode):
    """Recorder of calls that would make the host wait for a device."""

    names = (
        "item",
        "tolist",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "cpu",
        "numpy",
        "nonzero",
        "unique",
        "equal",
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.names:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Scalars(TorchDispatchMode):
    """Recorder of such calls below Python, like indexing by a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "unique", "equal")):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", METHODS)
def test_decoding_waits_for_no_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wait_for_devices(monkeypatch)
    model = patched(name)
    cache = DynamicCache(config=model.config)
    steps(model, cache, [0, 20])
    with Waits() as waits, Scalars() as scalars:
        steps(model, cache, [20, 21, 22, 23])
    assert not waits.seen and not scalars.seen
    with Waits() as waits:
        steps(model, cache, [23, 26])
    assert waits.seen, "the count counts: several tokens are looked at"


@pytest.mark.parametrize("pieces", [[0, 21], [0, 20, 21]])
@pytest.mark.parametrize("name", METHODS)
def test_a_cache_of_another_patch_is_refused(name: str, pieces: list[int], llama: LlamaForCausalLM) -> None:
    """Rotated or not, keys of all layers but the first were computed under that patch."""
    cache, lengths = DynamicCache(config=llama.config), {"factor": 8, "trained_length": 16}
    with patch_model(llama, METHODS[name], **lengths):
        steps(llama, cache, pieces)
    with patch_model(llama, ReRoPE(window=12), **lengths), pytest.raises(EvaluationError, match="under another patch"):
        steps(llama, cache, [21, 22])
    with patch_model(llama, METHODS[name], **lengths):
        last = steps(llama, cache, [21, 22])
        torch.testing.assert_close(last, logits(llama, IDS[:, :22], use_cache=False)[:, -1:], **CLOSE)


def test_a_layer_that_lost_its_rotated_keys_is_refused() -> None:
    """Check the error for a layer that lost its rotated keys: the model has already rotated the new key for these."""
    model = patched("rerope")
    cache = DynamicCache(config=model.config)
    steps(model, cache, [0, 20, 21])

    class Other(DynamicLayer):
        pass

    cache.layers[0].__class__ = Other
    with pytest.raises(EvaluationError, match="other keys than those.*Start with an empty"):
        logits(model, IDS[:, 21:22], cache=cache)


def test_a_set_with_unrotated_keys_rotates_in_attention() -> None:
    """Check that the model never rotates for a layer that keeps its keys in another kind of cache."""
    model = patched("rerope")
    cache = DynamicCache(config=model.config)

    class Other(DynamicLayer):
        pass

    steps(model, cache, [0, 20])
    cache.layers[0].__class__ = Other
    stepped = steps(model, cache, list(range(20, 34)))
    torch.testing.assert_close(stepped, logits(model, IDS, use_cache=False)[:, 20:33], **CLOSE)
