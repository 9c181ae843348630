"""Measurement of the rotation on a skeleton of the model, whose own weights may be anything."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM

from hf_posext import patch_model
from hf_posext.errors import UnsupportedModelError
from hf_posext.methods import DynamicNTK, LogN, Method, ReRoPE, SelfExtend, Sinks
from hf_posext.patching.remap.layout import skeleton_of

from ..conftest import TRAINED, logits, tiny_llama, tokens
from ..zoo import build

IDS = tokens(48)
KEEPS = ReRoPE(window=TRAINED)
"""Method that changes nothing within the trained length."""
METHODS: list[Method] = [KEEPS, SelfExtend(group=4, window=TRAINED), Sinks(window=TRAINED - 4), LogN(), DynamicNTK()]


def layers(model: PreTrainedModel) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "q_proj") and hasattr(module, "k_proj")]


def dead_rows(model: PreTrainedModel) -> None:
    """Set one row of the keys to 0 in every head."""
    for layer in layers(model):
        layer.k_proj.weight.data.view(-1, layer.head_dim, layer.k_proj.in_features)[:, 3] = 0


def dead_heads(model: PreTrainedModel) -> None:
    for layer in layers(model):
        layer.q_proj.weight.data[: layer.head_dim] = 0
        layer.k_proj.weight.data[: layer.head_dim] = 0


def dead_layer(model: PreTrainedModel) -> None:
    layers(model)[0].q_proj.weight.data.zero_()
    layers(model)[0].k_proj.weight.data.zero_()


def zero_blocks(model: PreTrainedModel) -> None:
    """Round weights like coarse quantization does."""
    for layer in layers(model):
        layer.q_proj.weight.data[:, ::2] = 0
        layer.k_proj.weight.data[4:8, 8:] = 0


def outlier_biases(model: PreTrainedModel) -> None:
    for layer in layers(model):
        for projection in (layer.q_proj, layer.k_proj):
            if projection.bias is not None:
                projection.bias.data.fill_(0.1)
                projection.bias.data[2::16] = 300


def norms_at_zero(model: PreTrainedModel) -> None:
    """Set the norms of queries and keys to factors of 1 - 1, like in most layers of a released Gemma-3."""
    for layer in layers(model):
        layer.k_norm.weight.data[3] = layer.q_norm.weight.data[5] = -1


def tiny_qwen2() -> Any:
    return build("qwen2")


CASES: list[tuple[Callable[[], Any], Callable[[Any], None]]] = [
    *((tiny_llama, spoil) for spoil in (dead_rows, dead_heads, dead_layer, zero_blocks)),
    (tiny_qwen2, outlier_biases),
    *((lambda: build("gemma3_text"), spoil) for spoil in (norms_at_zero, dead_rows, dead_layer)),
    (lambda: tiny_llama(tie_word_embeddings=True), dead_rows),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("make", "spoil"), CASES)
def test_weights_hide_nothing(make: Callable[[], Any], spoil: Callable[[Any], None], dtype: torch.dtype) -> None:
    """Check that methods equal the model within the trained length, and change something past it."""
    model = make()
    spoil(model)
    model.to(dtype)
    before = logits(model, IDS)
    # half precision rounds each rotated state once, and biases of hundreds make scores of thousands
    loud = spoil is outlier_biases
    limit = (1e-3 if loud else 1e-4) if dtype == torch.float32 else 0.5
    for method in METHODS:
        with patch_model(model, method, factor=8, trained_length=TRAINED):
            if not (loud and dtype != torch.float32):
                assert (logits(model, IDS) - before).abs().max() <= limit * before.abs().max()
    assert torch.equal(logits(model, IDS), before)


@pytest.mark.parametrize("make", [tiny_llama, lambda: build("gemma3_text"), lambda: build("deepseek_v3")])
def test_layouts_are_those_of_good_weights(make: Callable[[], Any]) -> None:
    """Check that every layer has bit-identical layouts for any weights."""
    layouts = []
    for spoil in (lambda model: None, lambda model: [parameter.data.zero_() for parameter in model.parameters()]):
        model = make()
        spoil(model)
        patch_model(model, KEEPS, factor=8, trained_length=TRAINED)
        layouts.append(model._posext_remapping.layers)
    good, bad = layouts
    assert good.keys() == bad.keys() and good
    for path, layer in good.items():
        for side in ("query", "key"):
            good_layout, bad_layout = getattr(layer, side), getattr(bad[path], side)
            for name in ("slots", "partners", "weights"):
                assert torch.equal(getattr(good_layout, name), getattr(bad_layout, name))


def test_a_norm_behind_the_rotation_weighs_by_the_weights_of_the_model() -> None:
    """Check Hunyuan, which norms after the rotation: a factor of 0 hides how the partner rotates."""
    model = build("hunyuan_v1_dense")
    before = logits(model, IDS)
    draw = torch.Generator().manual_seed(0)
    norms = [
        weight
        for path, weight in model.named_parameters()
        if path.endswith("layernorm.weight") and "self_attn" in path
    ]
    assert norms
    for weight in norms:
        weight.data.uniform_(0.5, 1.5, generator=draw)
    before = logits(model, IDS)
    with patch_model(model, KEEPS, factor=8):
        torch.testing.assert_close(logits(model, IDS), before, atol=1e-4, rtol=0)  # float32; logits spread by 4
    norms[0].data[2] = 0
    with pytest.raises(UnsupportedModelError, match=r"channels that are always 0 \(\[2\]\)"):
        patch_model(model, KEEPS, factor=8)


def test_changed_objects_are_asked_themselves() -> None:
    """Check a forward replaced on one object: the model itself is probed, and an unsupported rotation is refused."""
    model = tiny_llama()
    first = model.model.layers[0].self_attn
    forward = first.forward

    def mixes(hidden_states: torch.Tensor, position_embeddings: Any = None, **kwargs: Any) -> Any:
        cos, sin = position_embeddings
        return forward(hidden_states, position_embeddings=(cos, sin.flip(-1) * 0.5), **kwargs)

    assert skeleton_of(model.model) is not None
    first.forward = mixes
    assert skeleton_of(model.model) is None
    with pytest.raises(UnsupportedModelError):
        patch_model(model, KEEPS, factor=8)
    del first.forward
    dead_rows(model)
    model.model.layers[1].self_attn.forward = model.model.layers[1].self_attn.forward  # not its class's
    with pytest.raises(UnsupportedModelError, match=r"channels that are always 0 \(\[3, 11\]\)"):
        patch_model(model, KEEPS, factor=8)


def wide(**settings: Any) -> Any:
    """Return a model of about 60 million weights per layer, without the weights."""
    sizes = {"vocab_size": 50_000, "hidden_size": 2048, "intermediate_size": 8192}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8, **settings))


def test_a_skeleton_is_narrow_and_disturbs_nothing() -> None:
    """Check that the skeleton of a large model is small, and draws no random numbers of the process."""
    large = wide(num_hidden_layers=3, pad_token_id=49_999)
    state = torch.get_rng_state()
    skeleton = skeleton_of(large.model)
    assert skeleton is not None and torch.equal(torch.get_rng_state(), state)
    assert sum(parameter.numel() for parameter in skeleton.parameters()) < 1e6
    assert skeleton.layers[0].self_attn.head_dim == 64 and len(skeleton.layers) == 3
    assert large.config.hidden_size == 2048


def test_a_model_of_a_billion_weights_is_patched_at_once() -> None:
    """Check that patching takes half a second on one core of an idle machine, without a forward of the model."""
    model = wide(num_hidden_layers=16, max_position_embeddings=4096)
    rotary = type(model.model.rotary_emb)(model.config)
    model.to_empty(device="cpu").eval()
    model.model.rotary_emb = rotary
    patch_model(model, "yarn", factor=4).undo()  # what is loaded on first use
    forwards: list[str] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, *_: forwards.append(type(module).__name__))
    start = time.process_time()
    patch_model(model, "rerope", factor=4)
    assert time.process_time() - start < 5 and not forwards  # a busy machine takes longer


def test_qwen2_is_what_the_biases_are_of() -> None:
    assert isinstance(tiny_qwen2(), Qwen2ForCausalLM) and layers(tiny_qwen2())[0].q_proj.bias is not None
