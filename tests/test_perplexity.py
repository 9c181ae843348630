"""Protocols against naive loops, and evaluate_perplexity from end to end."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from hf_posext.errors import DocumentError, EvaluationError, InvalidParameterError, UnsupportedModelError
from hf_posext.evaluation import Document, evaluate_perplexity
from hf_posext.evaluation.protocols import PerplexityProtocol, Prefix, Sliding, make_protocol, sliding_windows
from hf_posext.evaluation.scoring import TokenScorer
from hf_posext.evaluation.tokens import TokenizedDocuments, tokenize_documents
from hf_posext.patching import patch_model

from .conftest import tiny_gpt2, tiny_llama, tokens
from .evaluation_helpers import BOS, character_tokenizer, naive_nll, naive_windowed_nll, random_texts
from .zoo import build

LENGTHS = [10, 25, 40]
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 32.0}


def rows(count: int = 3, length: int = 40, bos: bool = False) -> TokenizedDocuments:
    ids = tokens(length, rows=count)
    if bos:
        ids[:, 0] = BOS
    return TokenizedDocuments([f"document {index}" for index in range(count)], ids, bos)


def measured(
    protocol: PerplexityProtocol, model: LlamaForCausalLM, documents: TokenizedDocuments, multipass: bool = False
) -> dict[tuple[int, int], np.ndarray]:
    found = protocol.measure(TokenScorer(model), documents, LENGTHS, multipass)
    return {(measurement.length, measurement.document): measurement.nll for measurement in found}


def assert_equal_sums(found: dict[Any, np.ndarray], expected: dict[Any, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for key, nll in expected.items():
        assert found[key] == pytest.approx(nll, rel=1e-5, abs=1e-5)  # float32 attention over another shape
        assert found[key].sum() == pytest.approx(nll.sum(), rel=1e-6)


@pytest.mark.parametrize("multipass", [False, True])
def test_prefix_equals_a_forward_per_length(llama: LlamaForCausalLM, multipass: bool) -> None:
    documents = rows()
    expected = {(n, i): naive_nll(llama, row[:n]) for n in LENGTHS for i, row in enumerate(documents.tokens)}
    assert_equal_sums(measured(Prefix(), llama, documents, multipass), expected)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("stride", [1, 4, 9])
def test_sliding_equals_a_forward_per_token(llama: LlamaForCausalLM, bos: bool, stride: int) -> None:
    documents = rows(count=2, bos=bos)
    expected = {
        (n, i): naive_windowed_nll(llama, row, n, stride, bos)
        for n in LENGTHS
        for i, row in enumerate(documents.tokens)
    }
    assert_equal_sums(measured(Sliding(stride), llama, documents), expected)


def test_passes_over_the_trunk(llama: LlamaForCausalLM) -> None:
    """One per document for a static method, and the guard's; one per document and length for a multipass one."""
    calls: list[tuple[int, ...]] = []
    llama.model.layers[0].register_forward_pre_hook(lambda *args: calls.append(tuple(args[1][0].shape[:2])))
    scorer = TokenScorer(llama)
    scorer.token_nll(tokens(10))
    calls.clear()
    list(Prefix().measure(scorer, rows(), LENGTHS, False))
    assert calls == [(1, 10), (1, 40), (1, 40), (1, 40)]
    calls.clear()
    list(Prefix().measure(scorer, rows(), LENGTHS, True))
    assert calls == [(1, 10)] * 3 + [(1, 25)] * 3 + [(1, 40)] * 3
    calls.clear()
    list(Sliding(5).measure(scorer, rows(count=1), [10], False))
    assert calls == [(1, 10), (6, 10)], "windows of equal shape are one batch"


@given(total=st.integers(2, 300), window=st.integers(2, 80), data=st.data(), bos=st.booleans())
def test_windows_score_every_token_once(total: int, window: int, data: st.DataObject, bos: bool) -> None:
    stride = data.draw(st.integers(1, window - 1))
    windows = sliding_windows(total, window, stride, bos)
    assert [token for w in windows for token in range(w.first, w.end)] == list(range(1, total))
    for w in windows:
        held = w.end - w.begin + bos
        assert 2 <= held <= window and w.end > w.first
        assert w.first - w.begin + bos >= (1 if w is windows[0] else window - stride), "context of its first token"


