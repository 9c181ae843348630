"""`export` and `gguf` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_posext import load_patched, patch_model
from hf_posext.adapters import load_adapter, save_adapter
from hf_posext.export import read_gguf
from tests.adapters.helpers import with_adapter
from tests.conftest import logits, realigned, tokens
from tests.export.gguf_helpers import write_llama

from .helpers import MODEL, error_of, run
from .test_finetune import finetune

IDS = tokens(700)


def config_of(path: Path) -> dict[str, object]:
    return dict(json.loads((path / "config.json").read_text()))


def test_plain_model_with_a_method(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["export", MODEL, "--to", "vllm", "--method", "yarn", "--factor", "4", "--output", out]
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert f"vllm serve {out} --max-model-len 2048" in result.stdout
    assert "as read from vLLM 0.33.0" in result.stdout
    config = config_of(out)
    assert config["rope_parameters"]["rope_type"] == "yarn"  # type: ignore[index]
    assert config["dtype"] == "bfloat16"  # as the weights are
    assert AutoTokenizer.from_pretrained(out).model_max_length >= 2048
    assert (out / "SERVING.md").is_file()
    assert "with files" in error_of(run(*words))


def test_adapter_is_merged(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    patch_model(model, "yarn", factor=4, tokenizer=AutoTokenizer.from_pretrained(MODEL))
    save_adapter(with_adapter(model, use_dora=True), tmp_path / "adapter")
    words = ["export", tmp_path / "adapter", "--to", "transformers", "--dtype", "float32"]
    result = run(*words, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    merged = load_adapter(tmp_path / "adapter", dtype=torch.float32).merge_and_unload()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(realigned(plain.eval()), IDS), logits(realigned(merged.eval()), IDS))
    words[3] = "vllm"
    assert run(*words, "--output", tmp_path / "vllm").exit_code == 0
    assert "vLLM does not load it beside its base (use_dora)." in (tmp_path / "vllm" / "SERVING.md").read_text()
    refused = run(*words, "--output", tmp_path / "more", "--method", "yarn")
    assert "has a plan of its own. Leave out --method and lengths" in error_of(refused)


@pytest.mark.parametrize("preset", ["lora", "full"])
def test_checkpoint_of_a_finetuning(preset: str, tmp_path: Path) -> None:
    """The last checkpoint and what the run saved are the same model, also without the tokenizer in the checkpoint."""
    result = finetune(tmp_path / "run", preset=preset, save_every=1)
    assert result.exit_code == 0, result.output
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    saved = tmp_path / "run" / ("adapter" if preset == "lora" else "model")
    if preset == "lora":
        for file in checkpoint.glob("tokenizer*"):
            file.unlink()
    models = []
    for number, path in enumerate((checkpoint, saved)):
        out = tmp_path / f"out-{number}"
        result = run("export", path, "--to", "transformers", "--output", out)
        assert result.exit_code == 0, result.output
        models.append(AutoModelForCausalLM.from_pretrained(out).eval())
    opened = load_adapter(saved).merge_and_unload() if preset == "lora" else load_patched(saved)
    expected = logits(realigned(opened.to(models[0].dtype).eval()), IDS)
    for model in models:
        assert torch.equal(logits(realigned(model), IDS), expected)


def test_gguf_gets_the_positions_of_an_export(tmp_path: Path) -> None:
    options = ["--to", "llama.cpp", "--method", "llama3", "--factor", "4"]
    result = run("export", MODEL, *options, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert f"hf-posext gguf {tmp_path / 'out'} converted.gguf model.gguf" in result.stdout
    source = write_llama(AutoModelForCausalLM.from_pretrained(MODEL), tmp_path / "converted.gguf")
    result = run("gguf", tmp_path / "out", source, tmp_path / "model.gguf")
    assert result.exit_code == 0, result.output
    written = read_gguf(tmp_path / "model.gguf")
    assert written.keys["context_length"] == 2048 and len(written.tensors["rope_freqs.weight"]) == 32
    assert "Choose another name" in error_of(run("gguf", tmp_path / "out", source, tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "vllm"], "Pass the method, as in --method yarn --factor 4"),
        (["--to", "vllm", "--method", "rerope", "--factor", "4"], "remapped inside attention"),
        (["--to", "vllm", "--method", "yarm", "--factor", "4"], "yarm"),
        (["--to", "tgi", "--method", "yarn", "--factor", "4"], "tgi"),
    ],
)
def test_refusals_leave_nothing(options: list[str], message: str, tmp_path: Path) -> None:
    assert message in error_of(run("export", MODEL, *options, "--output", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
