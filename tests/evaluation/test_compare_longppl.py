"""LongPPL in a comparison: one search for key tokens, then the same ones for every method and the control."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from hf_posext import patch_model
from hf_posext.errors import EvaluationError, InvalidParameterError, JournalError, NonFiniteError
from hf_posext.evaluation import Document, Results, compare, evaluate_perplexity, find_key_tokens, key_tokens, longppl
from hf_posext.evaluation.config import Criterion, default_criterion
from hf_posext.evaluation.results import ROW_KEYS

from ..conftest import TRAINED, tiny_gpt2, tiny_llama
from .helpers import (
    BOS,
    CHARACTERS,
    DOCUMENT_KEYS,
    KEY_TOKEN_KEYS,
    LONGPPL_KEYS,
    character_tokenizer,
    naive_nll,
    naive_windowed_nll,
    random_texts,
)

LENGTHS, START, SHORT = [48, 128], 5, 24
FIRST = 3  # the token of the first character


def decided_llama(**overrides: object) -> LlamaForCausalLM:
    """With large logits, so that some tokens are as good as certain, and not so given another context."""
    model = tiny_llama(**overrides)
    with torch.no_grad():
        model.lm_head.weight.mul_(4.0)
    return model


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Text that a model writes by itself: likely given all of it, and unlikely given a part."""
    model = decided_llama()
    unused = [token for token in range(128) if not FIRST <= token < FIRST + len(CHARACTERS)]
    torch.manual_seed(0)
    rows = model.generate(
        torch.tensor([[BOS]] * 4), max_new_tokens=140, do_sample=True, suppress_tokens=unused, eos_token_id=None
    )
    return ["".join(CHARACTERS[token - FIRST] for token in row) for row in rows[:, 1:].tolist()]


def run(texts: list[str], bos: bool = True, **options: Any) -> Results:
    settings: dict[str, Any] = {"lengths": LENGTHS, "factor": 2.0, "start": START, "short_length": SHORT, **options}
    methods = settings.pop("methods", ["none", "linear"])
    return compare(decided_llama(), character_tokenizer(bos), texts, methods, **settings)


def documents_of(texts: list[str]) -> list[Document]:
    return [Document(str(index), text) for index, text in enumerate(texts)]


def key_nll(nll: list[np.ndarray], indices: dict[str, list[int]]) -> np.ndarray:
    return np.concatenate([nll[int(id)][np.array(positions, int) - 1] for id, positions in indices.items()])