@pytest.mark.parametrize("stride", [0, 10, 25])
def test_a_stride_that_skips_tokens_is_refused(stride: int) -> None:
    with pytest.raises(InvalidParameterError, match=f"stride is {stride} for windows of 10 tokens; give 1 to 9"):
        make_protocol("sliding", LENGTHS, stride)


@pytest.mark.parametrize(
    ("name", "stride", "message"),
    [("prefix", 5, "'prefix' has none"), ("sliding", None, "needs a stride"), ("rolling", None, "prefix, sliding")],
)
def test_protocols_that_cannot_be(name: str, stride: int | None, message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        make_protocol(name, LENGTHS, stride)


def test_guard_refuses_a_model_whose_positions_depend_on_the_length() -> None:
    model = tiny_llama(max_position_embeddings=16, rope_parameters=DYNAMIC)
    with pytest.raises(EvaluationError, match="40 tokens and a fresh one over 10 disagree.*multipass"):
        measured(Prefix(), model, rows())


def test_guard_holds_for_bfloat16() -> None:
    static = tiny_llama().to(torch.bfloat16)
    assert len(measured(Prefix(), static, rows())) == 9
    dynamic = tiny_llama(max_position_embeddings=16, rope_parameters=DYNAMIC).to(torch.bfloat16)
    with pytest.raises(EvaluationError, match="disagree"):
        measured(Prefix(), dynamic, rows())


def test_shipped_dynamic_scaling_gets_a_fresh_forward_per_length() -> None:
    def fresh() -> LlamaForCausalLM:
        return tiny_llama(max_position_embeddings=16, rope_parameters=DYNAMIC)

    tokenizer, texts = character_tokenizer(), random_texts(2, 60)
    results = evaluate_perplexity(fresh(), tokenizer, texts, LENGTHS)
    for length in LENGTHS:
        nll = [naive_nll(fresh(), torch.tensor(tokenizer(text)["input_ids"][:length])).sum() for text in texts]
        assert results.row("none", length)["nll_sum"] == pytest.approx(sum(nll), rel=1e-6)


@pytest.mark.parametrize("bos", [False, True])
def test_rows_equal_the_naive_loop(llama: LlamaForCausalLM, bos: bool) -> None:
    tokenizer, texts, start = character_tokenizer(bos), random_texts(3, 60), 7
    results = evaluate_perplexity(llama, tokenizer, texts, lengths=[40, 25], start=start)
    for length in (25, 40):
        pieces = []
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"][start:]
            pieces.append(naive_nll(llama, torch.tensor(([BOS] if bos else []) + ids)[:length]))
        tail = [nll[length // 2 - 1 :] for nll in pieces]  # nll[0] is of the second token
        row = results.row("none", length)
        assert row["tokens"] == 3 * (length - 1) and row["documents"] == 3
        assert row["nll_sum"] == pytest.approx(np.sum(pieces), rel=1e-6)
        assert row["perplexity"] == pytest.approx(math.exp(np.mean(pieces)), rel=1e-6)
        assert row["perplexity_tail"] == pytest.approx(math.exp(np.mean(tail)), rel=1e-6)
        assert row["ci95"][0] < row["perplexity"] < row["ci95"][1]
        assert row["gain"] is None and row["perplexity_truncated"] is None and "passkey" not in row
    assert results.provenance["bos"].startswith("added" if bos else "none")


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(llama: LlamaForCausalLM) -> None:
    with torch.no_grad():
        llama.lm_head.weight.zero_()
    results = evaluate_perplexity(llama, character_tokenizer(), random_texts(2, 50), LENGTHS)
    for row in results.rows:
        assert row["perplexity"] == pytest.approx(128, rel=1e-6)
        assert row["perplexity_tail"] == pytest.approx(128, rel=1e-6)


def test_tokens_weigh_the_same_whichever_window_they_are_in(llama: LlamaForCausalLM) -> None:
    results = evaluate_perplexity(
        llama, character_tokenizer(), random_texts(2, 50), [10], protocol="sliding", stride=4
    )
    row = results.row("none", 10)
    assert row["tokens"] == 2 * 9, "the document is its first max(lengths) tokens"
    results = evaluate_perplexity(
        llama, character_tokenizer(), random_texts(2, 50), [10, 50], protocol="sliding", stride=4
    )
    assert [row["tokens"] for row in results.rows] == [2 * 49, 2 * 49]
    assert results.provenance["stride"] == 4


def test_rows_are_labelled_with_the_patch_in_force(llama: LlamaForCausalLM) -> None:
    tokenizer, texts = character_tokenizer(), random_texts(2, 200)
    before = evaluate_perplexity(llama, tokenizer, texts, [32, 128])
    with patch_model(llama, "linear", factor=4):
        after = evaluate_perplexity(llama, tokenizer, texts, [32, 128])
    assert {(row["method"], row["factor"]) for row in after.rows} == {("linear", 4.0)}
    assert after.row("linear", 128)["perplexity"] != pytest.approx(before.row("none", 128)["perplexity"], rel=1e-3)
    assert after.provenance["trained_length"] == 64
    assert evaluate_perplexity(llama, tokenizer, texts, [32, 128]).rows == before.rows


def test_training_mode_is_restored(llama: LlamaForCausalLM) -> None:
    llama.train()
    evaluate_perplexity(llama, character_tokenizer(), random_texts(1, 50), [10])
    assert all(module.training for module in llama.modules())


def test_short_documents_are_left_out_and_named() -> None:
    documents = [Document(f"{size} long", text) for size in (30, 60, 20, 70) for text in random_texts(1, size)]
    found = tokenize_documents(documents, character_tokenizer(bos=True), length=40, start=5)
    assert found.ids == ["60 long", "70 long"] and found.counts == [61, 71]
    assert found.left_out == [{"document": "30 long", "tokens": 31}, {"document": "20 long", "tokens": 21}]
    assert found.tokens.shape == (2, 40) and found.tokens[:, 0].tolist() == [BOS, BOS]


def test_all_documents_too_short_says_what_fits(llama: LlamaForCausalLM) -> None:
    texts = random_texts(1, 30) + random_texts(1, 45)
    with pytest.raises(
        DocumentError, match=r"longest has 45 tokens, and start \+ length is 10 \+ 40; use lengths up to 35"
    ):
        evaluate_perplexity(llama, character_tokenizer(), texts, [40], start=10)
    evaluate_perplexity(llama, character_tokenizer(), texts, [35], start=10)


@pytest.mark.parametrize("lengths", [[], [1, 8], [8, 8], [8.0], [True, 8], [-4]])
def test_lengths_that_cannot_be(llama: LlamaForCausalLM, lengths: list[Any]) -> None:
    with pytest.raises(InvalidParameterError, match="lengths"):
        evaluate_perplexity(llama, character_tokenizer(), random_texts(1, 50), lengths)


def test_a_negative_start_is_refused(llama: LlamaForCausalLM) -> None:
    with pytest.raises(InvalidParameterError, match="start is -1"):
        evaluate_perplexity(llama, character_tokenizer(), random_texts(1, 50), [8], start=-1)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match=r"gave token \d+, and the model has 20"):
        evaluate_perplexity(tiny_llama(vocab_size=20), character_tokenizer(), random_texts(1, 50), [8])


def test_a_learned_table_has_an_end() -> None:
    tokenizer, texts = character_tokenizer(), random_texts(1, 200)
    assert evaluate_perplexity(tiny_gpt2(), tokenizer, texts, [64]).rows
    with pytest.raises(InvalidParameterError, match="learned table of 64 positions, and 65 tokens were asked for"):
        evaluate_perplexity(tiny_gpt2(), tokenizer, texts, [65])


def test_an_encoder_without_head_is_refused_in_one_line() -> None:
    with pytest.raises(UnsupportedModelError, match="no causal language-model loss") as error:
        evaluate_perplexity(build("bert", task="base"), character_tokenizer(), random_texts(1, 50), [8])
    assert "\n" not in str(error.value)
