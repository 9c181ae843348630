"""A stranger's script, and what other people's training does to models: offload, padding, checkpoints, prefixes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_posext import load_adapter, load_patched, patch_model
from hf_posext.adapters import save_adapter
from hf_posext.errors import EvaluationError
from hf_posext.training.settings import tie_again

from ..adapters.helpers import train
from ..conftest import TRAINED, logits, realigned, tiny_llama, tokens
from ..helpers import TINY, padded

IDS = tokens(3 * TRAINED)

SCRIPT = """
import sys
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling
from transformers import Trainer, TrainingArguments
from hf_posext import find_patch, load_adapter, patch_model
base, method, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
patch_model(model, method, factor=2)
model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
texts = [f"Chapter {n}. It was a dark night, and the clock struck {n}. " * 30 * n for n in (1, 2)]
rows = Dataset.from_dict(tokenizer(texts, truncation=True, max_length=600))
arguments = TrainingArguments(out + "/run", max_steps=2, learning_rate=1e-2, report_to="none", use_cpu=True)
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
trainer.train()
trainer.save_model(out + "/final")
reopened = load_adapter(out + "/final", dtype="float32")
merged = reopened.merge_and_unload()
tokens = merged.generate(**tokenizer(texts[0], return_tensors="pt"), max_new_tokens=8, do_sample=False)
find_patch(merged).save_pretrained(out + "/merged")
"""

COMPARED = """
import torch
from safetensors.torch import save_file
ids = tokenizer(texts[1], return_tensors="pt")["input_ids"][:, :1000]
again = load_adapter(out + "/final", dtype="float32")
model.eval()
with torch.no_grad():
    plain = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    trained, opened, plain = (one(ids).logits for one in (model, again, plain))
generated = model.generate(**tokenizer(texts[0], return_tensors="pt"), max_new_tokens=8, do_sample=False)
save_file({"ids": ids, "trained": trained, "opened": opened, "plain": plain, "merged": tokens, "generated": generated},
          out + "/compared.safetensors")
"""


def check_script(script: str, method: str, tmp_path: Path) -> None:
    """Run a stranger's script outside of the repository, and compare what it trained, opened, merged and saved."""
    words = [sys.executable, "-c", script + COMPARED, TINY, method, tmp_path]
    process = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    tensors = load_file(tmp_path / "compared.safetensors")
    assert torch.equal(tensors["opened"], tensors["trained"])
    assert (tensors["trained"] - tensors["plain"]).abs().max() > 0.1
    assert torch.equal(tensors["merged"], tensors["generated"])
    merged = logits(load_patched(tmp_path / "merged"), tensors["ids"])
    torch.testing.assert_close(merged, tensors["trained"], atol=1e-3, rtol=1e-3)  # one matrix in place of three


@pytest.mark.parametrize("method", ["yarn", "rerope"])
def test_a_script_of_twenty_lines(method: str, tmp_path: Path) -> None:
    check_script(SCRIPT, method, tmp_path)


@pytest.mark.parametrize("place", ["embeddings", "everything", "hooks"])
@pytest.mark.parametrize("method", ["yarn", "rerope", "dynamic-ntk"])
def test_offloaded_weights(method: str, place: str, tmp_path: Path) -> None:
    undivided = tiny_llama()
    undivided.save_pretrained(tmp_path / "model")
    plain = logits(undivided, IDS)
    patch_model(undivided, method, factor=4)
    places: dict[str, Any] = {"": "disk"}
    if place == "embeddings":
        parts = ("model.layers", "model.norm", "model.rotary_emb", "lm_head")
        places = {"model.embed_tokens": "disk", **dict.fromkeys(parts, "cpu")}
    options = {} if place == "hooks" else {"device_map": places, "offload_folder": tmp_path / "offload"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options).eval()
    if place == "hooks":
        cpu_offload(model)
    patch = patch_model(model, method, factor=4)
    assert torch.equal(logits(model, IDS), logits(undivided, IDS))
    patch.undo()
    assert torch.equal(logits(model, IDS), plain)


def loss_and_gradients(model: PreTrainedModel, **batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train()
    loss = model(**batch).loss
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


@pytest.mark.parametrize("method", ["none", "yarn", "rerope", "rerope+fade", "dynamic-ntk", "jet-long"])
def test_right_padding_trains_as_each_row_alone(method: str) -> None:
    """Rows as collators of the Trainer pad them: at the right, with a mask and without positions."""
    model = tiny_llama().double()
    patch_model(model, method, factor=4)
    short, long = tokens(TRAINED // 2, seed=1), tokens(3 * TRAINED, seed=2)
    ids, mask = padded(short, long, side="right")
    labels = ids.masked_fill(mask == 0, -100)
    together, gradients = loss_and_gradients(model, input_ids=ids, attention_mask=mask, labels=labels)
    alone = [loss_and_gradients(model, input_ids=row, labels=row) for row in (short, long)]
    shares = [(row.shape[1] - 1) / (short.shape[1] + long.shape[1] - 2) for row in (short, long)]
    # float64, except for norms and the loss, which transformers computes in float32
    torch.testing.assert_close(together, sum(share * loss for share, (loss, _) in zip(shares, alone, strict=True)))
    for name, gradient in gradients.items():
        expected = sum(share * grads[name] for share, (_, grads) in zip(shares, alone, strict=True))
        torch.testing.assert_close(gradient, expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["yarn", "rerope", "dynamic-ntk"])
def test_gradient_checkpointing_changes_no_bit(method: str, reentrant: bool) -> None:
    model = tiny_llama()
    patch_model(model, method, factor=4)
    expected = loss_and_gradients(model, input_ids=IDS, labels=IDS)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # as of 5.23
    enable({"use_reentrant": reentrant})
    loss, gradients = loss_and_gradients(model, input_ids=IDS, labels=IDS)
    assert torch.equal(loss, expected[0]) and gradients.keys() == expected[1].keys()
    assert all(torch.equal(gradient, expected[1][name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("tied", [False, True])
def test_trained_embeddings_are_tied_only_where_the_model_ties_them(tied: bool) -> None:
    torch.manual_seed(0)
    model = tiny_llama(tie_word_embeddings=tied)
    before = logits(model, tokens(40))
    network = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", modules_to_save=["embed_tokens", "lm_head"]))
    tie_again(network)
    assert torch.equal(logits(network, tokens(40)), before)
    layers = (network.get_base_model().get_input_embeddings(), network.get_base_model().get_output_embeddings())
    inputs, outputs = (layer.modules_to_save["default"].weight for layer in layers)
    assert (inputs is outputs) == tied


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # peft 0.21 calls it that
def test_prefix_tuning(tmp_path: Path) -> None:
    """Its keys have no positions: a frequency method keeps them, a remapping refuses the first forward."""
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    patch_model(base, "yarn", factor=4)
    model = get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    train(model, 2 * TRAINED)
    save_adapter(model.eval(), tmp_path / "adapter")
    opened = load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(realigned(opened), IDS), logits(realigned(model), IDS))
    remapped = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    patch_model(remapped, "rerope", factor=4)
    with pytest.raises(EvaluationError, match="positions are not known: .*prefix tuning"):
        train(get_peft_model(remapped, PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")), TRAINED)
