"""LongPPL: the key tokens of the definition, token by token; carried to another tokenizer; LongCE's weights."""

from __future__ import annotations

import dataclasses
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedModel

from hf_posext.errors import EvaluationError, InvalidParameterError
from hf_posext.evaluation import Document, find_key_tokens, longce_weights, longppl
from hf_posext.evaluation.config import Criterion
from hf_posext.evaluation.key_tokens import contrast_row
from hf_posext.evaluation.prompts import passkey_prompts
from hf_posext.evaluation.scorer import TokenScorer
from hf_posext.evaluation.tokens import tokens_inside
from hf_posext.patching import patch_model

from ..conftest import tiny_gpt2, tiny_llama
from ..helpers import shipped_model, shipped_tokenizer
from .helpers import BOS, character_tokenizer, naive_nll, random_texts

LENGTH, SHORT, STRIDE = 48, 12, 5
ALPHA, BETA = 0.3, -6.0
"""Thresholds at which models of random weights have key tokens."""

SETTINGS = {"alpha": ALPHA, "beta": BETA, "short_length": SHORT, "stride": STRIDE}
TOLERANCE = 1e-5
"""Relative: the loops are float64 after float32 logits; windows of another shape round those by some 1e-7."""


@pytest.fixture
def documents() -> list[Document]:
    return [Document(f"d{index}", text) for index, text in enumerate(random_texts(3, 60))]


def naive_keys(model: PreTrainedModel, ids: torch.Tensor, bos: bool) -> list[int]:
    """The definition: each token by two forwards of its own, over its long and over its short context."""
    keys, first = [], int(bos)
    for token in range(SHORT + STRIDE, len(ids)):
        begin = (token - SHORT) // STRIDE * STRIDE  # tokens with the same beginning share a window
        short = torch.cat([ids[:first], ids[first + begin : token + 1]])
        long_nll, short_nll = naive_nll(model, ids[: token + 1])[-1], naive_nll(model, short)[-1]
        if short_nll - long_nll > ALPHA and -long_nll > BETA:
            keys.append(token)
    return keys


@pytest.mark.parametrize(("bos", "start"), [(False, 0), (True, 0), (True, 7)])
def test_key_tokens_and_their_perplexity_are_the_definition(documents: list[Document], bos: bool, start: int) -> None:
    model, tokenizer = tiny_llama(), character_tokenizer(bos)
    result = longppl(model, tokenizer, documents, length=LENGTH, start=start, **SETTINGS)
    plain = {d.id: character_tokenizer()(d.text)["input_ids"][start:] for d in documents}
    rows = {id: torch.tensor(([BOS] * bos + ids)[:LENGTH]) for id, ids in plain.items()}
    expected = {id: naive_keys(model, ids, bos) for id, ids in rows.items()}
    assert result.keys.indices == expected
    nll = np.concatenate([naive_nll(model, rows[id])[np.array(keys, int) - 1] for id, keys in expected.items()])
    assert len(nll) > 3, "the test tells nothing without key tokens"
    assert result.key_tokens == result.keys.found == len(nll)
    assert result.value == pytest.approx(np.exp(nll.mean()), rel=TOLERANCE)
    everything = np.concatenate([naive_nll(model, ids) for ids in rows.values()])
    assert result.tokens == len(everything) == 3 * (LENGTH - 1)
    assert result.perplexity == pytest.approx(np.exp(everything.mean()), rel=TOLERANCE)
    for record in result.per_document:
        key_nll = naive_nll(model, rows[record["document"]])[np.array(expected[record["document"]], int) - 1]
        assert (record["key_tokens"], record["nll_sum"]) == (len(key_nll), pytest.approx(key_nll.sum(), rel=TOLERANCE))
    assert result.ci95 is not None and result.ci95[0] <= result.value <= result.ci95[1]


