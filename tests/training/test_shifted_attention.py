"""Shifted sparse attention against a dense one whose mask is written out pair by pair."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    MistralConfig,
    MistralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
)

from hf_posext import patch_model
from hf_posext.errors import InvalidParameterError, UnsupportedModelError
from hf_posext.patching.long_rows import shifted_attention, shifted_sparse_attention

from ..conftest import tiny_bloom, tiny_gpt2, tiny_llama, tokens
from ..zoo import build

LENGTH, GROUPS = 32, 4


def attended(length: int, groups: int, heads: int) -> torch.Tensor:
    """Keys that each query of each head sees, (heads, queries, keys)."""
    size = length // groups
    visible = torch.zeros(heads, length, length, dtype=torch.bool)
    for head in range(heads):
        shift = size // 2 if head >= heads - heads // 2 else 0
        for query in range(length):
            for key in range(query + 1):
                visible[head, query, key] = (query + shift) // size == (key + shift) // size
    return visible


def dense(module: Any, query: Any, key: Any, value: Any, mask: Any = None, scaling: Any = None, **kwargs: Any) -> Any:
    key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], 1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    visible = attended(query.shape[2], GROUPS, query.shape[1])
    return (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value).transpose(1, 2), None


def give(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    return out.logits


@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (3, 1)])
def test_states_are_attended_as_by_the_dense_reference(heads: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, count, LENGTH, width, generator=draw, dtype=torch.float64)
        for count, width in ((heads[0], 8), (heads[1], 8), (heads[1], 12))
    )
    module = torch.nn.Module().train()
    out, _ = shifted_attention(module, query, key, value, None, groups=GROUPS, scaling=0.3)
    torch.testing.assert_close(out, dense(module, query, key, value, scaling=0.3)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", [None, "yarn"])
def test_a_model_in_training_gives_logits_and_gradients_of_the_dense_reference(method: str | None) -> None:
    model, ids = tiny_llama(), tokens(LENGTH, rows=2)
    if method:
        patch_model(model, method, factor=2)
    with shifted_sparse_attention(model, GROUPS):
        out = give(model.train(), ids)
        gradients = [weight.grad.clone() for weight in model.parameters()]
    AttentionInterface.register("reference", dense)
    AttentionMaskInterface.register("reference", lambda *args, **kwargs: None)
    try:
        model.config._attn_implementation = "reference"
        expected = give(model, ids)
    finally:
        AttentionInterface._global_mapping.pop("reference")
        AttentionMaskInterface._global_mapping.pop("reference")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)  # float32, summed in another order
    for gradient, weight in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-3, atol=1e-6)


def test_nothing_of_the_future_is_seen() -> None:
    """In the reference code of the paper the last half-group is before the first one."""
    model, ids = tiny_llama(), tokens(LENGTH)
    changed = ids.clone()
    changed[0, -1] = changed[0, -1] % 127 + 1
    with shifted_sparse_attention(model, GROUPS), torch.no_grad():
        first, second = (model.train()(input_ids=row, use_cache=False).logits[0, :-1] for row in (ids, changed))
    assert torch.equal(first, second)


def test_evaluation_attends_to_everything_and_afterwards_all_is_as_before() -> None:
    model, ids = tiny_llama(), tokens(LENGTH)
    registered = set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with shifted_sparse_attention(model, GROUPS):
            assert not torch.equal(model.train()(input_ids=ids, use_cache=False).logits, before)
            assert torch.equal(model.eval()(input_ids=ids).logits, before)
            with shifted_sparse_attention(tiny_llama(), GROUPS):
                pass
            assert not torch.equal(model.train()(input_ids=ids, use_cache=False).logits, before)
        assert torch.equal(model.train()(input_ids=ids, use_cache=False).logits, before)
    assert model.config._attn_implementation == "sdpa"
    assert (set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)) == registered


def test_layers_with_a_sliding_window_attend_as_ever() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, sliding_window=8)
    model, ids = MistralForCausalLM(config), tokens(LENGTH)
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        with shifted_sparse_attention(model, GROUPS):
            assert torch.equal(model.train()(input_ids=ids, use_cache=False).logits, before)


def test_a_layer_that_asks_for_a_window_which_its_masks_lack_is_refused(tmp_path: Path) -> None:
    """OLMoE sees all of a row with sdpa, so that a layer that counts as one with a window would train densely."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_experts": 2}
    config = OlmoeConfig(**sizes, num_attention_heads=2, num_experts_per_tok=2, sliding_window=8)
    OlmoeForCausalLM(config).save_pretrained(tmp_path)
    refusal = "sliding window of OlmoeAttention, got none: it asks its attention for 8 tokens, .* sliding_window=None"
    with pytest.raises(UnsupportedModelError, match=refusal):
        _entered(OlmoeForCausalLM.from_pretrained(tmp_path)).__enter__()

    model, ids = OlmoeForCausalLM.from_pretrained(tmp_path, sliding_window=None), tokens(LENGTH)
    with torch.no_grad(), shifted_sparse_attention(model, GROUPS):
        grouped, ungrouped = (model.train(mode)(input_ids=ids, use_cache=False).logits for mode in (True, False))
    near = torch.isclose(grouped, ungrouped, rtol=1e-4, atol=1e-5).all(-1)[0]  # other kernels, float32
    assert near[:4].all() and not near[4:].any(), "behind the first half-group, some head sees fewer tokens"


