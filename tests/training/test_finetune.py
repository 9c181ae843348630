"""`finetune`: what it trains, measures, writes and refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, TrainerCallback

from hf_posext import detect_scheme, evaluate_perplexity, load_patched, patch_model
from hf_posext.adapters import load_adapter
from hf_posext.errors import (
    AlreadyPatchedError,
    DocumentError,
    InvalidParameterError,
    TrainingError,
    UnsupportedModelError,
)
from hf_posext.evaluation import passkey_accuracy
from hf_posext.plan import ExtensionPlan
from hf_posext.training import Evaluation, finetune

from ..adapters.helpers import structure
from ..conftest import logits, longer_gpt2, tiny_bloom, tiny_llama, tiny_t5, tokens
from ..evaluation.helpers import character_tokenizer, random_texts
from .helpers import QUICK, assert_same_bits, preset, train, weights


@pytest.mark.parametrize("name", ["lora", "lora-plus", "dora"])
def test_an_adapter_is_saved_with_its_plan_and_opens_with_equal_logits(name: str, tmp_path: Path) -> None:
    result = train(tmp_path / "out", preset=preset(name))
    ids = tokens(128)
    trained = logits(result.model, ids)
    assert result.path == tmp_path / "out" / "adapter" and not result.model.training
    assert ExtensionPlan.load(result.path) == result.patch.plan
    with result.model.disable_adapter():
        assert not torch.equal(logits(result.model, ids), trained)
    again = load_adapter(result.path, tiny_llama()).eval()
    assert torch.equal(logits(again, ids), trained)


@pytest.mark.parametrize(
    ("build", "method", "changed"),
    [
        (longer_gpt2, "table-linear", {"trained_length": 64, "length": 96}),
        (tiny_bloom, "alibi-linear", {"trained_length": 64}),
        (tiny_llama, "rerope(window=16)", {"gradient_checkpointing": True}),
        (tiny_llama, "yarn+log-n", {}),
    ],
)
def test_every_kind_of_scheme_is_trained_and_opened_again(
    build: Any, method: str, changed: dict[str, Any], tmp_path: Path
) -> None:
    result = train(tmp_path / "out", build(), method, preset=preset("lora-plus"), **changed)
    trained = logits(result.model, tokens(96))
    again = load_adapter(result.path, build()).eval()
    assert torch.equal(logits(again, tokens(96)), trained)


def test_all_weights_are_trained_and_open_in_plain_transformers(tmp_path: Path) -> None:
    result = train(tmp_path / "out", preset=preset("full"))
    before = weights(tiny_llama())
    assert all(not torch.equal(weight, before[name]) for name, weight in weights(result.model).items())
    assert result.path == tmp_path / "out" / "model"
    # read weights are mapped at other addresses, where products of matrices may round otherwise
    plain = LlamaForCausalLM.from_pretrained(result.path).eval()
    torch.testing.assert_close(logits(plain, tokens(128)), logits(result.model, tokens(128)), rtol=1e-5, atol=1e-5)
    assert_same_bits(load_patched(result.path), result.model)


@pytest.mark.parametrize("name", ["lora", "full"])
def test_after_training_in_bfloat16_the_model_computes_in_float32_again(name: str, tmp_path: Path) -> None:
    result = train(tmp_path / "out", preset=preset(name), bf16=True)
    again = load_patched(result.path) if name == "full" else load_adapter(result.path, tiny_llama())
    # read weights are mapped at other addresses, where products of matrices may round otherwise; bfloat16 is 4e-3 off
    torch.testing.assert_close(
        logits(result.model, tokens(128)), logits(again.eval(), tokens(128)), rtol=1e-5, atol=1e-5
    )


def test_nope_drops_the_positions_and_trains_at_the_trained_length(tmp_path: Path) -> None:
    result = train(tmp_path / "out", tiny_llama(), None, preset=preset("nope"), factor=None)
    assert result.patch.plan.method == "nope" and result.provenance["run"]["data"]["length"] == 64
    forth, back = tokens(32), tokens(32).clone()
    back[0, :-1] = forth[0, :-1].flip(0)
    one_layer = train(tmp_path / "one", tiny_llama(num_hidden_layers=1), None, preset=preset("nope"), factor=None)
    # without positions one layer sees a bag of tokens; float32, summed in another order
    last = [logits(one_layer.model, ids)[0, -1] for ids in (forth, back)]
    torch.testing.assert_close(*last, rtol=1e-4, atol=1e-5)
    with pytest.raises(InvalidParameterError, match="The preset is for method 'nope'. Leave out method"):
        train(tmp_path / "other", method="yarn", preset=preset("nope"))


def test_the_steps_are_those_that_a_plain_loop_makes(tmp_path: Path) -> None:
    """Losses and weights of three steps of AdamW on the rows of the schedule, against a loop without the Trainer."""
    tokenizer, texts = character_tokenizer(), random_texts(1, 5 * 128)
    result = train(tmp_path / "out", preset=preset("full"), texts=texts, steps=3)
    model = tiny_llama()
    patch_model(model, "yarn", factor=2)
    rows = torch.tensor(tokenizer(texts[0])["input_ids"]).view(5, 128)
    order = np.random.default_rng([0, 0]).permutation(5)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(3):
        ids = rows[order[step]][None]
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 3)
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert result.log[step]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, weight in weights(model).items():
        # float32; the Trainer's loss is divided by a count that it makes itself
        torch.testing.assert_close(weights(result.model)[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_perplexity_and_pass_keys_are_logged_at_each_evaluation(tmp_path: Path) -> None:
    unseen_texts = random_texts(2, 200)
    evaluation = Evaluation(unseen_texts, [112, 128], every=2, start=3, passkey=2)
    result = train(tmp_path / "out", evaluation=evaluation, steps=4)
    entries = [entry for entry in result.log if "eval_perplexity_128" in entry]
    assert [entry["step"] for entry in entries] == [0, 2, 4]
    assert sum("loss" in entry for entry in result.log) == 4 and len(result.log) == 7
    base, tokenizer = tiny_llama(), character_tokenizer()
    patch_model(base, "yarn", factor=2)
    for model, entry in ((base, entries[0]), (result.model, entries[-1])):
        rows = evaluate_perplexity(model, tokenizer, unseen_texts, [112, 128], start=3).rows
        keys = passkey_accuracy(model, tokenizer, [112, 128], 2)
        for row in rows:
            length = row["length"]
            assert entry[f"eval_perplexity_{length}"] == pytest.approx(row["perplexity"], rel=1e-6)
            assert entry[f"eval_passkey_{length}"] == keys[length]
    assert json.loads((tmp_path / "out" / "training_log.json").read_text()) == result.log


class Spoils(TrainerCallback):
    """Multiplies all that is trained after a step, so that what is measured then is worse."""

    def __init__(self, step: int, times: float) -> None:
        self.step, self.times = step, times

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.requires_grad:
                        weight.mul_(self.times)


@pytest.mark.parametrize("name", ["lora", "lora-plus"])
def test_early_stop_goes_back_to_the_best_weights(name: str, tmp_path: Path) -> None:
    evaluation = Evaluation(random_texts(2, 200), [128], every=1)
    spoils = Spoils(3, -1000)
    result = train(
        tmp_path / "out",
        evaluation=evaluation,
        preset=preset(name),
        steps=20,
        patience=2,
        callbacks=[spoils],
        warmup=5,
    )
    perplexities = {
        entry["step"]: entry["eval_perplexity_128"] for entry in result.log if "eval_perplexity_128" in entry
    }
    best = min((step for step in perplexities if step), key=lambda step: perplexities[step])
    assert best < 3 < max(perplexities) == best + 2 == result.provenance["result"]["steps"]
    rows = evaluate_perplexity(result.model, character_tokenizer(), evaluation.documents, [128]).rows
    assert rows[0]["perplexity"] == pytest.approx(perplexities[best], rel=1e-6)


def test_a_loss_that_is_not_finite_ends_the_run_and_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    model = tiny_llama()
    before, scheme = logits(model, tokens(64)), detect_scheme(model)
    with pytest.raises(TrainingError) as caught:
        train(tmp_path / "out", model, steps=8, save_every=2, callbacks=[Spoils(5, math.nan)])
    checkpoint = tmp_path / "out" / "checkpoints" / "checkpoint-4"
    assert str(caught.value).startswith(
        "Expected a finite loss, got loss nan and grad_norm nan at step 6 of 8. The last good checkpoint is "
    )
    assert str(checkpoint) in str(caught.value) and "lower learning rate" in str(caught.value)
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert not (tmp_path / "out" / "adapter").exists()
    assert torch.equal(logits(model, tokens(64)), before) and detect_scheme(model) == scheme, "the base is as it was"
    resumed = train(tmp_path / "out", steps=8, save_every=2, resume=True)
    assert resumed.provenance["result"]["resumed_from"] == "checkpoint-4"


@pytest.mark.parametrize(
    "changed",
    [
        {"pose": 2},
        {"shifted": 4},
        {"longce": 16},
        {"pack": True},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"preset": preset("lora", ratio=4.0)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_each_option_changes_what_is_learned(changed: dict[str, Any], tmp_path: Path) -> None:
    """All but checkpointing, which computes the same again."""
    plain = weights(train(tmp_path / "plain").model)
    altered = weights(train(tmp_path / "other", **changed).model)
    equal = all(torch.equal(weight, altered[name]) for name, weight in plain.items())
    assert equal == ("gradient_checkpointing" in changed)


def test_the_second_matrices_may_learn_faster(tmp_path: Path) -> None:
    """The first step of Adam moves each weight by its learning rate; A has no gradient while B is 0."""
    result = train(tmp_path / "out", preset=preset("lora", ratio=4.0), steps=1)
    moved = [weight.abs().max() for name, weight in weights(result.model).items() if ".lora_B." in name]
    # epsilon of Adam makes it a little less
    assert all(float(step) == pytest.approx(4e-2, rel=1e-2) for step in moved)


def test_provenance_says_what_is_needed_to_train_again(tmp_path: Path) -> None:
    result = train(tmp_path / "out", pose=2, seed=5)
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert provenance == result.provenance
    run = provenance["run"]
    assert run["base"] == "LlamaForCausalLM" and run["method"] == "yarn" and run["settings"]["seed"] == 5
    assert run["data"]["documents"] == {"0": 300, "1": 300, "2": 300} and run["data"]["rows"] == 12
    assert set(provenance["versions"]) >= {"hf_posext", "transformers", "peft", "torch", "python"}
    trained = sum(w.numel() for w in result.model.parameters() if w.requires_grad)
    size = sum(weight.numel() for weight in tiny_llama().parameters())
    assert provenance["result"]["parameters"] == {"trained": trained, "model": size}
    assert provenance["result"]["steps"] == 2 and provenance["result"]["seconds"] > 0
    assert not list(tmp_path.glob("out/*.partial")) and not list(tmp_path.glob("out/.*"))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"preset": "lorra"}, InvalidParameterError, "got 'lorra'. Did you mean 'lora'"),
        ({"method": None}, InvalidParameterError, "Expected a method, got None. Pass a name such as 'yarn'"),
        ({"steps": 0}, InvalidParameterError, "steps to be 1 or more, got 0"),
        ({"warmup": 2}, InvalidParameterError, "warmup to be less than the 2 steps, got 2"),
        ({"length": 256}, InvalidParameterError, "length to be 2 to 128 tokens, the target of yarn, got 256"),
        ({"pose": 1}, InvalidParameterError, "pose to be 2 chunks in a row or more, .* got 1"),
        (
            {"pose": 2, "length": 128},
            InvalidParameterError,
            "target of 128 tokens for pose, got 128. Pass 64",
        ),
        ({"pose": 2, "pack": True}, InvalidParameterError, "pose and pack both decide"),
        ({"shifted": 3}, InvalidParameterError, "shifted to be 2 or more groups, .* the length of 128, got 3"),
        ({"shifted": 4, "pack": True}, InvalidParameterError, "shifted attention takes rows of one document"),
        (
            {"longce": 64},
            InvalidParameterError,
            "longce to be less than half of the length of 128 tokens, got 64. Pass 16",
        ),
        ({"patience": 2}, InvalidParameterError, "`patience` requires `evaluation`"),
        (
            {"texts": ["short", "texts"]},
            DocumentError,
            "2 documents do not fill a row of 128 tokens: the longest has 5",
        ),
        ({"model": tiny_t5()}, UnsupportedModelError, "causal language model, got T5ForConditionalGeneration"),
        ({"model": tiny_llama().to(torch.bfloat16)}, InvalidParameterError, "LlamaForCausalLM is bfloat16. Pass bf16"),
        ({"model": tiny_llama(vocab_size=40)}, InvalidParameterError, "tokens below 40, .* Load both from the same"),
        (
            {"model": tiny_bloom(), "method": "alibi-linear", "trained_length": 64, "pose": 2},
            UnsupportedModelError,
            "BloomForCausalLM takes no position_ids",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_trained_is_refused_and_the_model_is_as_it_was(
    changed: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    model = changed.get("model") or tiny_llama()
    state = structure(model)
    with pytest.raises(error, match=message):
        train(tmp_path / "out", **{"model": model, **changed})
    assert not (tmp_path / "out").exists()
    assert structure(model) == state


class Interrupts(TrainerCallback):
    """Ctrl-C before the optimizer of the first step, which is when gradients are there."""

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["lora", "lora-plus", "full"])
def test_an_interrupted_run_leaves_the_model_as_it_was(name: str, tmp_path: Path) -> None:
    model = tiny_llama().to(torch.bfloat16)
    model.lm_head.weight.requires_grad_(False)
    state, values = structure(model), weights(model)
    options: dict[str, Any] = {"bf16": True, "gradient_checkpointing": True, "preset": preset(name)}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "out", model, "rerope", **options, callbacks=[Interrupts()])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidParameterError, match="holds files already"):
        train(tmp_path, model, **options)
    assert structure(model) == state
    assert all(torch.equal(value, values[path]) for path, value in model.state_dict().items())


def test_a_model_that_is_patched_or_adapted_already_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    with patch_model(model, "linear", factor=2), pytest.raises(AlreadyPatchedError):
        train(tmp_path / "out", model)
    result = train(tmp_path / "out", model)
    with pytest.raises(UnsupportedModelError, match="without an adapter, got .*Pass the PreTrainedModel itself"):
        finetune(result.model, character_tokenizer(), ["text"], "yarn", output=tmp_path / "again", **QUICK)


def test_quantized_weights_are_not_trained(tmp_path: Path) -> None:
    model = tiny_llama()
    model.is_quantized = True
    with pytest.raises(UnsupportedModelError, match="the quantized ones of .*. Use an adapter"):
        train(tmp_path / "out", model, preset=preset("full"))


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidParameterError, match="holds files already. Pass another, or resume=True"):
        train(tmp_path)
    with pytest.raises(InvalidParameterError, match="got files without provenance.json"):
        train(tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_run_that_ends_before_its_first_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    too_short = Evaluation(random_texts(1, 50), [128], every=1)
    with pytest.raises(DocumentError, match="Expected documents of start"):
        train(tmp_path / "out", evaluation=too_short)
    assert not (tmp_path / "out").exists()


def test_a_plan_or_a_method_object_may_be_given(tmp_path: Path) -> None:
    first = train(tmp_path / "name")
    plan = ExtensionPlan.load(first.path)
    second = train(tmp_path / "plan", tiny_llama(), plan, factor=None)
    assert_same_bits(first.model, second.model)
