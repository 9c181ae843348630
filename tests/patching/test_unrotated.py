"""Phases of the identity rotation, which cost nothing and equal ones and zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as interleaved
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as halves

import hf_posext.patching.remap.rotary as module
from hf_posext import patch_model
from hf_posext.errors import UnsupportedModelError
from hf_posext.methods import ReRoPE
from hf_posext.patching.remap.rotary import Ones, Unrotated, Zeros, unrotated

from ..conftest import tokens
from ..zoo import build

FAMILIES = ("llama", "glm", "gpt_neox", "cohere", "gemma3_text", "qwen3_5_text", "deepseek_v3", "olmo2", "nemotron")
"""Models with halves, neighbors, partial heads, float32 phases, two sets, three axes, joined channels, and norms."""

QUERY, KEY = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)


def test_queries_and_keys_are_left_as_they_are() -> None:
    query, key = halves(QUERY, KEY, *unrotated(torch.empty(1, 6, 8)))
    assert query is QUERY and key is KEY


@pytest.mark.parametrize(
    ("apply", "like"),
    [
        (interleaved, torch.empty(2, 6, 8)),  # each is repeated
        (halves, torch.empty(1, 6, 8, dtype=torch.float64)),  # which makes queries and keys wider
    ],
)
def test_what_else_is_asked_of_them_is_computed(apply: Any, like: torch.Tensor) -> None:
    outputs = apply(QUERY, KEY, *unrotated(like))
    for rotated, states in zip(outputs, (QUERY, KEY), strict=True):
        assert type(rotated) is torch.Tensor and rotated.dtype == torch.promote_types(states.dtype, like.dtype)
        assert torch.equal(rotated, states.to(rotated.dtype))


def test_they_are_tensors_like_any() -> None:
    ones, zeros = unrotated(torch.empty(1, 6, 8, dtype=torch.bfloat16))
    assert torch.equal(ones, torch.ones(1, 6, 8, dtype=torch.bfloat16)) and not zeros.any()
    assert isinstance(ones[:, None], Ones) and isinstance(zeros.to(torch.float32), Zeros)
    larger = QUERY[:1, :, :1] * ones  # of another shape
    assert torch.equal(larger, QUERY[:1, :, :1].expand(1, 4, 6, 8)) and not isinstance(larger, Unrotated)
    assert torch.equal(ones + ones, torch.full_like(ones, 2)) and type(ones - zeros) is torch.Tensor
    assert torch.equal(torch.add(QUERY, zeros, alpha=2), QUERY) and torch.equal(QUERY + ones, QUERY + 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_give_the_same_to_the_bit(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare logits and gradients with and without computed products with ones and zeros."""
    model: Any = build(family)
    ids, left_out = tokens(40), 0
    readings = []

    def counted(constant: torch.Tensor, states: Any, original: Any = module._leaves_its_form) -> bool:
        nonlocal left_out
        left_out += (leaves := original(constant, states))
        return leaves

    monkeypatch.setattr(module, "_leaves_its_form", counted)
    with patch_model(model, ReRoPE(window=8), factor=8, trained_length=16):
        for limit in (10**6, 1):
            monkeypatch.setattr(module, "MANY", limit)
            left_out = 0
            model.zero_grad()
            out = model(ids, labels=ids)
            out.loss.backward()
            readings.append(
                (out.logits, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None))
            )
            assert (left_out > 0) == (limit == 1)
    for computed, spared in zip(*readings, strict=True):
        assert torch.equal(computed, spared)


def test_code_that_writes_into_its_phases_is_refused(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **kwargs: Any) -> Any:
        return (side / 2 for side in halves(query, key, cos.mul_(2), sin.mul_(2), **kwargs))

    monkeypatch.setattr("transformers.models.llama.modeling_llama.apply_rotary_pos_emb", scaled)
    with pytest.raises(UnsupportedModelError, match="Expected the positions of llama, got RuntimeError from its code"):
        patch_model(llama, ReRoPE(window=8), factor=4)
