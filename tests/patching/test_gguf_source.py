"""Models in GGUF files: found by path, opened as the model that was written, patched and saved like any other."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_posext import load_patched, patch_model
from hf_posext.cli.loading import load_body, load_model
from hf_posext.errors import CheckpointError, InvalidParameterError
from hf_posext.patching import checkpoint
from hf_posext.patching.checkpoint import Source, locate, open_config
from tests.cli.helpers import MODEL, NOVELS, error_of, run
from tests.conftest import TRAINED, logits, realigned, tiny_llama, tokens
from tests.export.gguf_helpers import write_llama
from tests.helpers import shipped_model, shipped_tokenizer

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def shipped() -> tuple[LlamaForCausalLM, Any]:
    return shipped_model(), shipped_tokenizer()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, shipped: tuple[LlamaForCausalLM, Any]) -> Path:
    model, tokenizer = shipped
    return write_llama(model, tmp_path_factory.mktemp("gguf") / "tiny.gguf", tokenizer=tokenizer)


def test_a_gguf_file_is_the_model_that_was_written(file: Path, shipped: tuple[LlamaForCausalLM, Any]) -> None:
    model, tokenizer = load_model(str(file), "float32", "cpu")
    text = "Nobody ever goes there, said the captain;\n the 3rd time."
    assert tokenizer(text)["input_ids"] == shipped[1](text)["input_ids"]
    ids = tokens(300, rows=2)
    assert torch.equal(logits(realigned(model), ids), logits(realigned(shipped[0]), ids))
    assert model.config.max_position_embeddings == 512 and model.config.name_or_path == str(file)
    body = load_body(str(file), "float32", "cpu")
    for name, weight in model.base_model.state_dict().items():
        assert torch.equal(body.state_dict()[name], weight)


def test_quantised_weights_are_those_that_their_blocks_stand_for(tmp_path: Path) -> None:
    """Q8_0: blocks of 32 weights, each a whole number of steps of the block's largest weight / 127, in float16."""
    model = tiny_llama()
    read, _ = load_without_tokenizer(write_llama(model, tmp_path / "q8.gguf", quantized=True))
    weight = model.model.layers[0].mlp.up_proj.weight.detach().view(-1, 32)
    scale = (weight.abs().amax(1, keepdim=True) / 127).half().float()
    steps = read.model.layers[0].mlp.up_proj.weight.detach().view(-1, 32) / scale
    assert torch.allclose(steps, steps.round(), atol=1e-4)
    assert ((steps * scale - weight).abs() <= 0.57 * scale).all()  # half a step, and 127 / 2**11 by the scale


def load_without_tokenizer(path: Path) -> tuple[Any, Source]:
    source = locate(path)
    return checkpoint.open_weights(AutoModelForCausalLM, source, dtype=torch.float32), source


@pytest.mark.parametrize("opened", ["here", "by transformers"])
def test_a_patched_model_that_came_from_a_gguf_file_is_saved(file: Path, tmp_path: Path, opened: str) -> None:
    """transformers refuses: its quantiser stays on the model after it has unpacked all weights."""
    if opened == "here":
        model, _ = load_model(str(file), "float32", "cpu")
    else:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    quantizer = getattr(model, "hf_quantizer", None)
    patch = patch_model(model, "rerope", factor=2)
    patch.save_pretrained(tmp_path / "saved")
    assert getattr(model, "hf_quantizer", None) is quantizer
    again, ids = load_patched(tmp_path / "saved"), tokens(700)
    assert torch.equal(logits(realigned(again), ids), logits(realigned(model), ids))
    assert getattr(again.config, "quantization_config", None) is None


def test_weights_that_are_still_packed_are_not_saved(tmp_path: Path) -> None:
    model = tiny_llama()
    model.hf_quantizer = type("GgufHfQuantizer", (), {"packed_modules": {"lm_head": None}})()
    patch = patch_model(model, "yarn", factor=2)
    with pytest.raises(CheckpointError, match="GGUF blocks.*dequantize=True"):
        patch.save_pretrained(tmp_path / "saved")


# Paths


def test_a_file_a_folder_and_a_file_of_a_repository_are_found(file: Path, tmp_path: Path) -> None:
    assert locate(file) == Source(str(file), str(file.parent), "tiny.gguf")
    assert locate(file.parent) == Source(str(file.parent), str(file.parent), "tiny.gguf")
    assert locate("org/name/model.Q4_K_M.gguf") == Source(
        "org/name/model.Q4_K_M.gguf", "org/name", "model.Q4_K_M.gguf"
    )
    assert locate("org/name/sub/m.GGUF").gguf == "sub/m.GGUF"
    assert locate("org/name").gguf is None
    shutil.copy(file, tmp_path)
    shutil.copy(MODEL / "model.safetensors", tmp_path)
    assert locate(tmp_path).gguf is None, "safetensors come first"


