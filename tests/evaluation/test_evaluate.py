"""One model as it is, beside the model it was made from."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from hf_posext import patch_model
from hf_posext.errors import AlreadyPatchedError, InvalidParameterError
from hf_posext.evaluation import EvaluationConfig, Results, compare, evaluate_perplexity
from hf_posext.evaluation.rows import Row

from ..conftest import TRAINED, tiny_bloom, tiny_llama
from ..zoo import build
from .helpers import PASSKEY_KEYS, character_tokenizer, random_texts
from .test_chat import TEMPLATE

TEXTS = random_texts(3, 140)
LENGTHS = [48, 128]


def run(model: Any, **options: Any) -> Results:
    return evaluate_perplexity(model, character_tokenizer(), TEXTS, LENGTHS, **options)


def test_a_control_gives_what_a_comparison_gives(llama: LlamaForCausalLM) -> None:
    compared = compare(llama, character_tokenizer(), TEXTS, ["linear"], lengths=LENGTHS, factor=2)
    base = copy.deepcopy(llama).train()
    with patch_model(llama, "linear", factor=2):
        alone, beside = run(llama), run(llama, control=base)
    assert beside.rows == compared.rows and beside.per_document == compared.per_document
    of_control = ("perplexity_truncated", "perplexity_truncated_tail", "gain", "gain_ci95", "change", "change_ci95")
    assert all(row[key] is None for row in alone.rows for key in of_control)
    assert beside.provenance["trained_length"] == TRAINED and beside.provenance["control"] == "LlamaForCausalLM"
    assert all(module.training for module in base.modules()), "it is as it was"


def test_a_fine_tuned_model_is_compared_with_its_base(llama: LlamaForCausalLM) -> None:
    tuned = get_peft_model(
        copy.deepcopy(llama), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    results = run(tuned, control=llama, trained_length=32, label="lora", passkey=0)
    untuned = run(tiny_llama(), control=llama, trained_length=32)
    assert [row["method"] for row in results.rows] == ["lora"] * 2 and untuned.rows[0]["method"] == "model"
    assert results.rows[1]["perplexity_truncated_tail"] == untuned.rows[1]["perplexity_truncated_tail"]
    assert results.rows[1]["perplexity_tail"] != untuned.rows[1]["perplexity_tail"]
    assert results.provenance["trained_length"] == 32


def test_inside_the_trained_length_the_change_is_from_the_control(llama: LlamaForCausalLM) -> None:
    with patch_model(llama, "linear", factor=2):
        (check,) = run(llama, control=tiny_llama()).short_context()
    before = run(tiny_llama()).row("none", 48)["perplexity"]
    with patch_model(llama, "linear", factor=2):
        after = run(llama).row("linear", 48)["perplexity"]
    assert check["length"] == 48 and check["change"] == pytest.approx(after / before - 1, abs=1e-6)


def test_pass_keys_of_one_model_are_those_of_a_comparison(llama: LlamaForCausalLM) -> None:
    options: dict[str, Any] = {"lengths": [120, 128], "passkey": 3, "seed": 5}
    compared = compare(llama, character_tokenizer(), TEXTS, ["none"], **options)
    alone = evaluate_perplexity(llama, character_tokenizer(), TEXTS, **options)
    assert [[row[key] for key in PASSKEY_KEYS] for row in alone.rows] == [
        [row[key] for key in PASSKEY_KEYS] for row in compared.rows
    ]


def test_the_name_of_the_control_is_not_a_label(llama: LlamaForCausalLM) -> None:
    """Tasks are known by their label: the model's would have been the control's, and every gain 1."""
    with pytest.raises(InvalidParameterError, match="label to be another name .*, got 'truncated'"):
        run(llama, label="truncated", control=tiny_llama())


def test_controls_that_cannot_be_are_refused(llama: LlamaForCausalLM) -> None:
    llama.register_forward_pre_hook(lambda *_: pytest.fail("nothing may be measured"))
    with pytest.raises(InvalidParameterError, match="Expected trained_length to be that of a control, got 64"):
        run(llama, trained_length=64)
    patched = tiny_llama()
    patch_model(patched, "linear", factor=2)
    with pytest.raises(AlreadyPatchedError, match="got one with a patch in force"):
        run(llama, control=patched)
    with pytest.raises(InvalidParameterError, match="to have a trained length .*, got None. Pass trained_length="):
        run(llama, control=tiny_bloom())
    with pytest.raises(InvalidParameterError, match="Expected tokens below 50, the vocabulary of the model, got"):
        run(llama, control=tiny_llama(vocab_size=50))


@pytest.mark.parametrize("where", ["around", "inside"])
def test_autocast_is_named_and_compared_in_its_own_precision(where: str) -> None:
    """It may be on around the call, or inside the forward, where `accelerator.prepare` puts it."""
    model = build("llama")
    if where == "inside":
        AcceleratorState._reset_state()  # another test of this process may have made an Accelerator
        model = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
        results = compare(
            model, character_tokenizer(), TEXTS, ["none", "rerope(window=32)"], lengths=LENGTHS, factor=2
        )
    assert {row["dtype"] for row in results.rows} == {"float32, autocast to bfloat16"}
    exact = compare(build("llama"), character_tokenizer(), TEXTS, ["none"], lengths=LENGTHS, factor=2)
    assert results.rows[0]["perplexity"] != exact.rows[0]["perplexity"], "it was computed in bfloat16"


ASKED: dict[str, Any] = {"lengths": [384]}
VALUES: dict[str, dict[str, Any]] = {
    "lengths": {"lengths": [48, 200]},
    "trained_length": {"trained_length": 40},  # instead of 48
    "passkey": {**ASKED, "passkey": 1},
    "retrieval": {**ASKED, "retrieval": 1, "tasks": ["passkey"]},
    "tasks": {**ASKED, "retrieval": 1, "tasks": ["passkey"]},
    "depths": {**ASKED, "retrieval": 1, "tasks": ["passkey"], "depths": [0.5]},
    "chat": {**ASKED, "passkey": 1, "chat": True},
    "longppl": {"longppl": "none", "alpha": 0.01, "beta": -9.0, "short_length": 16},
    "alpha": {"longppl": "none", "alpha": 0.02, "beta": -9.0, "short_length": 16},
    "beta": {"longppl": "none", "alpha": 0.01, "beta": -4.0, "short_length": 16},
    "short_length": {"longppl": "none", "alpha": 0.01, "beta": -9.0, "short_length": 20},
    "protocol": {"protocol": "rolling"},
    "stride": {"protocol": "sliding", "stride": 9},
    "tail": {"protocol": "tail", "tail": 7},
    "start": {"start": 3},
    "bos": {"bos": "never"},
    "prefill_chunk": {"prefill_chunk": 33},
    "seed": {"seed": 5},
}
"""A value of each setting that is not its default, with what it needs besides."""


def test_every_setting_has_a_value_or_is_refused() -> None:
    of_compare = {entry.name for entry in fields(EvaluationConfig) if entry.metadata["flag"].get("of") == "compare"}
    on_cuda = {"offload_cache"}
    assert {entry.name for entry in fields(EvaluationConfig)} == {*VALUES, *of_compare, *on_cuda}


def measured(function: Any, *methods: list[str], **settings: Any) -> Results:
    tokenizer = character_tokenizer(bos=True)
    tokenizer.chat_template = TEMPLATE
    settings = {"lengths": [64, 200], "trained_length": 48, **settings}
    results: Results = function(tiny_llama(), tokenizer, random_texts(3, 400), *methods, **settings)
    results.rows = [Row({**row, "change": None, "change_ci95": None}) for row in results.rows]  # of `none` alone
    return results


@pytest.mark.parametrize("name", VALUES)
def test_a_setting_does_what_it_does_in_a_comparison(name: str) -> None:
    settings, of_model = VALUES[name], {"control": tiny_llama(), "label": "none"}
    alone, compared = measured(evaluate_perplexity, **of_model, **settings), measured(compare, ["none"], **settings)
    assert alone.rows == compared.rows and alone.retrieval == compared.retrieval
    assert alone.per_document == compared.per_document and alone.provenance[name] == compared.provenance[name]
    # The results are others than without the setting, unless it is what the rest of the settings needs.
    others = {key: value for key, value in settings.items() if key != name}
    if name in ("retrieval", "longppl", "stride", "tail", "tasks"):
        others = {}
    plain = measured(evaluate_perplexity, **of_model, **others)
    assert plain.provenance[name] != alone.provenance[name]
    # An untrained model finds no passkey either way, and few documents have the same interval whatever is drawn.
    if name not in ("chat", "seed"):
        assert (plain.rows, plain.retrieval) != (alone.rows, alone.retrieval)
