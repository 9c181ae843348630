"""Presets: which weights are trained, found by what they are in models whose names differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from hf_posext.errors import InvalidParameterError, UnsupportedModelError
from hf_posext.patching.sites import attention_projections, embeddings, norms, shortest_names
from hf_posext.training import PRESETS, Preset
from hf_posext.training.settings import adapter_config, as_preset

from ..conftest import logits, tiny_bloom, tiny_gpt2, tiny_llama, tokens
from .helpers import adapted

SIZES: dict[str, Any] = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}


def tiny_neox(**overrides: Any) -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, num_attention_heads=4, **overrides)).eval()


def tiny_deepseek() -> DeepseekV3ForCausalLM:
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    sizes = {"moe_intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES, **ranks, **experts, **sizes, first_k_dense_replace=1))


MODELS = {
    "llama": (tiny_llama, ["k_proj", "o_proj", "q_proj", "v_proj"], ["embed_tokens"], 5),
    # its MLP has a c_proj, too
    "gpt2": (tiny_gpt2, ["attn.c_proj", "c_attn"], ["wpe", "wte"], 5),
    "bloom": (tiny_bloom, ["dense", "query_key_value"], ["word_embeddings"], 6),
    "gpt_neox": (tiny_neox, ["dense", "query_key_value"], ["embed_in"], 5),
    "deepseek_v3": (
        tiny_deepseek,
        ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"],
        ["embed_tokens"],
        9,
    ),
}


@pytest.mark.parametrize("family", MODELS)
def test_attention_embeddings_and_norms_are_found_by_what_they_are(family: str) -> None:
    build, projections, tables, count_of_norms = MODELS[family]
    model = build()
    assert shortest_names(attention_projections(model), model) == projections
    assert shortest_names(embeddings(model), model) == tables
    assert len(norms(model)) == count_of_norms
    assert all("norm" in path or "ln_" in path for path in norms(model))


@pytest.mark.parametrize("family", MODELS)
def test_lora_plus_trains_projections_embeddings_and_norms_and_nothing_else(family: str) -> None:
    model = MODELS[family][0]()
    expected = {*embeddings(model), *norms(model)}
    layers = set(attention_projections(model))
    network = adapted(model, PRESETS["lora-plus"])
    trained = {name.removeprefix("base_model.model.") for name, w in network.named_parameters() if w.requires_grad}
    fully_trained = {name.split(".modules_to_save.")[0] for name in trained if ".modules_to_save." in name}
    with_lora = {name.split(".lora_")[0] for name in trained if ".lora_" in name}
    assert (fully_trained, with_lora) == (expected, layers)
    assert len(trained) == sum(".modules_to_save." in name or ".lora_" in name for name in trained)


def test_names_that_are_shared_with_other_modules_get_longer() -> None:
    model = nn.ModuleDict(
        {"a": nn.ModuleDict({"dense": nn.Linear(2, 2)}), "b": nn.ModuleDict({"dense": nn.Linear(2, 2)})}
    )
    assert shortest_names(["a.dense", "b.dense"], model) == ["dense"]
    assert shortest_names(["a.dense"], model) == ["a.dense"]


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_bloom, tiny_neox])
@pytest.mark.parametrize("tied", [True, False])
def test_output_weights_that_are_tied_to_the_embeddings_stay_so(build: Any, tied: bool, tmp_path: Path) -> None:
    """Through training, an adapter's directory, and merging; peft alone ties by a list of two names."""
    model, ids = build(tie_word_embeddings=tied), tokens(16)
    network = adapted(model, PRESETS["lora-plus"])
    inputs = network.get_input_embeddings().modules_to_save["default"].weight
    head = model.get_output_embeddings()
    if tied:
        assert head.modules_to_save["default"].weight is inputs
    else:
        assert not head.weight.requires_grad
    with torch.no_grad():
        for weight in network.parameters():
            if weight.requires_grad:
                weight.mul_(1.2).add_(0.01)
    trained = logits(network.eval(), ids)
    network.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(build(tie_word_embeddings=tied), tmp_path / "adapter").eval()
    assert torch.equal(logits(again, ids), trained)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    plain = type(merged).from_pretrained(tmp_path / "merged").eval()
    # float32: the merged product of matrices is rounded once more
    for reopened in (merged, plain):
        torch.testing.assert_close(logits(reopened, ids), trained, rtol=1e-4, atol=1e-4)


def test_the_presets_train_these_many_parameters() -> None:
    def count(name: str) -> int:
        return sum(w.numel() for w in adapted(tiny_llama(), PRESETS[name]).parameters() if w.requires_grad)

    assert count("full") == sum(weight.numel() for weight in tiny_llama().parameters())
    # 2 layers of q, k, v, o from 64 to 64, 32, 32 and 64 channels, at rank 8; magnitudes are one number per output
    lora = 2 * 8 * (128 + 96 + 96 + 128)
    assert count("lora") == lora
    assert count("dora") == lora + 2 * (64 + 32 + 32 + 64)
    assert count("lora-plus") == lora + 128 * 64 + 5 * 64


def test_an_adapter_begins_the_same_at_the_same_seed() -> None:
    first, second, third = (adapted(tiny_llama(), PRESETS["lora"], seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_targets_may_be_all_linear_maps_or_given_by_name() -> None:
    model = tiny_llama()
    assert adapter_config(replace(PRESETS["lora"], targets="all-linear"), model).target_modules == "all-linear"
    assert set(adapter_config(replace(PRESETS["lora"], targets=["q_proj"]), model).target_modules) == {"q_proj"}
    config = adapter_config(replace(PRESETS["lora"], rank=4, alpha=12, options={"use_rslora": True}), model)
    assert (config.r, config.lora_alpha, config.use_rslora, config.modules_to_save) == (4, 12, True, None)


def test_weights_in_half_precision_are_trained_in_float32() -> None:
    network = adapted(tiny_llama().to(torch.bfloat16), PRESETS["lora-plus"])
    kinds = {weight.requires_grad: set() for weight in network.parameters()}
    for weight in network.parameters():
        kinds[weight.requires_grad].add(weight.dtype)
    assert kinds == {True: {torch.float32}, False: {torch.bfloat16}}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: as_preset("lora-pluss"),
            "got 'lora-pluss'. Did you mean 'lora-plus'\\?",
        ),
        (lambda: Preset(learning_rate=0), "learning_rate to be a number above 0, got 0"),
        (lambda: Preset(learning_rate=float("nan")), "learning_rate to be a number above 0, got nan"),
        (lambda: Preset(learning_rate=1, rank=0), "rank to be 1 or more, got 0. Pass 8"),
        (lambda: Preset(learning_rate=1, norms=True), "got None, which trains all weights. Pass a rank"),
        (lambda: Preset(1e-3, 8, options={"init_lora_weights": "pissa_niter_4"}), "'pissa_niter_4' changes the base"),
        (lambda: Preset(1e-3, 8, options={"init_lora_weights": "PiSSA"}), "'pissa' changes the base"),
        (
            lambda: adapter_config(replace(PRESETS["lora"], options={"use_dorra": True}), tiny_llama()),
            "peft does not take the options of the adapter: .*use_dorra",
        ),
        (
            lambda: adapted(tiny_llama(), replace(PRESETS["lora"], targets=["query"])),
            "peft cannot put the adapter on LlamaForCausalLM: .*query",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        make()


def test_a_model_without_attention_says_what_to_do() -> None:
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="no linear map inside an attention module. Pass the targets"):
        attention_projections(model)
