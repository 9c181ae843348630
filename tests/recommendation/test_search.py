"""Searched frequencies: in order, no worse than their seeds, the same after a kill, and native."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_posext
from hf_posext import ExtensionPlan
from hf_posext.errors import DocumentError, EvaluationError, InvalidParameterError, MethodNotApplicableError
from hf_posext.frequency_search import SearchedFactors, children_of, first_generation, ordered, search, seeds
from hf_posext.patching import detect_scheme

from ..conftest import EXAMPLES, TRAINED, logits, realigned, tiny_gpt2, tiny_llama, tokens
from ..evaluation.helpers import character_tokenizer, random_texts
from ..helpers import run_python

LENGTH = 2 * TRAINED


def run(**options: Any) -> SearchedFactors:
    settings = {"population": 6, "generations": 2, **options}
    return search(
        tiny_llama(), character_tokenizer(), random_texts(2, 140), settings.pop("length", LENGTH), **settings
    )


@cache
def found() -> SearchedFactors:
    return run()


def test_the_best_is_no_worse_than_the_seeds_and_measured_as_by_a_comparison() -> None:
    best = found()
    assert best.perplexity <= min(best.seeds.values()) and list(best.seeds) == ["yarn", "ntk"]
    assert list(best.to_frame().measured) == [6, 9, 12] and list(best.to_frame().best)[-1] == best.perplexity
    results = hf_posext.compare(
        tiny_llama(), character_tokenizer(), random_texts(2, 140), ["yarn", best.method],
        lengths=[LENGTH], target_length=LENGTH,
    )  # fmt: skip
    assert results.row(best.method.label, LENGTH)["perplexity_tail"] == pytest.approx(best.perplexity, rel=1e-12)
    # Factors have six decimals, and phases are YaRN's up to that.
    assert results.row("yarn", LENGTH)["perplexity_tail"] == pytest.approx(best.seeds["yarn"], rel=1e-5)


def test_the_same_seed_finds_the_same_and_another_seed_another() -> None:
    assert run().plan == found().plan and run().history == found().history
    assert run(seed=1).plan != found().plan


@pytest.mark.parametrize("lines_left", [1, 2, 7, 20])
def test_a_search_that_was_killed_goes_on_to_the_same_result(lines_left: int, tmp_path: Path) -> None:
    """After a kill the journal ends anywhere, here also within a line."""
    journal = tmp_path / "journal.jsonl"
    assert run(journal=journal).plan == found().plan
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 12 * 2
    journal.write_bytes(b"".join(lines[:lines_left]) + lines[lines_left][:9])
    again = run(journal=journal)
    assert again.plan == found().plan and again.history == found().history
    assert sorted(journal.read_bytes().splitlines()) == sorted(b"".join(lines).splitlines())


def test_a_finished_search_goes_on_through_more_generations(tmp_path: Path) -> None:
    run(journal=tmp_path / "journal.jsonl")
    extended = run(generations=3, journal=tmp_path / "journal.jsonl")
    assert extended.history[:3] == found().history and extended.plan == run(generations=3).plan
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 1 + 15 * 2


def test_the_result_opens_in_plain_transformers_without_this_package(tmp_path: Path) -> None:
    model, ids = tiny_llama(), tokens(LENGTH)
    plan = ExtensionPlan.load(found().save(tmp_path / "plan.json"))
    with hf_posext.patch_model(model, plan) as patch:
        assert patch.native_obstacle is None
        patch.save_pretrained(tmp_path / "saved")
        torch.save({"ids": ids, "logits": logits(realigned(model), ids)}, tmp_path / "expected.pt")
    assert plan.rotaries[0].rope_parameters["rope_type"] == "longrope"  # type: ignore[index]
    code = (
        "import sys, torch; sys.modules['hf_posext'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "torch.set_num_threads(1)\n"
        f"held = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'saved')!r}).eval()\n"
        "for parameter in model.parameters(): parameter.data = parameter.data.clone()\n"
        "with torch.no_grad(): found = model(input_ids=held['ids']).logits\n"
        "assert torch.equal(found, held['logits']), (found - held['logits']).abs().max()\n"
    )
    run_python("-c", code)


def test_seeds_are_the_published_formulas() -> None:
    scheme = detect_scheme(tiny_llama())
    pairs, factor = scheme.rotaries[0].pairs, 4.0
    formulas = seeds(scheme, TRAINED, int(factor * TRAINED))
    expected = [factor ** (2 * i / (2 * pairs - 2)) for i in range(pairs)]
    assert formulas["ntk"] == pytest.approx(expected, rel=1e-5)
    assert formulas["yarn"][-1] == factor and all(
        a <= b for a, b in zip(formulas["yarn"], formulas["yarn"][1:], strict=False)
    )


def test_children_never_fall_and_keep_the_bounds() -> None:
    draw, largest = np.random.default_rng(0), 9.0
    parents = first_generation([(1.0,) * 8, tuple(float(n) for n in range(1, 9))], 20, largest, draw)
    children = children_of(parents, set(parents), 40, largest, draw)
    assert len(set(children)) == 40 and not set(children) & set(parents)
    for child in children:
        assert child[0] >= 1 and child[-1] <= 9 and list(child) == sorted(child)
    factors = ordered(np.log([1.0, 4.0, 2.0, 8.0]), largest)
    assert factors == pytest.approx((1, math.sqrt(8), math.sqrt(8), 8), abs=1e-6)


def test_key_tokens_as_the_objective() -> None:
    path = EXAMPLES / "tiny" / "tiny-rope"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    texts = hf_posext.load_documents(str(EXAMPLES / "data" / "train.jsonl"), limit=1)
    options: dict[str, Any] = {"trained_length": 64, "start": 2000, "population": 4, "generations": 1}
    tokenizer = AutoTokenizer.from_pretrained(path)
    best = search(model, tokenizer, texts, 256, objective="key-tokens", **options)
    results = hf_posext.compare(
        model, tokenizer, texts, ["yarn", best.method], lengths=[256], target_length=256, trained_length=64,
        start=2000, longppl="yarn x4",
    )  # fmt: skip
    assert results.row(best.method.label, 256)["longppl"] == pytest.approx(best.perplexity, rel=1e-12)
    assert json.loads(json.dumps(best.to_dict()))["objective"] == "key-tokens"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"length": TRAINED}, InvalidParameterError, "which needs no search"),
        ({"length": 32}, InvalidParameterError, "below the trained length of 64"),
        ({"length": 1000}, DocumentError, "Expected documents of start"),
        ({"population": 3}, InvalidParameterError, "Expected population to be a whole number of at least 4, got 3"),
        ({"generations": 0}, InvalidParameterError, "generations to be a whole number of at least 1, got 0"),
        ({"objective": "ppl"}, InvalidParameterError, "Expected objective to be one of tail, key-tokens, got 'ppl'"),
        ({"objective": "key-tokens"}, EvaluationError, "No token of the documents needs the long context"),
    ],
    ids=str,
)
def test_bad_input_says_what_to_do(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(**options)


def test_other_positions_and_no_documents_are_refused() -> None:
    with pytest.raises(MethodNotApplicableError, match="gpt2 has learned positions. See hf-posext recommend"):
        search(tiny_gpt2(), character_tokenizer(), random_texts(2, 140), LENGTH)
    with pytest.raises(DocumentError, match="Pass one or more"):
        search(tiny_llama(), character_tokenizer(), [], LENGTH)
