"""Rotation in attention on models of many kinds: numbers, undo, and refusals."""

from __future__ import annotations

import gc
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaForCausalLM, PreTrainedModel

from hf_posext import patch_model, unpatch_model
from hf_posext.errors import EvaluationError, UnsupportedModelError
from hf_posext.methods import DynamicNTK, LogN, ReRoPE, Sinks
from hf_posext.patching import modes

from ..conftest import TRAINED, logits, tiny_llama, tokens
from ..helpers import positions_of
from ..zoo import build

KEEPS = ReRoPE(window=TRAINED) + LogN()
"""Method that changes nothing within the trained length."""

WIDE = {"cohere2": {"sliding_window": 2 * TRAINED}}
"""Sliding windows wider than that of the method, which is refused if no layer sees farther."""


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss", "cohere2", "deepseek_v3", "hunyuan_v1_dense"])
def test_half_precision_is_within_its_own_noise(kind: str) -> None:
    """Compare the root mean square error of bfloat16 under late rotation with that of bfloat16 as shipped."""
    ids, model = tokens(60), build(kind, **WIDE.get(kind, {}))
    exact = logits(model, ids)
    model.to(torch.bfloat16)
    for path, module in model.named_modules():  # transformers loads half-precision models with exact frequencies
        for name in module._buffers:
            if name.endswith("inv_freq"):
                setattr(module, name, dict(build(kind).named_buffers())[f"{path}.{name}"])
    plain = logits(model, ids).float()
    patch_model(model, KEEPS, factor=8, trained_length=TRAINED)
    late = logits(model, ids).float()
    assert (late - plain).square().mean() <= (plain - exact).square().mean()


@pytest.mark.parametrize("kind", ["llama", "qwen3_5_text"])
def test_growing_frequencies_are_those_of_the_length(kind: str) -> None:
    """Compare doubled positions with those passed to the model, for one axis and for three."""
    model, ids = build(kind), tokens(60)
    with patch_model(model, DynamicNTK(), factor=8, trained_length=16) as patch:
        grown = logits(model, ids, use_cache=False)
        (entry,) = patch.plan.rotaries
    assert entry.growth is not None
    (rotary,) = [module for module in model.modules() if hasattr(module, "inv_freq")]
    moving, fixed = (torch.tensor(values, dtype=torch.float64) for values in (entry.growth.moving, entry.growth.kept))
    rotary.inv_freq = (moving * (60 / 16) ** -torch.tensor(entry.growth.power, dtype=torch.float64) + fixed).float()
    torch.testing.assert_close(grown, logits(model, ids, use_cache=False), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["smollm3", "cohere2"])
def test_layers_without_positions_are_left_alone(kind: str) -> None:
    model, ids = build(kind, **WIDE.get(kind, {})), tokens(60)
    before = logits(model, ids)
    patch_model(model, KEEPS, factor=8)
    torch.testing.assert_close(logits(model, ids), before, atol=1e-5, rtol=0)  # float32 sums in another order
    layers = next(model.modules())._posext_remapping.layers
    free = [path for path, module in model.named_modules() if hasattr(module, "q_proj") and path not in layers]
    assert 0 < len(free) < 6