@pytest.mark.parametrize(
    ("names", "path", "message"),
    [
        (["a.gguf", "b.gguf"], "", "Expected one GGUF file in .*, got 2: a.gguf, b.gguf. Pass one"),
        (["m-00001-of-00002.gguf"], "m-00001-of-00002.gguf", "one part of a split GGUF file"),
        ([], "absent.gguf", "no such file: .*absent.gguf"),
        (["garbage.gguf"], "garbage.gguf", "garbage.gguf is not a GGUF file"),
    ],
)
def test_files_that_cannot_be_opened_are_refused_in_one_line(
    tmp_path: Path, names: list[str], path: str, message: str
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"not one")
    assert re.search(message, error_of(run("inspect", tmp_path / path)))


def test_inspect_opens_no_weights(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were opened")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    result = run("inspect", file)
    assert result.exit_code == 0, result.output
    assert "trained length 512 tokens" in " ".join(result.stdout.split())


def test_a_file_is_measured_and_announced(file: Path, tmp_path: Path) -> None:
    words = ("--dataset", NOVELS, "--lengths", "64", "--documents", "2")
    rows = []
    for model in (file, MODEL):
        output = tmp_path / Path(model).name
        result = run("evaluate", "--model", model, *words, "--output", output)
        assert result.exit_code == 0, result.output
        assert (f"dequantising {file} (" in result.stderr) == (model == file)
        rows.append(json.loads((output / "results.json").read_text())["rows"][0]["perplexity"])
    assert rows[0] == pytest.approx(rows[1], rel=1e-6)


def test_a_file_without_vocabulary_or_with_missing_weights_is_refused(
    tmp_path: Path, shipped: tuple[LlamaForCausalLM, Any]
) -> None:
    with pytest.raises(CheckpointError, match="contains no vocabulary"):
        load_model(str(write_llama(tiny_llama(), tmp_path / "bare.gguf")), "float32", "cpu")
    path = write_llama(shipped[0], tmp_path / "partial.gguf", tokenizer=shipped[1], leave_out="blk.1.attn_q.weight")
    for load in (load_model, load_body):
        with pytest.raises(
            (CheckpointError, InvalidParameterError), match=r"lacks 1 weight.*layers\.1\.self_attn\.q_proj"
        ):
            load(str(path), "float32", "cpu")


# Positions that transformers does not read


@pytest.mark.parametrize(
    "scaling", [{"type": "yarn", "factor": 4.0}, {"type": "linear", "factor": 2.0}, {"factor": 2.0}]
)
def test_scaled_positions_are_refused(tmp_path: Path, scaling: dict[str, Any]) -> None:
    source = locate(write_llama(tiny_llama(), tmp_path / "scaled.gguf", scaling=scaling))
    with pytest.raises(CheckpointError, match="scales its positions"):
        open_config(source)


@pytest.mark.parametrize("scaling", [{"type": "none", "factor": 2.0}, {"type": "linear", "factor": 1.0}])
def test_scaling_by_nothing_is_none(tmp_path: Path, scaling: dict[str, Any]) -> None:
    config = open_config(locate(write_llama(tiny_llama(), tmp_path / "plain.gguf", scaling=scaling)))
    assert config.rope_parameters["rope_type"] == "default"


def test_divisors_of_llama_3_become_its_parameters(tmp_path: Path) -> None:
    """Right value: the model whose config has them."""
    model = tiny_llama(rope_parameters=LLAMA3, head_dim=32, max_position_embeddings=8 * TRAINED)
    plain = 10000.0 ** -(torch.arange(16) / 16)
    divisors = (plain / model.model.rotary_emb.inv_freq).tolist()
    read, source = load_without_tokenizer(write_llama(model, tmp_path / "llama3.gguf", divisors=divisors))
    assert read.config.rope_parameters == pytest.approx(LLAMA3)
    assert torch.allclose(logits(read, tokens(200)), logits(model, tokens(200)), atol=2e-4)


def test_divisors_of_another_making_are_refused(tmp_path: Path) -> None:
    path = write_llama(tiny_llama(), tmp_path / "odd.gguf", divisors=[1, 1, 2, 3, 5, 8, 8, 8])
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight"):
        open_config(locate(path))
