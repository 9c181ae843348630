"""patch_model on live models: wrappers, casts, limits, refusals."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
)

from hf_posext import ExtensionPlan, LongRoPE, YaRN, detect_scheme, load_patched, patch_model, unpatch_model
from hf_posext.errors import (
    AlreadyPatchedError,
    InvalidParameterError,
    MethodNotApplicableError,
    NoEffectError,
    NotPatchedError,
    PlanMismatchError,
    UnsupportedModelError,
)
from hf_posext.evaluation.forwards import Boundaries, boundaries_of

from ..conftest import TRAINED, logits, realigned, sharpen, tiny_gpt2, tiny_llama, tokens
from ..helpers import shipped_tokenizer

LONG = tokens(3 * TRAINED)


def test_patching_twice_names_the_patch_in_force(llama: LlamaForCausalLM) -> None:
    patch = patch_model(llama, "yarn", factor=8)
    with pytest.raises(AlreadyPatchedError, match="yarn: 64 -> 512 tokens"):
        patch_model(llama, "linear", factor=2)
    patch.undo()
    with pytest.raises(NotPatchedError, match="undone already"):
        patch.undo()
    with pytest.raises(NotPatchedError, match="carries no patch"):
        unpatch_model(llama)


def test_none_is_a_patch_that_changes_nothing(llama: LlamaForCausalLM) -> None:
    before, limit = logits(llama, LONG), llama.config.max_position_embeddings
    with patch_model(llama, "none", factor=8) as patch:
        assert torch.equal(logits(llama, LONG), before) and llama.config.max_position_embeddings == limit
        assert "nothing was changed" in patch.describe()


def test_a_patch_without_effect_is_refused_and_leaves_no_trace(llama: LlamaForCausalLM) -> None:
    before = logits(llama, LONG)
    with pytest.raises(NoEffectError, match="Pass a larger factor"):
        patch_model(llama, "linear", factor=1)
    assert torch.equal(logits(llama, LONG), before) and "_posext_patch" not in vars(llama)


def test_a_method_for_another_scheme_is_refused() -> None:
    with pytest.raises(MethodNotApplicableError, match="yarn extends rotary positions; gpt2 has learned"):
        patch_model(tiny_gpt2(), "yarn", factor=8)


def test_limits_are_raised_and_put_back(llama: LlamaForCausalLM) -> None:
    tokenizer = shipped_tokenizer()
    tokenizer.model_max_length = TRAINED
    llama.generation_config.max_length = TRAINED
    with patch_model(llama, "yarn", target_length=256, tokenizer=tokenizer):
        assert llama.config.max_position_embeddings == 256
        assert (tokenizer.model_max_length, llama.generation_config.max_length) == (256, 256)
    assert llama.config.max_position_embeddings == TRAINED
    assert (tokenizer.model_max_length, llama.generation_config.max_length) == (TRAINED, TRAINED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_phases_stay_float32_in_any_dtype(llama: LlamaForCausalLM, dtype: torch.dtype) -> None:
    """Cast after patching, cast before patching: the frequencies are the float32 ones of the plan."""
    patch = patch_model(llama, "yarn", factor=8)
    expected = torch.tensor(patch.plan.rotaries[0].inv_freq)
    llama.to(dtype)
    assert llama.lm_head.weight.dtype == dtype
    assert torch.equal(llama.model.rotary_emb.inv_freq, expected)
    assert torch.equal(copy.deepcopy(llama).to(torch.bfloat16).model.rotary_emb.inv_freq, expected)
    unpatch_model(llama)

    cast = tiny_llama().to(dtype)
    rounded = cast.model.rotary_emb.inv_freq.clone()
    with patch_model(cast, "yarn", factor=8):
        assert torch.equal(cast.model.rotary_emb.inv_freq, expected)
    assert cast.model.rotary_emb.inv_freq.dtype == dtype and torch.equal(cast.model.rotary_emb.inv_freq, rounded)


def test_copies_and_pickles_are_patched_models_of_their_own(llama: LlamaForCausalLM) -> None:
    before = logits(llama, LONG)
    patch_model(llama, "yarn", factor=8)
    after = logits(llama, LONG)
    for twin in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
        assert torch.equal(logits(twin, LONG), after)
        unpatch_model(twin)
        assert torch.equal(logits(twin, LONG), before)
        assert torch.equal(logits(llama, LONG), after), "undoing the copy touched the original"


def test_several_patched_models_do_not_see_each_other() -> None:
    first, second = tiny_llama(), tiny_llama()
    before = logits(first, LONG)
    patch_model(first, "linear", factor=8)
    patch_model(second, "ntk", factor=4)
    scaled = logits(first, LONG)
    unpatch_model(second)
    assert torch.equal(logits(first, LONG), scaled) and torch.equal(logits(second, LONG), before)


def test_peft_models_patch_before_and_after(llama: LlamaForCausalLM) -> None:
    def adapted(model: PreTrainedModel) -> torch.nn.Module:
        torch.manual_seed(1)
        return get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()

    plain = logits(adapted(tiny_llama()), LONG)
    patch_model(llama, "yarn", factor=8)
    before_wrapping = adapted(llama)
    after_wrapping = adapted(tiny_llama())
    patch = patch_model(after_wrapping, "yarn", factor=8)
    assert torch.equal(logits(before_wrapping, LONG), logits(after_wrapping, LONG))
    assert not torch.equal(logits(after_wrapping, LONG), plain)
    assert detect_scheme(after_wrapping) == patch.plan.scheme
    for model in (before_wrapping, after_wrapping):
        unpatch_model(model)
        assert torch.equal(logits(model, LONG), plain)


def test_gradients_flow_as_before(llama: LlamaForCausalLM) -> None:
    patch_model(llama, "yarn", factor=8)
    llama(input_ids=LONG, labels=LONG).loss.backward()
    assert all(parameter.grad is not None for parameter in llama.parameters())


def test_compiled_model_follows_patch_and_undo(llama: LlamaForCausalLM) -> None:
    compiled = torch.compile(llama, backend="eager")
    before = logits(compiled, LONG)
    with patch_model(compiled, "yarn", factor=8):
        patched = logits(compiled, LONG)
        torch.testing.assert_close(patched, logits(llama, LONG), atol=2e-4, rtol=0)
        assert not torch.equal(patched, before)
    assert torch.equal(logits(compiled, LONG), before)


def test_only_transformers_models_are_taken() -> None:
    with pytest.raises(UnsupportedModelError, match="Expected a `PreTrainedModel` .*, got `Linear`"):
        patch_model(torch.nn.Linear(2, 2), "yarn", factor=8)
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(tiny_llama().config)
    with pytest.raises(UnsupportedModelError, match="meta device"):
        patch_model(skeleton, "yarn", factor=8)


def test_a_plan_can_be_applied_and_is_refused_elsewhere(llama: LlamaForCausalLM) -> None:
    plan = YaRN().plan(detect_scheme(llama.config), factor=8)
    with patch_model(llama, "yarn", factor=8):
        expected = logits(llama, LONG)
    with patch_model(llama, plan):
        assert torch.equal(logits(llama, LONG), expected)
    with pytest.raises(InvalidParameterError, match="has its lengths already"):
        patch_model(llama, plan, factor=4)
    with pytest.raises(PlanMismatchError, match="theta 10000, 8 pairs.*theta 10000, 16 pairs"):
        patch_model(tiny_llama(hidden_size=128), plan)


def test_longrope_with_two_lists_switches_at_the_original_length(llama: LlamaForCausalLM) -> None:
    """Each length equals the model with that one list; lengths past it need a pass of their own."""
    long, short = [1.0 + i for i in range(8)], [1.0 + i / 8 for i in range(8)]
    with patch_model(llama, LongRoPE(long_factor=long), factor=8):
        past = logits(llama, LONG)
    with patch_model(llama, LongRoPE(long_factor=short), factor=8):
        within = logits(llama, LONG[:, :TRAINED])
    patch = patch_model(llama, LongRoPE(long_factor=long, short_factor=short), factor=8)
    assert boundaries_of(patch.plan.scheme, patch.plan) == Boundaries((TRAINED,)) and patch.native_obstacle is None
    for _ in range(2):  # back and forth leaves nothing behind
        assert torch.equal(logits(llama, LONG), past)
        assert torch.equal(logits(llama, LONG[:, :TRAINED]), within)
    llama.to(torch.bfloat16).float()
    assert torch.equal(llama.model.rotary_emb.long_inv_freq, torch.tensor(patch.plan.rotaries[0].inv_freq))


SHIPPED = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED // 4},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED // 4,
    },
}


@pytest.mark.parametrize("rope_type", SHIPPED)
def test_a_shipped_scaling_is_replaced_not_stacked(rope_type: str) -> None:
    scaled = tiny_llama(rope_parameters={"rope_theta": 10_000.0, **SHIPPED[rope_type]})
    scheme = detect_scheme(scaled)
    assert (scheme.trained_length, scheme.shipped_length) == (TRAINED // 4, TRAINED)
    with pytest.raises(InvalidParameterError, match=f"32 tokens .16 trained x 2. is below the {TRAINED}"):
        patch_model(scaled, "ntk", factor=2)
    before = logits(scaled, LONG)
    plain = tiny_llama()
    patch_model(plain, "ntk", factor=8, trained_length=TRAINED // 4)
    with patch_model(scaled, "ntk", factor=8):
        assert torch.equal(logits(scaled, LONG), logits(plain, LONG))
    assert torch.equal(logits(scaled, LONG), before)


def test_layer_types_have_their_own_frequencies() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Gemma3TextConfig(
        **sizes,
        vocab_size=128,
        head_dim=16,
        num_hidden_layers=4,
        sliding_window=16,
        max_position_embeddings=TRAINED,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    torch.manual_seed(0)
    model = sharpen(Gemma3ForCausalLM(config))
    scheme = detect_scheme(model)
    assert {rotary.name: rotary.window for rotary in scheme.rotaries} == {
        "full_attention": None,
        "sliding_attention": 16,
    }
    before, local = logits(model, LONG), model.model.rotary_emb.sliding_attention_inv_freq.clone()
    with patch_model(model, "yarn", factor=8) as patch:
        assert not torch.equal(logits(model, LONG), before)
        assert torch.equal(model.model.rotary_emb.sliding_attention_inv_freq, local)
        assert patch.native_obstacle is None
        model.to(torch.bfloat16)
        expected = torch.tensor(patch.plan.rotaries[0].inv_freq)
        assert torch.equal(model.model.rotary_emb.full_attention_inv_freq, expected)
        model.float()
    with patch_model(model, "nope"):
        assert model.model.rotary_emb.sliding_attention_inv_freq.abs().max() == 0
        assert model.model.rotary_emb.full_attention_inv_freq.abs().max() == 0


@pytest.mark.parametrize("method", ["yarn", "linear", "cope", "ntk+resonance", "dynamic-yarn"])
def test_weights_that_are_made_anew_keep_the_positions(method: str, llama: LlamaForCausalLM) -> None:
    """`apply(_init_weights)` starts a training from scratch, and computes the frequencies of rotary modules anew."""
    weights = {name: weight.clone() for name, weight in llama.state_dict().items()}
    before = logits(llama, LONG)
    with patch_model(llama, method, factor=8):
        after = logits(llama, LONG)
        for model in (llama, copy.deepcopy(llama).double().float()):
            model.apply(model._init_weights)
            model.load_state_dict(weights)
            torch.testing.assert_close(logits(model, LONG), after, atol=1e-5, rtol=0)  # the copy has other addresses
    assert torch.equal(logits(llama, LONG), before)


def tiny_deepseek(rope_parameters: dict[str, object]) -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    ranks = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 128}
    return sharpen(
        DeepseekV3ForCausalLM(
            DeepseekV3Config(
                **experts, **ranks, **sizes, **heads, rope_parameters=rope_parameters, max_position_embeddings=TRAINED
            )
        )
    )


def test_deepseeks_baked_temperature_is_replaced_too(tmp_path: Path) -> None:
    parameters = {"rope_theta": 10_000.0, "mscale": 1.0, "mscale_all_dim": 1.0, "factor": 4.0, "rope_type": "yarn"}
    original = {"original_max_position_embeddings": TRAINED // 4}
    model = tiny_deepseek({**parameters, **original})
    before, scaling = logits(model, LONG), model.model.layers[0].self_attn.scaling
    with patch_model(model, "yarn", factor=32):
        native = tiny_deepseek({**parameters, **original, "factor": 32.0, "attention_factor": 1.0})
        torch.testing.assert_close(logits(model, LONG), logits(native, LONG), atol=1e-5, rtol=0)  # one rounding of m*m
    with patch_model(model, "ntk", factor=32) as patch:
        assert model.model.layers[0].self_attn.scaling == pytest.approx(16**-0.5)
        patch.save_pretrained(tmp_path / "ntk")
        reread = AutoModelForCausalLM.from_pretrained(tmp_path / "ntk")
        torch.testing.assert_close(logits(model, LONG), logits(reread, LONG), atol=1e-5, rtol=0)
    assert torch.equal(logits(model, LONG), before) and model.model.layers[0].self_attn.scaling == scaling


@pytest.mark.parametrize("mscale", [1.0, 0.7])
@pytest.mark.parametrize("method", ["yarn+log-n", "yarn+rerope(window=16)", "yarn(variant='paper')", "yarn+resonance"])
def test_deepseeks_baked_temperature_is_that_of_a_part_of_the_plan(method: str, mscale: float, tmp_path: Path) -> None:
    parameters = {"rope_theta": 10_000.0, "mscale": mscale, "mscale_all_dim": 1.0, "rope_type": "yarn"}
    parameters["original_max_position_embeddings"] = TRAINED // 4
    model, ids = tiny_deepseek({**parameters, "factor": 4.0}), LONG[:, : TRAINED // 4]
    before, native = logits(model, LONG), tiny_deepseek({**parameters, "factor": 32.0})
    scaling = model.model.layers[0].self_attn.scaling
    with patch_model(model, method, factor=32) as patch:
        layer = model.model.layers[0].self_attn
        assert layer.scaling == pytest.approx(native.model.layers[0].self_attn.scaling, rel=1e-12)
        after = logits(model, LONG)
        if "log-n" in method or "rerope" in method:  # neither changes a text within the trained length and the window
            torch.testing.assert_close(logits(model, ids), logits(native, ids), atol=1e-5, rtol=0)
        patch.save_pretrained(tmp_path / "saved")
    opened = load_patched(tmp_path / "saved")
    torch.testing.assert_close(logits(opened, LONG), after, atol=1e-5, rtol=0)
    if patch.native_obstacle is None:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        torch.testing.assert_close(logits(plain, LONG), after, atol=1e-5, rtol=0)
    assert torch.equal(logits(model, LONG), before) and model.model.layers[0].self_attn.scaling == scaling


@pytest.mark.parametrize("method", ["linear+log-n", "dynamic-ntk", "dynamic-yarn(temperature=0)"])
def test_deepseeks_baked_temperature_goes_with_its_yarn(method: str) -> None:
    parameters = {"rope_theta": 10_000.0, "mscale": 1.0, "mscale_all_dim": 1.0, "factor": 4.0, "rope_type": "yarn"}
    model = tiny_deepseek({**parameters, "original_max_position_embeddings": TRAINED // 4})
    patch_model(model, method, factor=32)
    assert model.model.layers[0].self_attn.scaling == pytest.approx(16**-0.5, rel=1e-12)
    if "dynamic" in method:  # a row within the trained length is read by the frequencies before any scaling
        unscaled, ids = tiny_deepseek({"rope_theta": 10_000.0, "rope_type": "default"}), LONG[:, : TRAINED // 4]
        torch.testing.assert_close(logits(model, ids), logits(unscaled, ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["dynamic-yarn", "yarn+cope", "yarn+partial"])
def test_temperatures_that_deepseeks_softmax_cannot_have_are_refused(method: str) -> None:
    parameters = {"rope_theta": 10_000.0, "mscale": 1.0, "mscale_all_dim": 1.0, "factor": 4.0, "rope_type": "yarn"}
    model = tiny_deepseek({**parameters, "original_max_position_embeddings": TRAINED // 4})
    before = logits(model, LONG)
    with pytest.raises(UnsupportedModelError, match="scale of the softmax"):
        patch_model(model, method, factor=32)
    assert torch.equal(logits(model, LONG), before)


@pytest.mark.parametrize("method", ["linear", "yarn", "ntk"])
def test_phimoe_recomputes_frequencies_in_every_forward(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    model = sharpen(PhimoeForCausalLM(PhimoeConfig(**sizes, **heads, max_position_embeddings=TRAINED)))
    before = logits(model, LONG)
    with patch_model(model, method, factor=8) as patch:
        after = logits(model, LONG)
        assert (after - before)[:, TRAINED:].abs().max() > 1e-2 * before.std()
        assert patch.native_obstacle is None
        patch.save_pretrained(tmp_path / method)
        assert torch.equal(logits(realigned(AutoModelForCausalLM.from_pretrained(tmp_path / method)), LONG), after)
    assert torch.equal(logits(model, LONG), before)


def test_loading_refuses_weights_of_another_model(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    patch_model(llama, "yarn", factor=8).save_pretrained(tmp_path / "yarn")
    plan = YaRN().plan(detect_scheme(tiny_llama(hidden_size=128)), factor=8)
    plan.save(tmp_path / "yarn")
    with pytest.raises(PlanMismatchError, match="contains two plans"):
        load_patched(tmp_path / "yarn")


def test_saving_overwrites_nothing(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    patch = patch_model(llama, "yarn", factor=8)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="Choose another"):
        patch.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    patch.undo()
    with pytest.raises(NotPatchedError, match="patch again before saving"):
        patch.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_describe(llama: LlamaForCausalLM) -> None:
    patch = patch_model(llama, "yarn", factor=8)
    lines = patch.describe().splitlines()
    assert lines[0] == "llama: rotary positions, trained on 64 tokens; theta 10000, 8 pairs, rope_type default"
    assert lines[1].startswith("yarn: 64 -> 512 tokens (x8)")
    assert lines[2] == "in force; saves as a checkpoint that plain transformers opens"
    patch.undo()
    assert patch.describe().splitlines()[2].startswith("undone")
    assert isinstance(patch.plan, ExtensionPlan)