def test_gpt2_attends_in_groups_too() -> None:
    model, ids = tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), tokens(LENGTH)
    with torch.no_grad(), shifted_sparse_attention(model, GROUPS):
        first, second = (model.train(mode)(input_ids=ids, use_cache=False).logits for mode in (True, False))
    near = torch.isclose(first, second, rtol=1e-4, atol=1e-5).all(-1)[0]  # other kernels, float32
    assert near[:4].all(), "of the first half-group nothing is cut off"
    assert not near[4:].any()


def test_a_mask_that_a_model_passes_by_its_name() -> None:
    """As AFMoE does, in layers with a window."""
    model, ids = build("afmoe", sliding_window=8), tokens(LENGTH)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        with shifted_sparse_attention(model, GROUPS):
            torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, atol=0, rtol=0)


def test_what_it_cannot_honour_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="bloom runs with 'eager' attention"), _entered(tiny_bloom()):
        pass
    with pytest.raises(UnsupportedModelError, match="LlamaAttention has one head"):
        _entered(tiny_llama(num_attention_heads=1, num_key_value_heads=1)).__enter__()
    for request in ({"position_bias": torch.zeros(1, 4, 8, 8)}, {"attention_mask": torch.zeros(1, 1, 8, 8)}):
        biased = tiny_llama()
        hook = partial(lambda extras, module, args, kwargs: (args, kwargs | extras), request)
        biased.model.layers[0].self_attn.register_forward_pre_hook(hook, with_kwargs=True)
        feature = "position_bias" if "position_bias" in request else "a mask where all of a text is seen"
        with pytest.raises(UnsupportedModelError, match=f"LlamaAttention asks its attention for {feature}"):
            _entered(biased).__enter__()
        assert biased.config._attn_implementation == "sdpa"
    late = tiny_llama()
    patch_model(late, "rerope(window=16)", factor=2)
    with pytest.raises(UnsupportedModelError, match="runs with 'posext-sdpa' attention"), _entered(late):
        pass
    single_group = shifted_sparse_attention(tiny_llama(), 1)
    with pytest.raises(InvalidParameterError, match="2 groups of a row or more, got 1"), single_group:
        pass
    model = tiny_llama().train()
    with shifted_sparse_attention(model, GROUPS), pytest.raises(InvalidParameterError, match="of 8; got 30 tokens"):
        model(input_ids=tokens(30), use_cache=False)
    packed = torch.arange(16).repeat(2)[None]
    with shifted_sparse_attention(model, GROUPS), pytest.raises(InvalidParameterError, match="32 tokens with a mask"):
        model(input_ids=tokens(32), position_ids=packed, use_cache=False)


def _entered(model: PreTrainedModel) -> Any:
    return shifted_sparse_attention(model, GROUPS)