@pytest.mark.parametrize(
    ("bos", "evaluator_bos", "start"), [(False, False, 0), (True, False, 0), (False, True, 0), (False, True, 2)]
)
def test_an_evaluator_of_another_tokenizer_marks_the_same_characters(
    documents: list[Document], bos: bool, evaluator_bos: bool, start: int
) -> None:
    """The evaluator has single characters; the measured model has pieces of several, and its tokens carry spaces."""
    pieces, characters = shipped_tokenizer(), character_tokenizer(bos)
    letters = character_tokenizer(evaluator_bos)
    text = " He said that the island was far away and that the ship would not come back"
    documents = [Document("a", text + documents[0].text), Document("b", documents[1].text[:20] + text)]
    evaluator, length = tiny_llama(max_position_embeddings=256), 20
    model, tokenizer = (tiny_llama(vocab_size=4096), pieces) if not bos else (tiny_llama(), characters)
    length = length if not bos else 60
    settings = {**SETTINGS, "alpha": 0.05, "beta": -9.0}
    options = {"length": length, "start": start, "evaluator_tokenizer": letters, **settings}
    keys = find_key_tokens(evaluator, tokenizer, documents, **options)
    expected = {}
    for document in documents:
        every = tokenizer(document.text, return_offsets_mapping=True)["offset_mapping"]
        offsets, skipped = every[start : start + length], every[start - 1][1] if start else 0
        ids = torch.tensor(letters(document.text[skipped : offsets[-1][1]])["input_ids"])
        contrast = contrast_row(TokenScorer(evaluator), ids, "x", evaluator_bos, Criterion(**settings))
        marked = {skipped + int(key) - evaluator_bos for key in contrast.keys}  # a character a token
        expected[document.id] = [
            index
            for index, (begin, end) in enumerate(offsets)
            if index > 0
            and marked & set(range(begin, end))
            and all(place in marked or document.text[place].isspace() for place in range(begin, end))
        ]
    assert keys.indices == expected
    total = sum(map(len, expected.values()))
    assert 2 < total <= keys.found
    result = longppl(model, tokenizer, documents, evaluator=evaluator, **options)
    assert result.keys == keys and result.key_tokens == total


def test_the_first_token_of_a_row_is_never_key(documents: list[Document], llama: LlamaForCausalLM) -> None:
    """It has no NLL, though an evaluator whose rows begin with BOS has one. Below any gain, every token is key."""
    settings = {**SETTINGS, "alpha": -1e9, "beta": -1e9}
    result = longppl(
        llama,
        character_tokenizer(),
        documents,
        length=LENGTH,
        evaluator=llama,
        evaluator_tokenizer=character_tokenizer(bos=True),
        **settings,
    )
    assert all(indices == list(range(1, LENGTH)) for indices in result.keys.indices.values())
    assert result.value == pytest.approx(result.perplexity, rel=1e-12)


def test_a_copy_of_the_tokenizer_is_no_other_tokenizer() -> None:
    """Nothing is carried over characters, by which the tokens of one character are key together."""
    original, copy = (shipped_tokenizer() for _ in range(2))
    document = Document("a", "\u4f60\u597d\u4e16\u754c\u5929\u5730\u7384\u9ec4\u5b87\u5b99\u6d2a\u8352")
    settings = {**SETTINGS, "alpha": 0.05, "beta": -9.0, "length": 36}
    evaluator = tiny_llama(vocab_size=4096)
    copy("He said", truncation=True, max_length=1)  # what an earlier call of somebody else leaves
    keys = find_key_tokens(evaluator, original, [document], evaluator_tokenizer=copy, **settings)
    assert keys == find_key_tokens(evaluator, original, [document], **settings)
    assert len({index // 3 for index in keys.indices["a"]}) > len(keys.indices["a"]) / 3, "some of a character's three"


@given(
    text=st.text(alphabet="ab \n", min_size=1, max_size=12),
    tokens=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 4)), max_size=6),
    spans=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 4)), max_size=4),
)
@settings(max_examples=200, deadline=None)
def test_tokens_inside_spans(text: str, tokens: list[tuple[int, int]], spans: list[tuple[int, int]]) -> None:
    def clip(pairs: list[tuple[int, int]]) -> np.ndarray:
        ends = [(min(begin, len(text)), min(begin + size, len(text))) for begin, size in pairs]
        return np.array(ends, dtype=np.int64).reshape(-1, 2)

    marked = {place for begin, end in clip(spans) for place in range(begin, end)}
    expected = [
        bool(marked & set(range(b, e))) and all(place in marked or text[place].isspace() for place in range(b, e))
        for b, e in clip(tokens)
    ]
    assert tokens_inside(clip(tokens), clip(spans), text).tolist() == expected


