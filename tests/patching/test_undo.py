"""Promises of undo: exact and complete, whoever has wrapped, hooked or changed the model meanwhile."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_posext import find_patch, load_patched, patch_model, unpatch_model
from hf_posext.errors import NotPatchedError, UndoError, UnsupportedModelError
from hf_posext.patching.long_rows import shifted_sparse_attention
from hf_posext.patching.modes import switched_attention, with_cache
from hf_posext.patching.undo import Mixin, UndoLog, mix, without

from ..conftest import TRAINED, logits, sharpen, tiny_bloom, tiny_llama, tokens
from ..zoo import build

LONG = tokens(3 * TRAINED)


class Stubborn:
    """Refuses to take an old value back, until it is told to."""

    def __init__(self) -> None:
        self.first, self.second, self.third = 1, 2, 3
        self.closed = False

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "second" and vars(self).get("closed"):
            raise OSError("closed")
        super().__setattr__(name, value)


def test_one_change_that_fails_does_not_stop_the_others_and_can_be_tried_again() -> None:
    thing, log = Stubborn(), UndoLog()
    for name in ("first", "second", "third"):
        log.set(thing, name, 0)
    thing.closed = True
    for _ in range(2):
        with pytest.raises(UndoError, match=r"1 changes could not be undone, the first at Stubborn.second \(OSError"):
            log.undo()
        assert (thing.first, thing.second, thing.third) == (1, 0, 3)
    thing.closed = False
    log.undo()
    assert thing.second == 2


def test_an_interrupted_undo_goes_on_where_it_was() -> None:
    thing, log, calls = Stubborn(), UndoLog(), []

    def interrupt() -> None:
        calls.append(len(calls))
        if len(calls) == 1:
            raise KeyboardInterrupt

    log.set(thing, "first", 0)
    log.on_undo(interrupt)
    log.set(thing, "third", 0)
    with pytest.raises(KeyboardInterrupt):
        log.undo()
    assert (thing.first, thing.third) == (0, 3)
    log.undo()
    assert thing.first == 1 and calls == [0, 1]


def test_a_patch_that_could_not_be_undone_stays_active(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    before = logits(model, LONG)
    patch = patch_model(model, "yarn", factor=8)
    fixed = property(lambda self: 1.0)  # cannot be set
    monkeypatch.setattr(LlamaRotaryEmbedding, "attention_scaling", fixed, raising=False)
    with pytest.raises(UndoError, match="attention_scaling"):
        patch.undo()
    assert patch.active and find_patch(model) is patch
    monkeypatch.undo()
    patch.undo()
    assert not patch.active and torch.equal(logits(model, LONG), before)
    with pytest.raises(NotPatchedError):
        patch.undo()


class Ours(Mixin):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = 2 * super().forward(x)  # type: ignore[misc]
        return out


class Others(Mixin):
    pass


class Theirs:
    pass


def test_a_class_that_somebody_made_of_ours_loses_ours_only() -> None:
    """As FSDP2 and parametrizations do: a subclass for one object."""
    module, log = nn.Linear(2, 2), UndoLog()
    log.set(module, "__class__", mix(Ours, nn.Linear))
    module.__class__ = type("FSDPLinear", (Theirs, type(module)), {"theirs": 1})
    log.undo()
    assert isinstance(module, Theirs) and not isinstance(module, Ours)
    assert type(module).__name__ == "FSDPLinear" and module.theirs == 1  # type: ignore[attr-defined]
    assert without(Ours, mix(Others, mix(Ours, nn.Linear))) is mix(Others, nn.Linear)


def test_what_is_made_from_the_class_of_a_patched_object_has_no_patch(tmp_path: Path) -> None:
    """Code that calls `type(model)(config)` gets a plain model, config or cache, which can be patched and saved."""
    model, ids, cache = tiny_llama(), LONG, DynamicCache()
    plain = model.config.to_dict()
    patch_model(model, "rerope(window=8)", factor=4)
    logits(model, ids, use_cache=True, **with_cache(model.forward, cache))
    config = type(model.config).from_dict(plain)
    twin = type(model)(config).eval()
    twin.load_state_dict(model.state_dict())
    assert (type(config), type(twin), type(type(cache)())) == (LlamaConfig, LlamaForCausalLM, DynamicCache)
    assert torch.equal(logits(twin, ids), logits(tiny_llama(), ids))
    patch_model(twin, "rerope(window=8)", factor=4)
    assert torch.equal(logits(twin, ids), logits(model, ids))
    unpatch_model(twin)
    twin.save_pretrained(tmp_path)
    assert LlamaConfig.from_pretrained(tmp_path).rope_parameters == plain["rope_parameters"]


@pytest.mark.parametrize("name", ["_old_forward", "forward", "anything"])
def test_methods_stored_on_the_object_follow_its_class(name: str) -> None:
    module, log, x = nn.Linear(2, 2), UndoLog(), torch.ones(1, 2)
    plain = module(x)
    vars(module)[name] = module.forward
    log.set(module, "__class__", mix(Ours, nn.Linear))
    assert torch.equal(vars(module)[name](x), 2 * plain)
    log.undo()
    assert torch.equal(vars(module)[name](x), plain)


@pytest.mark.parametrize("method", ["yarn", "rerope(window=8)"])
def test_frequencies_that_follow_the_longest_input_come_back(method: str) -> None:
    """Dynamic NTK keeps the longest input that it was called for. The calls of a patch are none of them."""
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    model = build("llama", rope_parameters=rope)
    expected = logits(build("llama", rope_parameters=rope), tokens(TRAINED + 26))
    with suppress(UnsupportedModelError):  # remapping wants fixed frequencies
        patch_model(model, method, factor=4).undo()
    assert model.model.rotary_emb.max_seq_len_cached == TRAINED
    assert torch.equal(logits(model, tokens(TRAINED + 26)), expected)


@pytest.mark.parametrize(
    ("method", "options"),
    [("log-n", {}), ("log-n", {"factor": 4}), ("llama4-temperature", {"factor": 4}), ("yarn", {"factor": 4})],
)
def test_frequencies_that_follow_the_input_depend_on_no_limit_of_ours(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """transformers computes those of dynamic NTK from `max_position_embeddings` of the config in each forward."""
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    plain, ids = build("llama", rope_parameters=rope), tokens(3 * TRAINED)
    expected = logits(plain, ids)
    patch = patch_model(plain, method, **options)
    patched = logits(plain, ids)
    if method != "yarn":  # queries within the trained length are as they were, and so are the keys that they see
        start = TRAINED - 1
        torch.testing.assert_close(patched[:, :start], expected[:, :start], atol=1e-5, rtol=0)
        assert (patched - expected)[:, TRAINED:].abs().max() > 1e-2 * expected.std()
    patch.save_pretrained(tmp_path / "saved")
    opened = load_patched(tmp_path / "saved")
    torch.testing.assert_close(logits(opened, ids), patched, atol=1e-5, rtol=0)  # weights at other addresses
    patch.undo()
    unpatch_model(opened)
    for model in (plain, opened):
        torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=0)


def test_settings_made_while_patched_are_kept() -> None:
    """The config comes back, unless somebody set something in it: then the model keeps its own, without our part."""
    model = tiny_llama()
    shared = model.config
    patch = patch_model(model, "yarn", factor=8)
    model.config.use_cache = False
    patch.undo()
    assert model.config is not shared and model.model.config is model.config
    assert model.config.use_cache is False and shared.use_cache is True
    assert model.config.max_position_embeddings == TRAINED
    assert model.config.rope_parameters == shared.rope_parameters


HALF, BACK = (torch.bfloat16,), (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("family", "method", "dtypes"),
    [
        *[(family, "table-linear", dtypes) for family in ("gpt2", "opt", "bart") for dtypes in (HALF, BACK)],
        *[("xglm", "sinusoid-linear", dtypes) for dtypes in (HALF, BACK)],
        *[(family, "yarn", dtypes) for family in ("llama", "gemma3_text") for dtypes in (HALF, BACK)],
        ("llama", "rerope(window=16)", HALF),
        ("llama", "dynamic-yarn", HALF),
    ],
)
def test_a_model_that_was_cast_while_patched(family: str, method: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """It is then what it would be if it had been cast without a patch, its frequencies among the rest."""
    model, twin = build(family), build(family)
    patch = patch_model(model, method, factor=4)
    for dtype in dtypes:
        model.to(dtype)
        twin.to(dtype)
    patch.undo()
    restored, expected = ({**cast.state_dict(), **dict(cast.named_buffers())} for cast in (model, twin))
    assert restored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert restored[name].dtype == tensor.dtype and torch.equal(restored[name], tensor), name
    assert torch.equal(logits(model, tokens(40)), logits(twin, tokens(40)))


@pytest.mark.parametrize("method", ["yarn", "dynamic-ntk", "dynamic-yarn", "yarn+log-n", "rerope"])
def test_a_pickled_model_can_be_undone_by_itself(method: str) -> None:
    model = tiny_llama()
    before = logits(model, LONG)
    patch_model(model, method, factor=8)
    patched = logits(model, LONG)
    for carried in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(logits(carried, LONG), patched)
        unpatch_model(carried)
        assert torch.equal(logits(carried, LONG), before)
    assert torch.equal(logits(model, LONG), patched)


def tiny_falcon() -> FalconForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return sharpen(FalconForCausalLM(FalconConfig(**sizes, alibi=True, new_decoder_architecture=False)))


def tiny_mpt() -> MptForCausalLM:
    torch.manual_seed(0)
    return sharpen(MptForCausalLM(MptConfig(vocab_size=128, d_model=64, n_heads=4, n_layers=2, max_seq_len=256)))


@pytest.mark.parametrize("build", [tiny_bloom, tiny_falcon, tiny_mpt])
@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_slopes_reach_layers_that_accelerate_offloads(build: Callable[[], Any], place: str, tmp_path: Path) -> None:
    model = build()
    before = logits(model, LONG)
    with patch_model(model, "alibi-linear", factor=4, trained_length=TRAINED):
        right = logits(model, LONG)
    model.save_pretrained(tmp_path / "model")
    blocks = next(path for path, module in model.named_modules() if isinstance(module, nn.ModuleList))
    modules_on_cpu = {
        path: "cpu"
        for path, module in model.named_modules()
        if path and not path.startswith(blocks) and not list(module.children())
    }
    places = modules_on_cpu | {f"{blocks}.0": "cpu", f"{blocks}.1": place}
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    torch.testing.assert_close(logits(again, LONG), before, atol=1e-5, rtol=0)  # read from a file, other addresses
    patch = patch_model(again, "alibi-linear", factor=4, trained_length=TRAINED)
    torch.testing.assert_close(logits(again, LONG), right, atol=1e-5, rtol=0)
    patch.undo()
    torch.testing.assert_close(logits(again, LONG), before, atol=1e-5, rtol=0)


def test_slopes_that_are_never_used_are_refused() -> None:
    model = tiny_bloom()
    before = logits(model, LONG)
    attention = model.transformer.h[0].self_attention
    model.transformer.h[0].self_attention = nn.Identity()  # so that nothing calls the layer by its hooks
    vars(model.transformer.h[0])["self_attention"] = attention.forward
    model.transformer.add_module("unused", attention)
    with pytest.raises(UnsupportedModelError, match="Expected .* to run with the slopes"):
        patch_model(model, "alibi-linear", factor=4, trained_length=TRAINED)
    assert torch.equal(logits(model, LONG), before)


def test_attention_is_switched_for_one_model_only() -> None:
    """Shifted sparse attention and attention scores take another implementation for a while, under a shared config."""
    model = tiny_llama().train()
    twin = type(model)(model.config).eval()
    before, shared = logits(twin, LONG), model.config
    for switched in (shifted_sparse_attention(model, 4), switched_attention(model, "eager")):
        with switched:
            assert model.config._attn_implementation != "sdpa" and twin.config._attn_implementation == "sdpa"
            assert torch.equal(logits(twin, LONG), before)
        assert model.config is shared and twin.config is shared


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_part_that_is_kept_alone_goes_on(attention: str) -> None:
    """The attention function stays registered as long as any module of the patched model lives."""
    model = tiny_llama()
    model.set_attn_implementation(attention)
    patch_model(model, "rerope(window=16)", factor=4)
    part, reference = model.model, weakref.ref(model)
    with torch.no_grad():
        expected = part(LONG)[0]
        del model
        gc.collect()
        assert reference() is None
        torch.testing.assert_close(part(LONG)[0], expected, atol=0, rtol=0)
