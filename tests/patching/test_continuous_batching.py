"""Continuous batching of remapped models, against one forward per request without a cache."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching import continuous_api

from hf_posext import patch_model
from hf_posext.errors import UnsupportedModelError

from ..zoo import TRAINED_LENGTH, build

METHODS = (
    "dual-chunk",
    "leaky-rerope",
    "leaky-rerope+decay",
    "llama4-temperature",
    "log-n",
    "rerope",
    "rerope+fade",
    "self-extend",
    "sinks",
    "yarn",
    "yarn+log-n",
)
LENGTHS = 3 * TRAINED_LENGTH, 2 * TRAINED_LENGTH + 1, 5, 3 * TRAINED_LENGTH
"""Numbers of tokens per prompt. All prompts begin alike, so that pages are shared if that is allowed."""

NEW = 6


@pytest.fixture(autouse=True)
def without_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the two garbage collections after each batch, which take a second in a test process."""
    monkeypatch.setattr(continuous_api.gc, "collect", lambda: 0)


@functools.cache
def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    text = torch.randint(3, 64, (max(LENGTHS),), generator=draw).tolist()
    inputs = [text[:length] for length in LENGTHS]
    inputs[-1] = inputs[-1][:-7] + inputs[-1][-7:][::-1]
    return inputs


def served(model: PreTrainedModel, *, share: bool, tokens: int) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Return new tokens of each prompt and their log-probabilities; a step reads at most `tokens` of the prompts."""
    batching = ContinuousBatchingConfig(
        num_blocks=64,
        page_size=8,
        max_batch_tokens=tokens,
        allow_block_sharing=share,
        auto_switch_to_flash=False,
        return_logprobs=True,
    )
    greedy = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    outputs = model.generate_batch(prompts(), generation_config=greedy, continuous_batching_config=batching).values()
    assert [output.error for output in outputs] == [None] * len(LENGTHS)
    return [list(output.generated_tokens) for output in outputs], [torch.tensor(output.logprobs) for output in outputs]


@torch.no_grad()
def alone(model: PreTrainedModel, prompt: list[int], new: list[int]) -> torch.Tensor:
    """Return log-probabilities of the new tokens after a prompt, by one forward without a cache."""
    logits = model(input_ids=torch.tensor([prompt + new]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)[torch.arange(len(new)), new]


def check(model: PreTrainedModel, *, share: bool, tokens: int, tolerance: float = 1e-4) -> None:
    """Check a batch against its requests. Log-probabilities are float32, of about -4, and summed in another order."""
    for prompt, new, scores in zip(prompts(), *served(model, share=share, tokens=tokens), strict=True):
        assert len(new) == NEW
        torch.testing.assert_close(scores.double(), alone(model, prompt, new), atol=tolerance, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_requests_get_what_they_get_alone(method: str) -> None:
    model = build("llama")
    before, _ = served(model, share=False, tokens=512)
    plain = [alone(model, prompt, new) for prompt, new in zip(prompts(), before, strict=True)]
    patch = patch_model(model, method, factor=4)
    patched = [alone(model, prompt, new) for prompt, new in zip(prompts(), before, strict=True)]
    assert max((before - after).abs().max() for before, after in zip(plain, patched, strict=True)) > 1e-2
    check(model, share=False, tokens=512)
    check(model, share=True, tokens=16)  # prompts in pieces, and pages of a prompt before
    patch.undo()
    check(model, share=False, tokens=512)


@pytest.mark.parametrize(
    ("family", "attention", "changed"),
    [
        ("mistral", "sdpa", {"sliding_window": 100}),  # which sees several bands
        ("gemma3_text", "sdpa", {}),  # windows and full layers
        ("gemma2", "eager", {}),  # and capped scores
        ("smollm3", "sdpa", {}),  # layers without rotation
        ("smollm3", "eager", {}),
        ("gpt_oss", "eager", {}),  # sinks
        ("phi", "sdpa", {}),  # partial rotation
    ],
)
def test_requests_of_other_layers(family: str, attention: str, changed: dict[str, Any]) -> None:
    model = build(family, **changed)
    model.set_attn_implementation(attention)
    patch_model(model, "rerope", factor=4)
    check(model, share=True, tokens=16)
    check(copy.deepcopy(model), share=False, tokens=512)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("stablelm", "does not hand the pages"),
        ("hrm_text", "attends twice"),
        ("diffllama", "attends twice"),
        ("moshi", "does not use the sliding window"),
    ],
)
def test_layers_that_are_batched_wrongly_are_refused(family: str, message: str) -> None:
    """Of these, transformers batches some rightly or refuses them itself since 5.24, where layers write the pages."""
    model = build(family)
    patch_model(model, "rerope", factor=4)
    batching = ContinuousBatchingConfig(num_blocks=64, page_size=8, max_batch_tokens=16)
    greedy = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0)
    outputs = model.generate_batch(prompts(), generation_config=greedy, continuous_batching_config=batching)
    errors = [output.error for output in outputs.values()]
    if any(errors):
        assert all(message in error for error in errors) or Version(transformers.__version__) >= Version("5.24")
    else:
        check(model, share=True, tokens=16)


@pytest.mark.parametrize("method", ["dynamic-ntk", "jet-long"])
def test_positions_that_follow_a_length_are_refused(method: str) -> None:
    model = build("llama")
    patch = patch_model(model, method, factor=4)
    with pytest.raises(UnsupportedModelError, match=f"{method} follows the length of a text"):
        model.generate_batch(prompts())
    patch.undo()
    check(model, share=True, tokens=16)