def test_the_same_key_tokens_for_every_model(documents: list[Document], llama: LlamaForCausalLM) -> None:
    tokenizer = character_tokenizer()
    keys = find_key_tokens(llama, tokenizer, documents, length=LENGTH, **SETTINGS)
    with patch_model(llama, "linear", factor=4):
        patched = longppl(llama, tokenizer, documents, length=LENGTH, keys=keys)
        nll = [naive_nll(llama, torch.tensor(tokenizer(d.text)["input_ids"][:LENGTH])) for d in documents]
        with_name = find_key_tokens(llama, tokenizer, documents, length=LENGTH, **SETTINGS)
    indices = [np.array(keys.indices[document.id], int) for document in documents]
    key_nll = np.concatenate([values[index - 1] for values, index in zip(nll, indices, strict=True)])
    assert patched.value == pytest.approx(np.exp(key_nll.mean()), rel=TOLERANCE)
    assert patched.keys is keys
    assert (keys.evaluator, with_name.evaluator) == ("LlamaForCausalLM", "LlamaForCausalLM, linear x4")
    shallow = longppl(
        llama, tokenizer, documents, length=LENGTH, evaluator=tiny_llama(num_hidden_layers=1), **SETTINGS
    )
    assert shallow.keys.indices != keys.indices


def test_documents_without_key_tokens_count_nothing(documents: list[Document], llama: LlamaForCausalLM) -> None:
    tokenizer = character_tokenizer()
    keys = find_key_tokens(llama, tokenizer, documents, length=LENGTH, **SETTINGS)
    few = dataclasses.replace(keys, indices={**keys.indices, "d0": [40], "d1": [], "d2": []})
    result = longppl(llama, tokenizer, documents, length=LENGTH, keys=few)
    assert [record["longppl"] for record in result.per_document] == [pytest.approx(result.value), None, None]
    assert (result.key_tokens, result.ci95) == (1, None)


def test_no_key_tokens_at_all_is_an_error(documents: list[Document], llama: LlamaForCausalLM) -> None:
    tokenizer = character_tokenizer()
    settings = {**SETTINGS, "alpha": 1000.0}
    keys = find_key_tokens(llama, tokenizer, documents, length=LENGTH, **settings)
    assert keys.found == 0 and set(keys.indices) == {"d0", "d1", "d2"}
    with pytest.raises(EvaluationError, match="got none of 141 tokens .* alpha 1000 .* more than 12 tokens"):
        longppl(llama, tokenizer, documents, length=LENGTH, **settings)


