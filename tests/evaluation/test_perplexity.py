"""evaluate_perplexity from end to end."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from hf_posext.errors import DocumentError, InvalidParameterError, UnsupportedModelError
from hf_posext.evaluation import Document, Results, compare, evaluate_perplexity
from hf_posext.evaluation.protocols import DECODER_PROTOCOLS
from hf_posext.evaluation.tokens import tokenize_documents
from hf_posext.evaluation.windows import is_legacy
from hf_posext.patching import patch_model

from ..conftest import tiny_gpt2, tiny_llama
from ..zoo import build
from .helpers import BOS, character_tokenizer, naive_nll, random_texts

LENGTHS = [10, 25, 40]
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 32.0}
OPTIONS: dict[str, dict[str, int]] = {
    "tail": {"tail": 8},
    **{name: {"stride": 4} for name in ("sliding", "legacy-yarn", "legacy-longlora")},
}


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
        text_bytes = sum(len(text[start + (not bos) : start + length - bos].encode()) for text in texts)
        assert row["bits_per_byte"] == pytest.approx(np.sum(pieces) / math.log(2) / text_bytes, rel=1e-6)
        assert row["gain"] is None and row["perplexity_truncated"] is None and "passkey" not in row
        assert row["bos"] == ("first token of each document" if bos else "none: the tokenizer adds none")
        assert (row["protocol"], row["dtype"]) == ("prefix", "float32")


@pytest.mark.parametrize("name", DECODER_PROTOCOLS)
def test_every_protocol_from_end_to_end(llama: LlamaForCausalLM, name: str) -> None:
    """A uniform model has the perplexity of its vocabulary, and nothing to gain; of ASCII a token is a byte."""
    with torch.no_grad():
        llama.lm_head.weight.zero_()
    options = {"lengths": LENGTHS, "factor": 2.0, "trained_length": 16, "protocol": name, **OPTIONS.get(name, {})}
    results = compare(llama, character_tokenizer(bos=True), random_texts(3, 50), ["none", "linear"], **options)
    assert [row["length"] for row in results.rows] == 2 * LENGTHS
    assert (results.provenance["protocol"], results.provenance["legacy"]) == (name, is_legacy(name))
    for row in results.rows:
        assert (row["protocol"], row["documents"], row["dtype"]) == (name, 3, "float32")
        assert row["bos"] == results.provenance["bos"]
        for key in ("perplexity", "perplexity_tail", "perplexity_truncated", "perplexity_truncated_tail"):
            assert row[key] == pytest.approx(128, rel=1e-6)
        assert row["gain"] == pytest.approx(1, rel=1e-6) and row["change"] == pytest.approx(0, abs=1e-6)
        once = name != "legacy-longlora"  # which counts a token as often as windows hold it
        assert row["bits_per_byte"] == (pytest.approx(7, rel=1e-6) if once else None)
    with_positions = {record["length"] for record in results.per_document if record["position_nll_sums"]}
    assert with_positions == (set() if is_legacy(name) else {40}), "the longest length covers the others"
    assert Results.from_dict(results.to_dict()) == results


def test_bits_are_per_byte_of_the_text(llama: LlamaForCausalLM) -> None:
    """A character has one token and one to four bytes; the first of them is not scored."""
    text = "né 漢字 and 😀 " * 5
    row = evaluate_perplexity(llama, character_tokenizer(), [text], [30]).row("none", 30)
    size = len(text[1:30].encode())
    assert size > 29 and row["bits_per_byte"] == pytest.approx(row["nll_sum"] / math.log(2) / size, rel=1e-12)


@pytest.mark.parametrize("bos", [False, True])
def test_bits_per_byte_of_a_legacy_average_are_of_the_sum(llama: LlamaForCausalLM, bos: bool) -> None:
    """The windows of YaRN's script score every token once; its average of their means has no say."""
    texts, options = ["né 漢字 and 😀 " * 5, "plain letters " * 5], {"stride": 4}
    (old,), (sliding,) = (
        evaluate_perplexity(llama, character_tokenizer(bos), texts, [20, 40], protocol=name, **options).rows[:1]
        for name in ("legacy-yarn", "sliding")
    )
    size = sum(len(text[not bos : 40 - bos].encode()) for text in texts)
    assert old["bits_per_byte"] == pytest.approx(old["nll_sum"] / math.log(2) / size, rel=1e-12)
    assert old["bits_per_byte"] == sliding["bits_per_byte"]
    assert math.log(old["perplexity"]) != pytest.approx(old["nll_sum"] / old["tokens"], rel=1e-4), "another average"


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
    rows = tokenize_documents(documents, character_tokenizer(bos=True), length=40, start=5)
    assert rows.ids == ["60 long", "70 long"] and rows.counts == [61, 71]
    assert rows.left_out == [{"document": "30 long", "tokens": 31}, {"document": "20 long", "tokens": 21}]
    assert rows.tokens.shape == (2, 40) and rows.tokens[:, 0].tolist() == [BOS, BOS]


def test_all_documents_too_short_says_what_fits(llama: LlamaForCausalLM) -> None:
    texts = random_texts(1, 30) + random_texts(1, 45)
    with pytest.raises(DocumentError, match=r"10 \+ 40, got \d+ of at most 45. Pass lengths up to 35"):
        evaluate_perplexity(llama, character_tokenizer(), texts, [40], start=10)
    evaluate_perplexity(llama, character_tokenizer(), texts, [35], start=10)


@pytest.mark.parametrize("lengths", [[], [1, 8], [8, 8], [8.0], [True, 8], [-4]])
def test_lengths_that_cannot_be(llama: LlamaForCausalLM, lengths: list[Any]) -> None:
    with pytest.raises(InvalidParameterError, match="lengths"):
        evaluate_perplexity(llama, character_tokenizer(), random_texts(1, 50), lengths)


def test_a_negative_start_is_refused(llama: LlamaForCausalLM) -> None:
    with pytest.raises(InvalidParameterError, match="Expected start to be a whole number of 0 or more, got -1"):
        evaluate_perplexity(llama, character_tokenizer(), random_texts(1, 50), [8], start=-1)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match=r"Expected tokens below 20, the vocabulary of the model, got \d+"):
        evaluate_perplexity(tiny_llama(vocab_size=20), character_tokenizer(), random_texts(1, 50), [8])


def test_a_learned_table_has_an_end() -> None:
    tokenizer, texts = character_tokenizer(), random_texts(1, 200)
    assert evaluate_perplexity(tiny_gpt2(), tokenizer, texts, [64]).rows
    with pytest.raises(InvalidParameterError, match="the positions of the learned table of .*, got 65"):
        evaluate_perplexity(tiny_gpt2(), tokenizer, texts, [65])


def test_an_encoder_without_head_is_refused_in_one_line() -> None:
    with pytest.raises(UnsupportedModelError, match="Expected a causal language model") as error:
        evaluate_perplexity(build("bert", task="base"), character_tokenizer(), random_texts(1, 50), [8])
    assert "\n" not in str(error.value)