@pytest.mark.parametrize(("kind", "sizes"), [("llama", {}), ("zamba2", {"chunk_size": 64})])
def test_log_n_grows_the_queries_of_every_layer(kind: str, sizes: dict[str, Any]) -> None:
    """Check query scales, also for the attention that layers of Zamba2 share, which has the number -1."""
    model, ids, hooks = build(kind, **sizes), tokens(60), []
    growth = (torch.arange(1, 61).double().log() / math.log(16)).clamp(min=1).float()[:, None]
    plain = logits(model, ids)
    for path, module in model.named_modules():
        if path.endswith("q_proj") or "linear_q_adapter_list." in path and path.endswith(".1"):
            hooks.append(module.register_forward_hook(lambda module, args, out: out * growth))
    assert hooks
    expected = logits(model, ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert (expected - plain).abs().max() > 1e-2
    patch_model(model, LogN(), factor=8, trained_length=16)
    torch.testing.assert_close(logits(model, ids, use_cache=False), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa"])
def test_sparse_attention_selects_as_the_model_does(kind: str) -> None:
    """Check models whose indexers select keys by rotated states: with 8 of 60 keys selected, a wrong rotation shows.

    Selections of prefill and decoding differ in the unpatched model, too, because many random scores are equal.
    """
    model, ids = build(kind, index_topk=8), tokens(60)

    def steps() -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        return torch.cat([logits(model, piece, cache=cache) for piece in ids.split([30, *[1] * 30], 1)], 1)

    before, decoded = logits(model, ids), steps()
    assert (logits(build(kind), ids) - before).abs().max() > 0.1, "the selection shows"
    with patch_model(model, KEEPS, factor=8):
        torch.testing.assert_close(logits(model, ids), before, atol=1e-5, rtol=0)  # float32 sums in another order
        torch.testing.assert_close(steps(), decoded, atol=1e-5, rtol=0)
    model = build(kind)  # picks all keys
    before = logits(model, ids)
    patch_model(model, ReRoPE(window=16), factor=8)
    torch.testing.assert_close(steps(), logits(model, ids), atol=1e-4, rtol=0)
    assert (logits(model, ids) - before).abs().max() > 0.1


def test_padding_gives_what_it_gives_without_the_patch() -> None:
    """Check padding of Recurrent Gemma, whose convolutions read padding tokens that attend to nothing."""
    model, ids = build("recurrent_gemma"), tokens(24, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    inputs = {"attention_mask": mask, "position_ids": positions_of(mask)}
    before = logits(model, ids, **inputs)
    patch_model(model, KEEPS, factor=8, trained_length=TRAINED)
    # float32 sums in another order
    torch.testing.assert_close(logits(model, ids, **inputs)[mask.bool()], before[mask.bool()], atol=1e-4, rtol=0)


def test_device_map_with_a_layer_on_disk(tmp_path: Path) -> None:
    """Check accelerate's hooks, which replace the forward of every module and load weights on demand."""
    ids, parts = tokens(60), ("embed_tokens", "layers.0", "norm", "rotary_emb")
    tiny_llama().save_pretrained(tmp_path)
    places = {"lm_head": "cpu", "model.layers.1": "disk", **{f"model.{part}": "cpu" for part in parts}}
    model = LlamaForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")

    def kept() -> dict[str, Any]:
        state = trace(model)  # without what accelerate makes anew for each forward
        return state | {
            "numbers": {name: number for name, number in state["numbers"].items() if "layers.1" not in name}
        }

    before, was, undivided = logits(model, ids), kept(), tiny_llama()
    assert any(parameter.is_meta for parameter in model.parameters())
    patch_model(undivided, ReRoPE(window=8), factor=8)
    patch = patch_model(model, ReRoPE(window=8), factor=8)
    assert torch.equal(logits(model, ids), logits(undivided, ids))
    patch.undo()
    assert kept() == was and torch.equal(logits(model, ids), before)


@pytest.mark.filterwarnings("ignore:.*quantiz")  # its successor, torchao, is a package of its own
def test_eight_bit_weights_stay(llama: LlamaForCausalLM) -> None:
    model = torch.ao.quantization.quantize_dynamic(llama, {torch.nn.Linear}, dtype=torch.qint8)
    weights = {path: module._packed_params for path, module in model.named_modules() if hasattr(module, "scale")}
    before = logits(model, tokens(60))
    with patch_model(model, KEEPS, factor=8):
        # the scale of 8-bit activations is their own, which differ in the last bit
        torch.testing.assert_close(logits(model, tokens(60)), before, atol=0.1, rtol=0)
        assert len(weights) > 10 and all(model.get_submodule(path)._packed_params is w for path, w in weights.items())
    assert torch.equal(logits(model, tokens(60)), before)
    for method in ("yarn", ReRoPE(window=8), DynamicNTK()):  # whichever comes first
        with patch_model(model, method, factor=8):
            expected = logits(model, tokens(90))
        patched = tiny_llama()
        patch_model(patched, method, factor=8)
        reduced = torch.ao.quantization.quantize_dynamic(patched, {torch.nn.Linear}, dtype=torch.qint8)
        assert torch.equal(logits(reduced, tokens(90)), expected)
        unpatch_model(reduced)
        assert torch.equal(logits(reduced, tokens(60)), before)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # its new name came in 5.2x
def test_positions_that_get_lost_are_missed_in_backward(llama: LlamaForCausalLM) -> None:
    """Check phases without their positions, like after a copy to another device: only a rerun layer needs them."""

    def copies(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {
            "position_embeddings": tuple(phases.clone() for phases in kwargs["position_embeddings"])
        }

    patch_model(llama, ReRoPE(window=8), factor=8)
    expected = logits(llama, tokens(40))
    for layer in llama.model.layers:
        layer.self_attn.register_forward_pre_hook(copies, with_kwargs=True, prepend=True)
    assert torch.equal(logits(llama, tokens(40)), expected)
    llama(tokens(40), use_cache=False).logits.sum().backward()
    llama.train().gradient_checkpointing_enable()
    with pytest.raises(EvaluationError, match="phases came without their positions.*_checkpointing_disable"):
        llama(tokens(40), use_cache=False).logits.sum().backward()


def registries() -> list[dict[str, Any]]:
    return [dict(interface._global_mapping) for interface in (AttentionInterface, AttentionMaskInterface)]


def trace(model: PreTrainedModel) -> dict[str, Any]:
    """Return all that a patch could leave in a model: attributes, hooks, classes, buffers, configs, parameters."""
    hooks = {
        f"{path}.{name}": dict(value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if "hooks" in name
    }
    attributes = {path: {*vars(module), type(module)} for path, module in model.named_modules()}
    numbers = {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    configs = [vars(config) for config in (model.config, model.config.get_text_config(decoder=True))]
    return {"hooks": hooks, "attributes": attributes, "numbers": numbers, "configs": json.dumps(configs, default=str)}


@pytest.fixture
def empty_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the names of patched models that are still alive, such as in the traceback of a test that failed."""
    gc.collect()
    monkeypatch.setattr(modes, "_users", Counter())
    for interface in (AttentionInterface, AttentionMaskInterface):
        for name in [name for name in interface._global_mapping if "posext" in name]:
            monkeypatch.delitem(interface._global_mapping, name)


@pytest.mark.usefixtures("empty_registries")
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_oss", "deepseek_v32"])
def test_undo_leaves_no_trace(kind: str) -> None:
    model, before = build(kind), registries()
    state, was = torch.get_rng_state(), trace(model)
    patch = patch_model(model, ReRoPE(window=16), factor=8)
    assert torch.equal(torch.get_rng_state(), state)
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert parameters.items() <= was["numbers"].items(), "weights are neither changed nor replaced"
    assert all(set(after) - set(old) for after, old in zip(registries(), before, strict=True))
    logits(model, tokens(40))
    patch.undo()
    assert trace(model) == was and registries() == before


def test_refused_and_broken_patches_leave_no_trace(llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    before = registries()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for model, error in ((build("falcon"), UnsupportedModelError), (llama, KeyboardInterrupt)):
        was = trace(model)
        with pytest.raises(error):
            patch_model(model, ReRoPE(window=16), factor=8)
        assert trace(model) == was and registries() == before
        monkeypatch.setattr("hf_posext.patching.patch.raise_limits", interrupt)  # the last thing that a patch does


def test_registries_are_freed_with_the_last_model() -> None:
    gc.collect()
    before = registries()
    models = [tiny_llama(), tiny_llama()]
    for model in models:
        patch_model(model, ReRoPE(window=16), factor=8)
    del model
    models.pop()
    gc.collect()
    logits(models[0], tokens(40))
    models.pop()
    gc.collect()
    assert registries() == before


def test_several_patched_models_at_once() -> None:
    ids = tokens(5 * TRAINED)
    methods = [ReRoPE(window=16), LogN(), DynamicNTK(), Sinks(sinks=4, window=20), ReRoPE(window=16)]
    bases = ["sdpa", "sdpa", "eager", "sdpa", "eager"]
    alone = []
    for method, base in zip(methods, bases, strict=True):
        with patch_model(model := tiny_llama(attn_implementation=base), method, factor=8):
            alone.append(logits(model, ids))
    models = [tiny_llama(attn_implementation=base) for base in bases]
    for model, method in zip(models, methods, strict=True):
        patch_model(model, method, factor=8)
    for model, expected in (*zip(models, alone, strict=True), *zip(models[::-1], alone[::-1], strict=True)):
        assert torch.equal(logits(model, ids), expected)
    torch.testing.assert_close(alone[0], alone[-1], atol=1e-4, rtol=0)  # two ways to attend; logits spread by 4


@pytest.mark.parametrize("kind", ["falcon", "gpt_neox_japanese"])
def test_models_outside_the_attention_interface_are_refused_by_name(kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"through transformers' AttentionInterface, got none in {kind}"):
        patch_model(build(kind), ReRoPE(window=16), factor=8)


@pytest.mark.parametrize("kind", ["modernbert", "eurobert"])
def test_encoders_have_no_far_past_but_their_queries_can_grow(kind: str) -> None:
    model = build(kind, task="masked-lm")
    before = logits(model, tokens(60))
    with pytest.raises(
        UnsupportedModelError, match=f"causal attention for rerope.*, got {kind}, which attends to both sides"
    ):
        patch_model(model, ReRoPE(window=16), factor=8)
    with patch_model(model, LogN(), factor=8):
        torch.testing.assert_close(logits(model, tokens(60)), before, atol=1e-5, rtol=0)
        longer = logits(model, tokens(90))
    assert (logits(model, tokens(90)) - longer).abs().max() > 1e-3


def test_attention_that_cannot_be_replaced(llama: LlamaForCausalLM) -> None:
    llama.config._attn_implementation_internal = "flash_attention_2"  # cannot be installed here
    with pytest.raises(UnsupportedModelError, match=r"'flash_attention_2'.*set_attn_implementation\('sdpa'\)"):
        patch_model(llama, ReRoPE(window=16), factor=8)
    llama.set_attn_implementation("sdpa")
    patch = patch_model(llama, ReRoPE(window=16), factor=8)
    expected = logits(llama, tokens(40))
    llama.set_attn_implementation("eager")
    with pytest.raises(EvaluationError, match="implementation of the patch, got 'eager'"):
        logits(llama, tokens(40))
    patch.undo()
    llama.set_attn_implementation("eager")
    patch_model(llama, ReRoPE(window=16), factor=8)
    torch.testing.assert_close(logits(llama, tokens(40)), expected, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")  # transformers passes it
def test_flex_attention_is_for_methods_that_leave_attention_alone() -> None:
    flexible = tiny_llama(attn_implementation="flex_attention")
    with patch_model(model := tiny_llama(), "yarn", factor=8), patch_model(flexible, "yarn", factor=8):
        # two ways to attend; logits spread by 4
        torch.testing.assert_close(logits(flexible, tokens(90)), logits(model, tokens(90)), atol=1e-4, rtol=0)
    for method in (ReRoPE(window=16), DynamicNTK(), LogN()):
        with pytest.raises(
            UnsupportedModelError, match="Expected 'sdpa' or 'eager' attention .* got 'flex_attention'"
        ):
            patch_model(flexible, method, factor=8)
        with patch_model(model, method, factor=8):
            model.set_attn_implementation("flex_attention")
            with pytest.raises(EvaluationError, match="implementation of the patch, got 'flex_attention'"):
                logits(model, tokens(90))
            model.set_attn_implementation("sdpa")


def test_saved_config_does_not_name_our_attention(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    patch_model(llama, ReRoPE(window=16), factor=8).save_pretrained(tmp_path / "patched")
    llama.save_pretrained(tmp_path / "plain")
    for directory in ("patched", "plain"):
        assert "posext-" not in (tmp_path / directory / "config.json").read_text()  # the plan is there, by its own key
    with pytest.raises(ValueError, match=r"hf_posext plan \(rerope\(window=16\)"):
        llama.__class__(llama.config)