def test_what_cannot_be_is_refused(documents: list[Document], llama: LlamaForCausalLM) -> None:
    tokenizer = character_tokenizer()

    def measure(**changes: object) -> None:
        longppl(llama, tokenizer, documents, **{"length": LENGTH, **SETTINGS, **changes})

    for short, stride in ((0, 5), (12, 0), (40, 8)):
        with pytest.raises(InvalidParameterError, match=f"short_length and stride .*, got {short} and {stride},"):
            measure(short_length=short, stride=stride)
    keys = find_key_tokens(llama, tokenizer, documents, length=LENGTH, **SETTINGS)
    with pytest.raises(InvalidParameterError, match="Pass one of them"):
        measure(keys=keys, evaluator=llama)
    with pytest.raises(InvalidParameterError, match="got it alone"):
        measure(evaluator_tokenizer=tokenizer)
    with pytest.raises(InvalidParameterError, match="of length 40 from token 0 on, .* got length 48 from token 0"):
        measure(keys=keys, length=40)
    with pytest.raises(InvalidParameterError, match="of length 48 from token 3 on, .* got length 48 from token 0"):
        measure(keys=keys, start=3)
    with pytest.raises(InvalidParameterError, match=r"without the documents \['new'\]"):
        longppl(llama, tokenizer, [Document("new", documents[0].text)], length=LENGTH, keys=keys)
    with pytest.raises(InvalidParameterError, match="Expected tokens below 20, .* Pass each model's own tokenizer"):
        measure(evaluator=tiny_llama(vocab_size=20))
    slow = Mock(is_fast=False, bos_token_id=None)
    with pytest.raises(InvalidParameterError, match="Expected a tokenizer with character offsets, got Mock"):
        measure(evaluator=llama, evaluator_tokenizer=slow)
    with pytest.raises(InvalidParameterError, match="Expected a tokenizer, got int"):
        measure(evaluator=llama, evaluator_tokenizer=3)
    with pytest.raises(InvalidParameterError, match="64 tokens, the positions of the learned table"):
        texts = random_texts(1, 100)
        longppl(tiny_gpt2(), tokenizer, texts, length=80, **SETTINGS)


def test_a_pass_key_is_what_the_shipped_model_finds_key() -> None:
    """All that the far context tells in this text is the number: its digits, and nothing else, are key."""
    model = shipped_model()
    tokenizer = shipped_tokenizer()
    prompt = passkey_prompts(tokenizer, 480, 1, seed=1)[0]
    assert prompt.depth < 0.7, "the key is farther away than the short context reaches"
    text = tokenizer.decode(prompt.tokens) + f" {prompt.answers[0]}"
    length = len(tokenizer(text)["input_ids"])
    # Digits of a short context are a guess among ten, 2.3 nats each, less what the model has of a bias.
    keys = find_key_tokens(model, tokenizer, [text], length=length, alpha=1.0, short_length=64, stride=16)
    digits = set(range(length - 5, length))
    near_end = {index for index in keys.indices["0"] if index >= length - 100}
    assert len(near_end & digits) >= 4 and near_end <= digits


def test_longce_weights() -> None:
    long = torch.tensor([1.0, 1.0, 0.5, 0.0, 0.0], requires_grad=True)
    short = torch.tensor([1.0, 0.0, 0.5 + float(np.log(2)), 3.0, 1e4])
    weights = longce_weights(long, short)
    assert not weights.requires_grad
    assert weights.tolist() == pytest.approx([1.0, np.exp(-1), 2.0, 5.0, 5.0], rel=1e-6)
    (weights * long).sum().backward()
    assert torch.equal(long.grad, weights)
    assert longce_weights(long, short, cap=1.5).max() == 1.5
    for cap in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(InvalidParameterError, match="Expected cap to be (positive and finite|a number)"):
            longce_weights(long, short, cap=cap)
    with pytest.raises(InvalidParameterError, match="Pass the same tokens"):
        longce_weights(long, short[1:])


def test_weights_of_the_contrast_train_a_model(llama: LlamaForCausalLM) -> None:
    ids = torch.randint(3, 60, (LENGTH,), generator=torch.Generator().manual_seed(0))
    ids[0] = BOS
    contrast = contrast_row(TokenScorer(llama), ids, "x", True, Criterion(short_length=SHORT, stride=STRIDE))
    log_probabilities = llama(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    nll = -log_probabilities.gather(1, ids[1:, None])[:, 0]
    weights = longce_weights(nll, torch.from_numpy(contrast.short).float())
    # Tokens 1 to 16 have one context, so they weigh 1 but for rounding of forwards of other shapes.
    assert weights[: SHORT + STRIDE - 1].tolist() == pytest.approx([1.0] * (SHORT + STRIDE - 1), abs=1e-4)
    assert (weights[SHORT + STRIDE :] - 1).abs().max() > 0.1
    (weights * nll).mean().backward()
    assert llama.lm_head.weight.grad.abs().sum() > 0
