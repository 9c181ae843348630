"""The zoo builds what the sweep needs: small, repeatable, and sensitive to positions."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from tests.helpers import ROOT
from tests.zoo import (
    ENCODERS,
    NOT_BUILT,
    SEQ2SEQ,
    TRAINED_LENGTH,
    build,
    candidate_types,
    has_frequencies,
    other_types,
    token_ids,
)

# One set of frequencies; one per layer type; latent attention; multi-axis; a multimodal config; already extended.
SOME = ("llama", "gemma3_text", "deepseek_v3", "qwen3_5_text", "llama4", "gpt_oss")


@pytest.mark.parametrize("model_type", SOME)
def test_a_model_is_small_repeatable_and_rotary(model_type: str) -> None:
    model, again = build(model_type), build(model_type)
    assert has_frequencies(model)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("model_type", SOME)
@torch.no_grad()
def test_distances_matter(model_type: str) -> None:
    """Doubled distances move the logits by far more than any tolerance of the sweep, or no patch could be judged."""
    model, ids = build(model_type), token_ids(24)
    positions, mask = torch.arange(24)[None], torch.ones(1, 24, dtype=torch.long)
    near = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
    far = model(input_ids=ids, position_ids=2 * positions, attention_mask=mask, use_cache=False).logits
    assert (near - far).norm() > 1e-2 * near.norm()


def test_overrides_reach_the_text_part_and_unknown_ones_are_refused() -> None:
    assert build("gemma3", sliding_window=7).config.text_config.sliding_window == 7
    with pytest.raises(TypeError, match="no_such_field"):
        build("llama", no_such_field=1)


def test_building_leaves_the_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    build("llama")
    assert torch.equal(torch.rand(4), expected)


def test_no_type_is_listed_twice() -> None:
    assert not set(candidate_types()) & set(other_types())
    assert not set(other_types()) & set(NOT_BUILT)


@pytest.mark.parametrize(
    ("model_type", "task"),
    [*((name, "masked-lm") for name in ENCODERS), *((name, "seq2seq-lm") for name in SEQ2SEQ)],
)
@torch.no_grad()
def test_encoders_and_seq2seq_models_run(model_type: str, task: str) -> None:
    length = TRAINED_LENGTH // 2
    decoder = {} if task == "masked-lm" else {"decoder_input_ids": token_ids(8, seed=1)}
    logits = build(model_type, task=task)(input_ids=token_ids(length), **decoder).logits
    assert logits.shape[:2] == (1, length if task == "masked-lm" else 8)
    assert logits.isfinite().all()


def test_the_committed_table_is_what_the_record_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    for page, text in importlib.import_module("sweep_table").pages().items():
        assert page.read_text(encoding="utf-8") == text, "run: python tools/sweep_table.py"


def test_the_record_holds_what_is_promised() -> None:
    """At most three rotary types do not work, of no fewer than 121, and all but six equal transformers itself."""
    rotary = json.loads((ROOT / "results" / "sweep-frequencies.json").read_text(encoding="utf-8"))["rotary"]
    required = ("linear", "yarn", "llama3")
    lame = [name for name, its in rotary.items() if {its["cells"][m]["verdict"] for m in required} != {"works"}]
    assert len(rotary) >= 121
    assert len(lame) <= 3, lame
    alone = {name for name, its in rotary.items() if not all(its["cells"][m].get("equals_native") for m in required)}
    assert alone == {*"gemma4 gemma4_text gemma4_unified gemma4_unified_text lfm3 recurrent_gemma".split()}


def test_the_record_holds_what_is_promised_of_remapping() -> None:
    """Of at least 121 rotary types, all but four pass every check with late rotation; those are refused by name."""
    rotary = json.loads((ROOT / "results" / "sweep-late.json").read_text(encoding="utf-8"))["rotary"]
    lame = {name: its["reason"] for name, its in rotary.items() if set(its["verdicts"].values()) != {"works"}}
    assert len(rotary) >= 121
    assert len(lame) <= 4, lame
    assert all(name in reason for name, reason in lame.items())


def test_the_record_holds_what_is_promised_of_methods_that_fade_follow_rows_or_map_pairs() -> None:
    """Each works, or is refused with a reason, on the types of the other two sweeps."""
    kinds = ("frequencies", "methods")
    rotary, of_methods = (
        json.loads((ROOT / "results" / f"sweep-{kind}.json").read_text())["rotary"] for kind in kinds
    )
    assert rotary.keys() == of_methods.keys()
    for name, record in of_methods.items():
        assert set(record["verdicts"].values()) <= {"works", "refused"}, name
        assert {m for m, verdict in record["verdicts"].items() if verdict == "refused"} == record["reasons"].keys()
