"""`finetune` with arguments and an adapter of the user's own, and with nothing but the defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config
from transformers import TrainingArguments

from hf_posext import ExtensionPlan, YaRN, detect_scheme, load_adapter
from hf_posext.errors import InvalidParameterError
from hf_posext.training import finetune
from tests.conftest import TRAINED, logits, realigned, tiny_llama, tokens
from tests.evaluation.helpers import character_tokenizer, random_texts


def test_one_step_with_defaults(tmp_path: Path) -> None:
    result = finetune(
        tiny_llama(), character_tokenizer(), random_texts(3, 300), "yarn", factor=2, steps=1, output=tmp_path / "run"
    )
    assert result.provenance["run"]["settings"]["warmup"] == 0
    assert [entry["step"] for entry in result.log if "loss" in entry] == [1]


def test_the_plan_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, targets = YaRN.plan, []

    def counted(method: YaRN, *arguments: Any, **options: Any) -> ExtensionPlan:
        targets.append(options.get("factor"))
        return plan(method, *arguments, **options)

    monkeypatch.setattr(YaRN, "plan", counted)
    texts = random_texts(3, 300)
    finetune(tiny_llama(), character_tokenizer(), texts, "yarn", factor=2, steps=1, output=tmp_path / "run")
    assert targets == [2]


def test_own_arguments_and_adapter(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.05, "seed": 7, "use_cpu": True}
    arguments = TrainingArguments(
        str(tmp_path / "elsewhere"), **settings, lr_scheduler_type="constant", weight_decay=0.1, report_to="none"
    )
    adapter = IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    plan = YaRN().plan(detect_scheme(model), factor=2)
    result = finetune(
        model,
        character_tokenizer(),
        random_texts(3, 300),
        plan,
        arguments=arguments,
        adapter=adapter,
        output=tmp_path / "run",
    )
    rates = [entry["learning_rate"] for entry in result.log if "loss" in entry]
    assert rates == [0.05] * 3
    assert not (tmp_path / "elsewhere").exists() and arguments.output_dir == str(tmp_path / "elsewhere")
    assert (
        result.provenance["run"]["settings"]["batch_size"] == 2 and result.provenance["run"]["settings"]["seed"] == 7
    )
    assert "IA3" in result.provenance["run"]["adapter"]["peft_type"]
    ids = tokens(2 * TRAINED)
    opened = load_adapter(tmp_path / "run" / "adapter")
    assert torch.equal(logits(realigned(opened), ids), logits(realigned(result.model), ids))
    checkpoint = load_adapter(tmp_path / "run" / "checkpoints" / "checkpoint-3")
    assert torch.equal(logits(realigned(checkpoint), ids), logits(realigned(result.model), ids))


def test_arguments_without_a_number_of_steps(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(InvalidParameterError, match="Expected `max_steps` in arguments, got -1"):
        finetune(
            tiny_llama(),
            character_tokenizer(),
            random_texts(3, 300),
            "yarn",
            factor=2,
            arguments=arguments,
            output=tmp_path / "run",
        )
