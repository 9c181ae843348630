"""Before and after on the same tokens, against the control."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from hf_posext import LongRoPE, Method, ReRoPE, YaRN, patch_model
from hf_posext.errors import (
    AlreadyPatchedError,
    EvaluationError,
    InvalidParameterError,
    JournalError,
    MethodNotApplicableError,
    NonFiniteError,
    PosExtError,
    UnknownMethodError,
)
from hf_posext.evaluation import Document, Results, compare, evaluate_perplexity
from hf_posext.evaluation import compare as compare_function
from hf_posext.evaluation.results import ROW_KEYS
from hf_posext.evaluation.rows import STRETCHES, gain_by_position, position_sums
from hf_posext.evaluation.windows import Measurement, Prefix, control_stride
from hf_posext.patching import find_patch
from hf_posext.reporting import notes

from ..conftest import TRAINED, logits, tiny_gpt2, tiny_llama, tokens
from ..zoo import build
from .helpers import BOS, DOCUMENT_KEYS, PASSKEY_KEYS, character_tokenizer, naive_nll, naive_windowed_nll, random_texts

TEXTS = random_texts(3, 140)
LENGTHS = [48, 128]


def run(model: Any, methods: Any = ("none", "linear"), bos: bool = False, **options: Any) -> Results:
    return compare(
        model, character_tokenizer(bos), TEXTS, list(methods), **{"lengths": LENGTHS, "factor": 2.0, **options}
    )


def unpatchable(model: LlamaForCausalLM) -> Method:
    """A method that applies by its scheme; that the model cannot take it shows when it is patched."""
    pairs = (1.0,) * (model.config.head_dim // 2)
    return LongRoPE(factor=2, short_factor=pairs, long_factor=tuple(2 * pair for pair in pairs)) + ReRoPE()


def texts_as_tokens(bos: bool) -> list[torch.Tensor]:
    tokenizer = character_tokenizer(bos)
    return [torch.tensor(tokenizer(text)["input_ids"][: max(LENGTHS)]) for text in TEXTS]


def pooled(pieces: list[np.ndarray]) -> float:
    return math.exp(sum(piece.sum() for piece in pieces) / sum(len(piece) for piece in pieces))


@pytest.mark.parametrize("bos", [False, True])
def test_control_equals_a_forward_per_token(llama: LlamaForCausalLM, bos: bool) -> None:
    results = run(llama, bos=bos)
    rows = texts_as_tokens(bos)
    assert (int(rows[0][0]) == BOS) is bos
    nll = [naive_windowed_nll(llama, row, TRAINED, TRAINED // 8, bos) for row in rows]
    for length in LENGTHS:
        row = results.row("linear", length)
        cut = [piece[: length - 1] for piece in nll]
        assert row["perplexity_truncated"] == pytest.approx(pooled(cut), rel=1e-6)
        tail = pooled([piece[length // 2 - 1 :] for piece in cut])
        assert row["perplexity_truncated_tail"] == pytest.approx(tail, rel=1e-6)


def test_gain_and_change(llama: LlamaForCausalLM) -> None:
    results = run(llama)
    before = [naive_nll(llama, row) for row in texts_as_tokens(bos=False)]
    with patch_model(llama, "linear", factor=2):
        after = [naive_nll(llama, row) for row in texts_as_tokens(bos=False)]
    for length in LENGTHS:
        row, none = results.row("linear", length), results.row("none", length)
        assert row["perplexity"] == pytest.approx(pooled([nll[: length - 1] for nll in after]), rel=1e-6)
        change = row["perplexity"] / pooled([nll[: length - 1] for nll in before]) - 1
        assert row["change"] == pytest.approx(change, abs=1e-6)
        assert row["change_ci95"][0] <= row["change"] <= row["change_ci95"][1]
        assert row["gain"] == pytest.approx(row["perplexity_truncated_tail"] / row["perplexity_tail"], rel=1e-9)
        assert row["gain_ci95"][0] <= row["gain"] <= row["gain_ci95"][1]
        assert none["change"] == 0.0 and none["factor"] == 1.0
    inside = results.row("none", 48)
    assert inside["gain"] == pytest.approx(1, rel=1e-6), "inside the trained length nothing is truncated"


def test_rows_have_what_the_schema_says(llama: LlamaForCausalLM) -> None:
    results = run(llama)
    assert [list(row) for row in results.rows] == [list(ROW_KEYS)] * 4
    assert [list(record) for record in results.per_document] == [list(DOCUMENT_KEYS)] * (3 * 2 * 3)
    assert {record["method"] for record in results.per_document} == {"truncated", "none", "linear"}
    provenance = results.provenance
    assert provenance["trained_length"] == TRAINED and provenance["protocol"] == "prefix"
    assert provenance["documents"] == [{"document": str(index), "tokens": 140} for index in range(3)]
    assert set(provenance["versions"]) == {"hf_posext", "transformers", "torch", "python"}
    assert Results.from_dict(results.to_dict()) == results


def test_pass_keys_are_the_same_prompts_for_every_method(llama: LlamaForCausalLM) -> None:
    inputs: list[torch.Tensor] = []
    generate = llama.generate
    llama.generate = lambda ids, **kwargs: inputs.append(ids) or generate(ids, **kwargs)  # type: ignore[method-assign]
    results = run(llama, lengths=[120, 128], passkey=3)
    assert [list(row) for row in results.rows] == [[*ROW_KEYS, *PASSKEY_KEYS]] * 4
    assert {row["passkey_trials"] for row in results.rows} == {3}
    assert len(inputs) == 4 and all(torch.equal(inputs[i], inputs[i + 2]) for i in (0, 1))


def test_equals_evaluate_perplexity(llama: LlamaForCausalLM) -> None:
    compared = run(llama, protocol="sliding", stride=16)
    with patch_model(llama, "linear", factor=2):
        alone = evaluate_perplexity(llama, character_tokenizer(), TEXTS, LENGTHS, protocol="sliding", stride=16)
    for length in LENGTHS:
        for key in ("nll_sum", "tokens", "perplexity", "perplexity_tail", "ci95"):
            assert compared.row("linear", length)[key] == alone.row("linear", length)[key]
    none = compared.row("none", 48)
    assert none["perplexity_truncated"] == pytest.approx(none["perplexity"], rel=1e-6), "such windows are not cut"


def test_none_comes_first_and_objects_keep_their_factor(llama: LlamaForCausalLM) -> None:
    results = run(llama, ["linear", YaRN(factor=4), "none"])
    assert [(row["method"], row["factor"]) for row in results.rows[::2]] == [
        ("none", 1.0),
        ("linear", 2.0),
        ("yarn", 4.0),
    ]
    assert all(row["change"] is not None for row in results.rows)


def test_inside_the_trained_length_the_control_is_the_unpatched_model(llama: LlamaForCausalLM) -> None:
    alone, beside = run(llama, ["linear"]), run(llama, ["none", "linear"])
    inside = alone.row("linear", 48)
    assert inside["change"] == pytest.approx(beside.row("linear", 48)["change"], abs=1e-6)
    assert inside["change_ci95"] == pytest.approx(beside.row("linear", 48)["change_ci95"], abs=1e-6)
    assert alone.row("linear", 128)["change"] is None
    assert alone.short_context() == [
        {key: inside[key] for key in ("method", "factor", "length", "change", "change_ci95")}
    ]
    options = {"protocol": "sliding", "stride": 16}
    alone, beside = run(llama, ["linear"], **options), run(llama, ["none", "linear"], **options)
    assert alone.short_context()[0]["change"] == pytest.approx(beside.short_context()[0]["change"], abs=1e-6)


def test_gain_by_position_equals_a_loop_over_tokens(llama: LlamaForCausalLM) -> None:
    results = run(llama, ["linear"])
    rows = texts_as_tokens(bos=False)
    control = np.array([naive_windowed_nll(llama, row, TRAINED, TRAINED // 8, bos=False) for row in rows])
    with patch_model(llama, "linear", factor=2):
        after = np.array([naive_nll(llama, row) for row in rows])
    longest = [record for record in results.per_document if record["length"] == 128]
    extended, cut = ([record for record in longest if record["method"] == name] for name in ("linear", "truncated"))
    gains = gain_by_position(extended, cut, seed=0)
    assert [(stretch.begin, stretch.end) for stretch in gains] == [(8 * i, 8 * i + 8) for i in range(16)]
    for stretch in gains:
        tokens = [t - 1 for t in range(stretch.begin, stretch.end) if t > 0]  # nll[0] is of token 1
        saved = (control - after)[:, tokens]
        assert stretch.gain == pytest.approx(math.exp(saved.mean()), rel=1e-6)
        assert stretch.gain_ci95 is not None and stretch.gain_ci95[0] <= stretch.gain <= stretch.gain_ci95[1]
    shorter = [record for record in results.per_document if record["length"] != 128]
    assert {record["position_nll_sums"] for record in shorter} == {None}, "the longest length covers the others"


def test_a_text_shorter_than_the_stretches_has_fewer_of_them() -> None:
    nll = np.array([1.0, 2.0, 4.0])  # four tokens, of which the first is not scored
    sums = position_sums(Measurement(4, nll))
    assert sums is not None and len(sums) == STRETCHES and sum(sums) == 7.0
    gains = gain_by_position(
        [{"first": 1, "tokens": 3, "position_nll_sums": sums}], [{"position_nll_sums": sums}], seed=0
    )
    assert [(stretch.end, stretch.gain, stretch.gain_ci95) for stretch in gains] == [
        (2, 1.0, None), (3, 1.0, None), (4, 1.0, None)
    ]  # fmt: skip


def test_methods_that_do_not_apply_are_left_out_with_the_reason(
    llama: LlamaForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    results = run(llama, ["table-linear", "yarn", unpatchable(llama), "linear(factor=1)"])
    assert [row["method"] for row in results.rows] == ["yarn"] * 2
    reasons = results.provenance["not_applicable"]
    assert reasons["table-linear"] == "table-linear extends learned positions; llama has rotary"
    reason = reasons["longrope+rerope"]
    assert reason.startswith("cannot be patched: Expected ") and "two factor lists of longrope+rerope" in reason
    assert reasons["linear"].startswith("cannot be patched: ") and "Pass a larger factor" in reasons["linear"]
    assert len([message for message in caplog.messages if message.startswith("left out: ")]) == 3
    assert getattr(llama, "_posext_patch", None) is None


def test_nothing_that_applies_is_an_error(llama: LlamaForCausalLM) -> None:
    llama.model.layers[0].register_forward_pre_hook(lambda *args: pytest.fail("nothing may be measured"))
    with pytest.raises(MethodNotApplicableError, match="got only none: table-linear: extends learned posi"):
        run(llama, ["none", "table-linear"])
    with pytest.raises(MethodNotApplicableError, match=r"got none: longrope\+rerope: cannot be patched"):
        run(llama, [unpatchable(llama)])


def test_control_follows_the_trained_length_that_is_given(llama: LlamaForCausalLM) -> None:
    results = run(llama, ["none", "linear"], trained_length=32)
    nll = [naive_windowed_nll(llama, row, 32, 4, bos=False) for row in texts_as_tokens(bos=False)]
    assert results.provenance["trained_length"] == 32
    assert results.row("none", 128)["perplexity_truncated"] == pytest.approx(pooled(nll), rel=1e-6)
    assert control_stride(32) == 4 and control_stride(3) == 1


def test_longrope_with_two_lists_gets_a_forward_per_length(llama: LlamaForCausalLM) -> None:
    pairs = llama.config.head_dim // 2
    method = LongRoPE(factor=2, short_factor=(1.0,) * pairs, long_factor=(2.0,) * pairs)
    results = run(llama, ["none", method])
    with patch_model(llama, method):
        for length in LENGTHS:
            expected = pooled([naive_nll(llama, row[:length]) for row in texts_as_tokens(bos=False)])
            assert results.row("longrope", length)["perplexity"] == pytest.approx(expected, rel=1e-6)


def test_interrupted_model_is_restored_and_finished_rows_kept(llama: LlamaForCausalLM) -> None:
    before, delivered = logits(llama, tokens(128)), []
    tokenizer = character_tokenizer()
    tokenizer.model_max_length = TRAINED
    llama.train()

    def interrupt(*args: Any) -> None:
        if len(delivered) == 2:  # in the third method, which is in force now
            assert llama._posext_patch.plan.method == "yarn"
            raise KeyboardInterrupt

    handle = llama.model.layers[-1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        compare(
            llama, tokenizer, TEXTS, ["none", "linear", "yarn"], lengths=LENGTHS, factor=2,
            on_method=lambda results: delivered.append(copy.deepcopy(results)),
        )  # fmt: skip
    handle.remove()
    assert [row["method"] for row in delivered[-1].rows] == ["none"] * 2 + ["linear"] * 2
    assert len(delivered) == 2
    assert all(module.training for module in llama.modules()) and "forward" not in vars(llama.model)
    assert getattr(llama, "_posext_patch", None) is None
    assert tokenizer.model_max_length == TRAINED and llama.config.max_position_embeddings == TRAINED
    assert torch.equal(logits(llama.eval(), tokens(128)), before)


def test_mistakes_show_before_anything_is_measured(llama: LlamaForCausalLM) -> None:
    llama.model.layers[0].register_forward_pre_hook(lambda *args: pytest.fail("nothing may be measured"))
    mistakes: list[tuple[type[PosExtError], str, dict[str, Any]]] = [
        (UnknownMethodError, "yarm", {"methods": ["none", "yarm"]}),
        (InvalidParameterError, "got factor=-1.0", {"methods": ["linear"], "factor": -1.0}),
        (
            InvalidParameterError,
            "got 'linear' at factor 2 more than once",
            {"methods": ["linear"] * 2},
        ),
        (  # of two rows of one name, tables would show the last
            InvalidParameterError,
            "got 'linear' at factor 2 more than once",
            {"methods": ["linear(factor=2)", "linear(factor=2.0000001)"]},
        ),
        (InvalidParameterError, "Pass a list", {"methods": []}),
        (InvalidParameterError, "for a prompt of the task 'passkey'", {"lengths": [32, 128], "passkey": 2}),
        (InvalidParameterError, "Expected passkey to be a whole number from 0 to 10,000, got -1", {"passkey": -1}),
        (InvalidParameterError, "protocol to be one of .* got 'rollin'", {"protocol": "rollin"}),
        (InvalidParameterError, "tail to be left out for protocol 'prefix', got 8", {"tail": 8}),
    ]
    for error, message, options in mistakes:
        with pytest.raises(error, match=message):
            run(llama, **options)
    with pytest.raises(InvalidParameterError, match="Expected methods to be a list of names or a Method, got 'none'"):
        compare_function(llama, character_tokenizer(), TEXTS, "none", lengths=LENGTHS)
    assert getattr(llama, "_posext_patch", None) is None


def test_a_patched_model_is_refused(llama: LlamaForCausalLM) -> None:
    with patch_model(llama, "linear", factor=2), pytest.raises(AlreadyPatchedError, match="got one under 'linear: "):
        run(llama)


def test_other_schemes_are_measured_unpatched() -> None:
    assert run(tiny_gpt2(), ["none"], lengths=[32, 64]).rows[-1]["perplexity"] > 1
    assert run(build("bloom"), ["none"], trained_length=64).rows[-1]["gain"] > 0


def test_peft_model_is_compared_as_it_is() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    results = run(model)
    expected = pooled([naive_nll(model, row) for row in texts_as_tokens(bos=False)])
    assert results.row("none", 128)["perplexity"] == pytest.approx(expected, rel=1e-6)


def break_reading(monkeypatch: pytest.MonkeyPatch, *broken: tuple[str, int]) -> None:
    """Makes documents fail, by their index, while a method is in force; `truncated` is the control."""
    measure = Prefix.measure

    def read(self: Prefix, scorer: Any, documents: Any, index: int, lengths: Any, context: int | None = None) -> Any:
        patch = find_patch(scorer.model)
        if ("truncated" if patch is None else patch.plan.method, index) in broken:
            raise NonFiniteError(f"document {index} is broken")
        return measure(self, scorer, documents, index, lengths, context)

    monkeypatch.setattr(Prefix, "measure", read)


def test_a_document_that_fails_is_left_out_of_every_row(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = compare(
        llama, character_tokenizer(), [Document("0", TEXTS[0]), Document("2", TEXTS[2])], ["none", "linear"],
        lengths=LENGTHS, factor=2,
    )  # fmt: skip
    break_reading(monkeypatch, ("linear", 1))
    counts: list[int] = []
    results = run(llama, on_method=lambda so_far: counts.append(so_far.rows[0]["documents"]))
    assert counts == [3, 2], "`none` could measure all three"
    assert results.rows == expected.rows and results.per_document == expected.per_document
    assert results.provenance["left_out"] == [
        {"document": "1", "tokens": 140, "reason": "linear x2: document 1 is broken"}
    ]
    assert [entry["document"] for entry in results.provenance["documents"]] == ["0", "2"]
    assert Results.from_dict(results.to_dict()) == results


def test_a_method_that_fails_on_every_document_is_left_out(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_reading(monkeypatch, ("none", 0), ("none", 1), ("none", 2), ("yarn", 2))
    results = run(llama, ["none", "linear", "yarn"])
    assert [(row["method"], row["documents"]) for row in results.rows] == [("linear", 2)] * 2 + [("yarn", 2)] * 2
    assert results.provenance["not_applicable"] == {"none": "failed on every document: document 0 is broken"}
    assert [entry["document"] for entry in results.provenance["left_out"]] == ["2"]
    assert results.row("linear", 48)["change"] is not None, "inside the trained length from the control"
    assert results.row("linear", 128)["change"] is None


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ([("truncated", i) for i in range(3)], "got failures of all: truncated: document 0 is broken. Pass smaller"),
        (
            [(name, i) for name in ("none", "linear") for i in range(3)],
            "got failures of all: none: document 0 is broken; linear x2: document 0 is broken. Pass smaller",
        ),
        (
            [("truncated", 0), ("none", 1), ("linear", 2)],
            r"that all methods can measure, got none: 0 \(truncated: .*; 1 \(none: .*; 2 \(linear x2: .*. Pass",
        ),
    ],
    ids=["control", "methods", "documents"],
)
def test_where_nothing_is_left_is_an_error(
    broken: list[tuple[str, int]], message: str, llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_reading(monkeypatch, *broken)
    with pytest.raises(EvaluationError, match=message):
        run(llama)


def test_pass_keys_that_fail_leave_their_cell_empty(llama: LlamaForCausalLM) -> None:
    generate = llama.generate

    def fail_or_generate(ids: torch.Tensor, **options: Any) -> Any:
        if ids.shape[1] < 118 and find_patch(llama).plan.method == "linear":  # type: ignore[union-attr]
            raise torch.OutOfMemoryError("out of memory")
        return generate(ids, **options)

    llama.generate = fail_or_generate  # type: ignore[method-assign]
    results = run(llama, lengths=[120, 128], passkey=2)
    assert results.row("linear", 120)["passkey"] is None and results.row("linear", 128)["passkey"] is not None
    assert results.provenance["left_out"] == [{"passkey": "linear x2 at 120", "reason": "out of memory"}]
    assert {row["documents"] for row in results.rows} == {3}
    assert Results.from_dict(results.to_dict()) == results
    assert "Left out: passkey linear x2 at 120 (out of memory)." in notes(results)


def test_a_journal_is_continued_by_the_same_run_only(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    undisturbed = run(llama, journal=journal, passkey=0)
    changes: list[tuple[str, dict[str, Any]]] = [
        ("lengths.1 is 128 there and 64 here", {"lengths": [48, 64]}),
        ("plans is .* there", {"methods": ("none", "linear", "yarn")}),
        ("plans.1.factor is 2.0 there and 4.0 here", {"factor": 4.0}),
        ("protocol is prefix there and tail here", {"protocol": "tail", "tail": 8}),
        ("start is 0 there and 5 here", {"start": 5}),
        ("seed is 0 there and 1 here", {"seed": 1}),
        ("tokens is .* there", {"bos": True}),
        ("trained_length is 64 there and 32 here", {"trained_length": 32}),
        ("passkey is 0 there and 1 here", {"passkey": 1, "lengths": [120, 128]}),
    ]
    for message, change in changes:
        with pytest.raises(JournalError, match=message):
            run(llama, journal=journal, **change)
    moved = copy.deepcopy(llama)
    with torch.no_grad():
        moved.model.layers[1].mlp.up_proj.weight.mul_(1.0001)
    with pytest.raises(JournalError, match=r"models\.0\.weights is .* there and .* here"):
        run(moved, journal=journal)
    moved = copy.deepcopy(llama)
    moved.config.attention_dropout = 0.5  # as in a config.json that was edited
    with pytest.raises(JournalError, match=r"models\.0\.config\.attention_dropout is 0.0 there and 0.5 here"):
        run(moved, journal=journal)
    with pytest.raises(JournalError, match=r"models\.0\.dtype is float32 there and bfloat16 here"):
        run(copy.deepcopy(llama).bfloat16(), journal=journal)
    llama.register_forward_pre_hook(lambda *_: pytest.fail("everything is in the journal"))
    assert run(llama, journal=journal).rows == undisturbed.rows
    assert run(llama, journal=journal, prefill_chunk=32).rows == undisturbed.rows, "a run may go on with less memory"
