"""Names that transformers changed between versions are asked from the code that is installed."""

import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, XLMConfig, XLMWithLMHeadModel

from hf_posext.patching.modes import cache_argument, cache_of, with_cache

IDS = torch.arange(1, 13)[None]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_a_cache_goes_in_and_out_by_the_names_of_the_installed_version() -> None:
    model = llama()
    first = model(IDS[:, :8], use_cache=True)
    cache = cache_of(first)
    assert isinstance(cache, DynamicCache) and cache.get_seq_length() == 8
    second = model(IDS[:, 8:], use_cache=True, **with_cache(model.forward, cache))
    # float32 sums in another order
    torch.testing.assert_close(second.logits, model(IDS, use_cache=False).logits[:, 8:], atol=1e-5, rtol=0)
    assert cache_of(model(IDS, use_cache=False)) is None and cache_of((first.logits,)) is None


def test_layers_and_wrapped_forwards_tell_theirs_too() -> None:
    model = llama()
    name = cache_argument(model.forward)
    assert name in ("cache", "past_key_values")
    assert cache_argument(model.model.layers[0].self_attn.forward) == name
    assert cache_argument(nn.Linear(1, 1).forward) is None
    assert with_cache(nn.Linear(1, 1).forward, None) == {}


def test_a_cache_of_one_forward_is_none() -> None:
    assert cache_argument(XLMWithLMHeadModel.forward) is None
    config = XLMConfig(vocab_size=32, emb_dim=16, n_layers=1, n_heads=2)
    assert cache_of(XLMWithLMHeadModel(config)(IDS)) is None