@pytest.mark.parametrize("bos", [False, True])
def test_every_method_and_the_control_on_the_same_key_tokens(texts: list[str], bos: bool) -> None:
    model, tokenizer = decided_llama(), character_tokenizer(bos)
    results = run(texts, bos, longppl="none")
    windows = {"short_length": SHORT, "stride": SHORT // 4}
    keys = find_key_tokens(model, tokenizer, documents_of(texts), length=128, start=START, **windows)
    assert keys.found > 10, "the test tells nothing without key tokens"
    rows = [torch.tensor([BOS] * bos + tokenizer(text)["input_ids"][bos + START :])[:128] for text in texts]
    expected = {"none": [naive_nll(model, row) for row in rows]}
    with patch_model(model, "linear", factor=2):
        expected["linear"] = [naive_nll(model, row) for row in rows]
        alone = longppl(model, tokenizer, documents_of(texts), length=128, start=START, keys=keys)
    truncated = [naive_windowed_nll(model, row, TRAINED, TRAINED // 8, bos) for row in rows]
    for method, nll in expected.items():
        row, shorter = results.row(method, 128), results.row(method, 48)
        # Relative: the loops are float64 after float32 logits, which forwards of other shapes round by some 1e-7.
        assert row["longppl"] == pytest.approx(np.exp(key_nll(nll, keys.indices).mean()), rel=1e-5)
        assert row["longppl_truncated"] == pytest.approx(np.exp(key_nll(truncated, keys.indices).mean()), rel=1e-5)
        assert row["key_tokens"] == keys.found
        assert row["longppl_ci95"][0] <= row["longppl"] <= row["longppl_ci95"][1]
        assert all(shorter[key] is None for key in LONGPPL_KEYS)
    row = results.row("linear", 128)
    assert (row["longppl"], row["longppl_ci95"]) == (pytest.approx(alone.value), pytest.approx(alone.ci95))
    assert results.provenance["longppl"] == {
        "evaluator": "none", "alpha": 2.0, "beta": -2.0, "short_length": SHORT, "stride": SHORT // 4, "left_out": []
    }  # fmt: skip


def test_the_thresholds_that_were_asked_for(texts: list[str]) -> None:
    model, tokenizer = decided_llama(), character_tokenizer(bos=True)
    windows = {"short_length": SHORT, "stride": SHORT // 4}
    usual = run(texts, longppl="none").row("linear", 128)["key_tokens"]
    counts = set()
    for thresholds in ({"alpha": 0.5}, {"beta": -0.5}, {"alpha": 3.0, "beta": -4.0}):
        keys = find_key_tokens(model, tokenizer, documents_of(texts), length=128, start=START, **windows, **thresholds)
        results = run(texts, longppl="none", **thresholds)
        assert results.row("linear", 128)["key_tokens"] == keys.found
        assert thresholds.items() <= results.provenance["longppl"].items()
        counts.add(keys.found)
    assert len(counts | {usual}) == 4, "each of them finds other tokens"


def test_results_say_it_and_are_read_again(texts: list[str], tmp_path: Path) -> None:
    results = run(texts, longppl="linear x2")
    assert [list(row) for row in results.rows] == [[*ROW_KEYS, *LONGPPL_KEYS]] * 4
    assert [list(record) for record in results.per_document] == [[*DOCUMENT_KEYS, *KEY_TOKEN_KEYS]] * (3 * 4 * 2)
    assert results.provenance["longppl"]["evaluator"] == "linear x2"
    assert Results.load_json(results.save_json(tmp_path / "r.json")) == results
    last = results.to_frame().iloc[-1]
    assert last["longppl_ci95_low"] <= last["longppl"] <= last["longppl_ci95_high"]
    assert not set(LONGPPL_KEYS) & set(run(texts, short_length=None).rows[0])


@pytest.mark.parametrize(
    "options", [{"protocol": "sliding", "stride": 16}, {"protocol": "rolling"}, {"prefill_chunk": 32}]
)
def test_it_is_the_same_however_shorter_lengths_are_read(texts: list[str], options: dict[str, Any]) -> None:
    plain, changed = run(texts, longppl="none"), run(texts, longppl="none", **options)
    for method in ("none", "linear"):
        for key in LONGPPL_KEYS:
            # Rounding of forwards of other shapes, as above.
            assert changed.row(method, 128)[key] == pytest.approx(plain.row(method, 128)[key], rel=1e-5)


def test_an_evaluator_of_its_own_with_or_without_a_tokenizer(texts: list[str]) -> None:
    evaluator, tokenizer = decided_llama(num_hidden_layers=1), character_tokenizer(bos=True)
    evaluator.config.name_or_path = "other/model"
    windows = {"short_length": SHORT, "stride": SHORT // 4}
    keys = find_key_tokens(evaluator, tokenizer, documents_of(texts), length=128, start=START, **windows)
    results = run(texts, longppl=evaluator)
    assert results.row("linear", 128)["key_tokens"] == keys.found > 0
    assert results.provenance["longppl"]["evaluator"] == "other/model"
    with patch_model(evaluator, "linear", factor=2):
        patched = run(texts, longppl=evaluator)
    assert patched.provenance["longppl"]["evaluator"] == "other/model, linear x2"
    deeper, letters = decided_llama(), character_tokenizer(bos=False)
    settings = {"evaluator_tokenizer": letters, "start": START, **windows}
    keys = find_key_tokens(deeper, tokenizer, documents_of(texts), length=128, **settings)
    results_of_letters = run(texts, longppl=(deeper, letters))
    assert results_of_letters.row("linear", 128)["key_tokens"] == sum(map(len, keys.indices.values())) > 0


def test_one_model_beside_its_control(texts: list[str]) -> None:
    model = decided_llama()
    windows: dict[str, Any] = {"start": START, "short_length": SHORT}
    compared = run(texts, longppl="linear")
    with patch_model(model, "linear", factor=2):
        alone = evaluate_perplexity(
            model, character_tokenizer(True), texts, LENGTHS, control=decided_llama(), longppl="linear", **windows
        )
    for key in LONGPPL_KEYS:
        assert alone.rows[-1][key] == compared.row("linear", 128)[key]
    assert alone.rows[-1]["longppl_truncated"] is not None
    bare = evaluate_perplexity(model, character_tokenizer(True), texts, LENGTHS, longppl="none", **windows)
    assert bare.rows[-1]["longppl_truncated"] is None and bare.rows[-1]["longppl"] is not None


@pytest.mark.parametrize(
    ("short_length", "trained", "longest", "expected"),
    [
        (None, 512, 4096, (256, 64)),
        (None, 131_072, 1_000_000, (4096, 1024)),
        (None, None, 400, (200, 50)),
        (None, 4096, 600, (300, 75)),
        (1000, 512, 4096, (1000, 250)),
        (3, 512, 4096, (3, 1)),
    ],
)
def test_the_short_context(
    short_length: int | None, trained: int | None, longest: int, expected: tuple[int, int]
) -> None:
    assert default_criterion({"short_length": short_length}, trained, longest) == Criterion(2.0, -2.0, *expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"longppl": ""}, "one method \\(none, linear x2\\), got '', which none of them have. Pass one of these"),
        ({"longppl": "yarn"}, "\\(none, linear x2\\), got 'yarn', which none of them have. Pass"),
        ({"longppl": None}, "Expected longppl= with short_length=24, got none. Pass longppl="),
        ({"longppl": None, "short_length": None, "beta": -1.0}, "Expected longppl= with beta=-1.0, got none"),
        ({"longppl": None, "short_length": None, "alpha": 1.0}, "Expected longppl= with alpha=1.0, got none"),
        ({"longppl": "none", "beta": 2.0}, r"alpha and beta to be finite and beta below 0, in nats, got 2.0 and 2.0"),
        ({"longppl": "none", "alpha": math.nan}, "Expected alpha to be a number or None, got nan"),
        ({"longppl": "none", "short_length": 120}, "their sum below 128 tokens, got 120 and 30"),
        ({"longppl": "none", "short_length": 0}, "short_length to be a whole number of 1 or more, got 0"),
        ({"longppl": "none", "protocol": "tail", "tail": 8}, "sliding, rolling for longppl.* got 'tail'"),
        ({"longppl": "none", "protocol": "legacy-yarn", "stride": 8}, "for longppl, .* got 'legacy-yarn'"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_measured(
    texts: list[str], options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("measured")

    monkeypatch.setattr("hf_posext.evaluation.scorer.TokenScorer.token_nll", read)
    with pytest.raises(InvalidParameterError, match=message):
        run(texts, **options)


def test_an_evaluator_that_cannot_read_is_refused(texts: list[str]) -> None:
    with pytest.raises(InvalidParameterError, match="Expected tokens below 20, .* evaluator_tokenizer="):
        run(texts, longppl=decided_llama(vocab_size=20))
    with pytest.raises(InvalidParameterError, match="64 tokens, the positions of the learned table"):
        run(texts, longppl=tiny_gpt2())
    with pytest.raises(InvalidParameterError, match="\\(linear x2, linear x4\\), got .* several of them"):
        run(texts, methods=["linear", "linear(factor=4)"], longppl="linear")


def test_no_key_tokens_are_no_error(texts: list[str], caplog: pytest.LogCaptureFixture) -> None:
    flat = tiny_llama()
    with torch.no_grad():
        flat.lm_head.weight.zero_()
    with caplog.at_level(logging.WARNING, logger="hf_posext"):
        results = run(texts, longppl=flat)
    assert "no token is key, so there is no LongPPL: more than 24 tokens" in caplog.text
    row = results.row("linear", 128)
    assert (row["longppl"], row["longppl_ci95"], row["longppl_truncated"], row["key_tokens"]) == (None, None, None, 0)


def test_a_document_whose_key_tokens_cannot_be_found_counts_for_the_rest(
    texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, find = run(texts, longppl="none"), key_tokens.find_in_row

    def fail_at(which: set[int]) -> None:
        def find_or_fail(scorer: Any, documents: Any, index: int, criterion: Any) -> Any:
            if index in which:
                raise NonFiniteError(f"Expected finite logits in document {index}")
            return find(scorer, documents, index, criterion)

        monkeypatch.setattr(key_tokens, "find_in_row", find_or_fail)

    fail_at({1})
    results = run(texts, longppl="none")
    row, before = results.row("linear", 128), undisturbed.row("linear", 128)
    assert {key: row[key] for key in ROW_KEYS} == {key: before[key] for key in ROW_KEYS}
    records = [
        r for r in undisturbed.per_document if (r["method"], r["length"]) == ("linear", 128) and r["document"] != "1"
    ]
    sums, counts = (sum(record[key] for record in records) for key in KEY_TOKEN_KEYS)
    assert row["longppl"] == pytest.approx(np.exp(sums / counts), rel=1e-12) and row["key_tokens"] == counts
    reason = "Expected finite logits in document 1"
    assert results.provenance["longppl"]["left_out"] == [{"document": "1", "reason": reason}]
    fail_at({0, 1, 2, 3})
    message = "a failure on every document: Expected finite logits .*. Pass another evaluator, as in"
    with pytest.raises(EvaluationError, match=message):
        run(texts, longppl="none")


def test_a_run_goes_on_with_the_key_tokens_of_its_journal(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "journal.jsonl"
    undisturbed = run(texts, longppl="linear", journal=journal)
    lines = journal.read_text().splitlines(keepends=True)
    kinds = [json.loads(line)["task"]["kind"] for line in lines[1:]]
    assert kinds == ["keys"] * 4 + ["nll"] * (3 * 4)
    journal.write_text("".join(lines[:3]))  # two of four documents have key tokens
    assert run(texts, longppl="linear", journal=journal).rows == undisturbed.rows
    assert len(journal.read_text().splitlines()) == len(lines)
    monkeypatch.setattr(key_tokens, "find_in_row", None)
    assert run(texts, longppl="linear", journal=journal).rows == undisturbed.rows, "nothing is found twice"
    changes: list[dict[str, Any]] = [
        {"longppl": "none"},
        {"longppl": "linear", "short_length": 16},
        {"longppl": "linear", "alpha": 1.5},
        {"longppl": "linear", "beta": -1.5},
        {"longppl": decided_llama()},
        {"longppl": None, "short_length": None},
    ]
    for change in changes:
        with pytest.raises(JournalError):
            run(texts, journal=journal, **change)


def test_random_texts_have_few_key_tokens() -> None:
    """Purpose of the fixture above."""
    assert run(random_texts(4, 140), longppl="none").row("none", 128)["key_tokens"] < 10
