"""Passkeys: prompts that fit to the token, the same for every method, answered greedily."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaForCausalLM

from hf_posext.errors import InvalidParameterError
from hf_posext.evaluation import passkey_accuracy, prompts, questions
from hf_posext.evaluation.prompts import answer_size, passkey_prompts
from hf_posext.patching import patch_model

from ..helpers import shipped_model, shipped_tokenizer
from .helpers import BOS, character_tokenizer

SHORTEST = 59 + 38 + 6 + prompts.SLACK
"""Characters of the key's line, of the question, and of the answer."""


@given(length=st.integers(SHORTEST + 1, 800), trials=st.integers(1, 5), seed=st.integers(0, 99), bos=st.booleans())
@settings(max_examples=30, deadline=None)
def test_prompt_and_answer_fit_the_length_exactly(length: int, trials: int, seed: int, bos: bool) -> None:
    tokenizer = character_tokenizer(bos)
    written = passkey_prompts(tokenizer, length, trials, seed)
    answer = answer_size(tokenizer, [prompt.answers[0] for prompt in written])
    for prompt in written:
        assert prompt.room == answer and len(prompt.tokens) + answer == length
        assert (prompt.tokens[0] == BOS) is bos
        text = "".join(tokenizer.convert_ids_to_tokens(prompt.tokens)).removeprefix("<s>")
        (key,) = prompt.answers
        line = f"The pass key is {key}. Remember it. {key} is the pass key.\n"
        before, after = text.split(line)
        assert after.endswith("What is the pass key? The pass key is")
        assert before == "" or before.endswith("again.\n") or len(before) < len(prompts.FILLER)
        assert prompt.depth == pytest.approx(len(before) / max(1, len(before) + len(after) - 37))


def test_prompts_follow_from_seed_length_and_trial() -> None:
    tokenizer = character_tokenizer()
    written = passkey_prompts(tokenizer, 2000, 20, seed=0)
    assert passkey_prompts(tokenizer, 2000, 5, seed=0) == written[:5]
    assert not {p.answers for p in passkey_prompts(tokenizer, 2000, 20, seed=1)} & {p.answers for p in written}
    assert len({p.answers for p in written}) == 20
    depths = sorted(prompt.depth for prompt in written)
    assert depths[0] < 0.2 and depths[-1] > 0.8 and len(set(depths)) > 10


def test_a_length_that_holds_no_prompt_is_refused() -> None:
    tokenizer = character_tokenizer()
    with pytest.raises(InvalidParameterError, match=r"lengths of (\d+) tokens or more .* got 50") as error:
        passkey_prompts(tokenizer, 50, 1, seed=0)
    needed = int(str(error.value).split("lengths of ")[1].split()[0])
    assert passkey_prompts(tokenizer, needed, 1, seed=0)
    with pytest.raises(InvalidParameterError):
        passkey_prompts(tokenizer, needed - 1, 1, seed=0)


def test_no_trials_are_refused(llama: LlamaForCausalLM) -> None:
    with pytest.raises(InvalidParameterError, match="trials .* got 0"):
        passkey_accuracy(llama, character_tokenizer(), [200], trials=0)


@pytest.mark.parametrize(("right", "answer"), [(1.0, " {key}. And"), (0.0, " 0{key}"), (0.5, "{key}")])
def test_an_answer_is_right_if_it_begins_with_the_key(
    monkeypatch: pytest.MonkeyPatch, llama: LlamaForCausalLM, right: float, answer: str
) -> None:
    tokenizer, batches = character_tokenizer(), []
    tokenizer.batch_decode = lambda ids, **kwargs: ["".join(tokenizer.convert_ids_to_tokens(row)) for row in ids]

    def generate(model: Any, input_ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
        batches.append(len(input_ids))
        rows = []
        for row in input_ids:
            text = "".join(tokenizer.convert_ids_to_tokens(row))
            key = text.split("pass key is ")[1][:5]
            if right == 0.5 and len(rows) % 2:
                key = "wrong"
            rows.append(tokenizer(answer.format(key=key))["input_ids"])
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)

    monkeypatch.setattr(questions, "generate_greedily", generate)
    monkeypatch.setattr(questions, "BATCH_TOKENS", 900)
    assert passkey_accuracy(llama, tokenizer, [200], trials=6) == {200: right}
    assert batches == [4, 2], "as many rows as fit the budget"


def test_decoding_is_greedy_whatever_the_model_says(llama: LlamaForCausalLM) -> None:
    ids = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(0))
    expected = ids
    for _ in range(5):
        best = llama(input_ids=expected).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, best], dim=1)
    first = int(expected[0, 20])
    for written in (
        {"do_sample": True, "temperature": 5.0, "top_k": 3, "repetition_penalty": 3.0},
        {"suppress_tokens": [first], "bad_words_ids": [[first]], "sequence_bias": [[[first], -9.0]]},
        {"guidance_scale": 3.0, "max_time": 1e-4, "forced_eos_token_id": 7, "encoder_repetition_penalty": 9.0},
        {"return_dict_in_generate": True, "stop_strings": ["a"], "prompt_lookup_num_tokens": 2},
    ):
        shipped = llama.generation_config = GenerationConfig(eos_token_id=None, **written)
        assert torch.equal(questions.generate_greedily(llama, ids, 5), expected), written
        assert llama.generation_config is shipped


def test_two_threads_ask_one_model(llama: LlamaForCausalLM) -> None:
    """Each is in the middle of its answer when the other one asks, and the model's own config is never changed."""
    rows = torch.randint(3, 100, (2, 1, 20), generator=torch.Generator().manual_seed(0))
    expected = rows
    for _ in range(5):
        best = torch.stack([llama(input_ids=row).logits[:, -1].argmax(-1, keepdim=True) for row in expected])
        expected = torch.cat([expected, best], dim=2)
    suppressed = [int(row[0, 20]) for row in expected]
    shipped = llama.generation_config = GenerationConfig(
        eos_token_id=None, repetition_penalty=3.0, suppress_tokens=suppressed, num_beams=3
    )
    written, both = shipped.to_json_string(), threading.Barrier(2, timeout=60)
    answers: dict[int, torch.Tensor] = {}

    def meet(*_: object) -> None:
        both.wait()
        assert llama.generation_config is shipped

    def ask(index: int) -> None:
        answers[index] = questions.generate_greedily(llama, rows[index], 5)

    with llama.register_forward_pre_hook(meet):
        threads = [threading.Thread(target=ask, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(answers[index], expected[index]) for index in range(2))
    assert llama.generation_config is shipped and shipped.to_json_string() == written


def test_the_shipped_model_finds_keys_inside_its_trained_length_and_with_yarn_beyond() -> None:
    model = shipped_model()
    tokenizer = shipped_tokenizer()
    assert passkey_accuracy(model, tokenizer, [512, 1024], trials=4) == {512: 1.0, 1024: 0.0}
    with patch_model(model, "yarn", factor=4):
        assert passkey_accuracy(model, tokenizer, [1024], trials=4)[1024] >= 0.75
