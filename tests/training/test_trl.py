"""TRL's SFTTrainer on a patched model: packing, padding-free batches, and loss on the assistant alone."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_posext import load_adapter, patch_model
from tests.conftest import EXAMPLES, logits, realigned
from tests.training.test_own_trainer import check_script

pytestmark = [
    pytest.mark.trl,
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),  # TRL asks for it
]

MODEL = EXAMPLES / "tiny" / "tiny-rope"
TEXTS = [f"Chapter {number}. It was a dark night, and the clock struck {number}. " * number for number in range(1, 9)]
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
    "{% endgeneration %}{% else %}{{ message.content }} {% endif %}{% endfor %}"
)


SCRIPT = """
import sys
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from hf_posext import find_patch, load_adapter, patch_model
base, method, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
patch_model(model, method, factor=2, tokenizer=tokenizer)
texts = [f"Chapter {n}. It was a dark night, and the clock struck {n}. " * 30 * n for n in (1, 2)]
options = {"max_steps": 2, "learning_rate": 1e-2, "max_length": 600, "bf16": False}
arguments = SFTConfig(out + "/run", **options, use_cpu=True, report_to="none")
adapter = LoraConfig(task_type="CAUSAL_LM")
rows = Dataset.from_dict({"text": texts})
trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=adapter)
trainer.train()
trainer.save_model(out + "/final")
reopened = load_adapter(out + "/final", dtype="float32")
merged = reopened.merge_and_unload()
tokens = merged.generate(**tokenizer(texts[0], return_tensors="pt"), max_new_tokens=8, do_sample=False)
find_patch(merged).save_pretrained(out + "/merged")
model = trainer.model
"""


@pytest.mark.parametrize("method", ["yarn", "rerope"])
def test_a_script_of_twenty_lines(method: str, tmp_path: Path) -> None:
    check_script(SCRIPT, method, tmp_path)


def run(method: str, path: Path, rows: Dataset, **options: Any) -> Any:
    """An adapter, trained for two steps and saved by the trainer."""
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template, tokenizer.pad_token = TEMPLATE, tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    patch_model(model, method, factor=2, tokenizer=tokenizer)
    arguments = SFTConfig(
        str(path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, report_to="none", use_cpu=True,
        bf16=False, max_length=1024, disable_tqdm=True, logging_steps=1, gradient_checkpointing=False, **options,
    )  # fmt: skip
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=adapter)
    trainer.train()
    trainer.save_model(str(path / "final"))
    return trainer


@pytest.mark.parametrize("method", ["yarn", "rerope"])
@pytest.mark.parametrize("options", [{"packing": True}, {"packing": True, "packing_strategy": "wrapped"}, {}], ids=str)
def test_texts(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    trainer = run(method, tmp_path, Dataset.from_dict({"text": TEXTS}), **options)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
    ids = torch.arange(5, 905)[None]
    opened = load_adapter(tmp_path / "final")
    assert torch.equal(logits(realigned(opened), ids), logits(realigned(trainer.model.eval()), ids))


@pytest.mark.parametrize("method", ["yarn", "rerope"])
def test_loss_on_the_assistant_alone(method: str, tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": "Tell me."}, {"role": "assistant", "content": text}] for text in TEXTS]
    trainer = run(method, tmp_path, Dataset.from_dict({"messages": turns}), assistant_only_loss=True)
    batch = next(iter(trainer.get_train_dataloader()))
    assert 0 < int((batch["labels"] != -100).sum()) < int(batch["attention_mask"].sum())
    assert all(0 < entry["loss"] < 10 for entry in trainer.state.log_history if "loss" in entry)


def test_the_example_trains_saves_and_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "trl_packing.py"))
    assert "It was" in capsys.readouterr().out
    assert "hf_posext plan (yarn: 512 -> 1024" in (tmp_path / "reports/sft/final/adapter_config.json").read_text()
