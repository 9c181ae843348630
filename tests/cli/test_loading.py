"""Checkpoints that are not what they seem: weights that are not there, pickles, and code of their own."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    ByT5Tokenizer,
    GPT2Config,
    LlamaConfig,
    T5Config,
)

from hf_posext import load_adapter, load_patched, patch_model
from hf_posext.app import make_shelf
from hf_posext.cli.loading import load_body, load_model
from hf_posext.errors import CheckpointError, PosExtError
from hf_posext.evaluation import Document
from hf_posext.evaluation.questions import Questions
from hf_posext.evaluation.tokens import tokenize_documents
from hf_posext.patching.checkpoint import locate, open_tokenizer, require_vocabulary
from hf_posext.training.trainer import make_rows
from tests.conftest import tiny_llama

from .helpers import MODEL, NOVELS, error_of, run

MISSING = "model.layers.1.self_attn.q_proj.weight"
MESSAGE = rf"lacks 1 weight of the model, which would be random: {re.escape(MISSING)}\. Pass a complete checkpoint"


def drop(folder: Path, name: str = MISSING) -> Path:
    """The checkpoint without one of its weights."""
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def partial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drop(Path(shutil.copytree(MODEL, tmp_path_factory.mktemp("partial") / "model")))


def words_of(command: str, model: Path, output: Path) -> list[object]:
    data: list[object] = ["--dataset", NOVELS, "--documents", "2"]
    lengths: list[object] = ["--lengths", "64"]
    return {
        "evaluate": ["--model", model, *data, *lengths, "--output", output],
        "evaluate --control": ["--model", MODEL, "--control", model, *data, *lengths, "--output", output],
        "evaluate --longppl": ["--model", MODEL, "--longppl", model, *data, *lengths, "--output", output],
        "compare": ["--model", model, *data, *lengths, "--output", output, "--methods", "none"],
        "explain": [model],
        "explain --dataset": [model, *data, "--target-length", "1024"],
        "recommend": [model, *data, "--target-length", "1024", "--output", output.with_suffix(".json")],
        "search": [model, *data, "--target-length", "1024", "--output", output.with_suffix(".json")],
        "finetune": ["--model", model, *data, "--output", output, "--method", "yarn", "--factor", "2"],
        "export": [model, "--method", "yarn", "--factor", "2", "--to", "transformers", "--output", output],
        "inspect": [model],
    }[command]


COMMANDS = ["evaluate", "evaluate --control", "evaluate --longppl", "compare", "explain", "explain --dataset"]
COMMANDS += ["recommend", "search", "finetune", "export"]


@pytest.mark.parametrize("command", COMMANDS)
def test_weights_that_are_missing_are_named_and_refused(command: str, partial: Path, tmp_path: Path) -> None:
    line = error_of(run(command.split()[0], *words_of(command, partial, tmp_path / "out")))
    assert re.search(MESSAGE, line), line


def of_patched(root: Path) -> Callable[[], Any]:
    patch_model(tiny_llama(), "yarn", factor=2).save_pretrained(root / "patched")
    return lambda: load_patched(drop(root / "patched"))


def of_adapter(root: Path, adapter: Path) -> Callable[[], Any]:
    base = drop(Path(shutil.copytree(MODEL, root / "base")))
    copied = Path(shutil.copytree(adapter, root / "adapter"))
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    return lambda: load_adapter(copied)


def test_missing_weights_are_refused_by_every_loader(partial: Path, tmp_path: Path, adapter: Path) -> None:
    shelf = make_shelf([partial], None, None, lambda folder: load_model(folder, "float32", "cpu"))
    loaders: list[Callable[[], Any]] = [
        lambda: load_model(str(partial), "float32", "cpu"),
        lambda: load_body(str(partial), "float32", "cpu"),
        lambda: shelf.open("model"),
        of_patched(tmp_path),
        of_adapter(tmp_path, adapter),
    ]
    for load in loaders:
        with pytest.raises(CheckpointError, match=MESSAGE):
            load()


def test_a_checkpoint_of_other_names_is_refused_with_one_of_them(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    renamed = {f"foo.{name}": weight for name, weight in weights.items()}
    save_file(renamed, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="more; it contains foo.model.*, which the model does not have"):
        load_model(str(tmp_path / "model"), "float32", "cpu")


def test_an_encoder_opens_with_its_head_or_without_but_never_with_a_random_one(tmp_path: Path) -> None:
    """BERT's body alone has a pooler, which the checkpoint of a masked language model does not contain."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "head")
    BertModel(config).save_pretrained(tmp_path / "body")
    for name in ("head", "body"):
        assert type(load_body(str(tmp_path / name), "float32", "cpu")) is BertModel
    line = error_of(run("evaluate", *words_of("evaluate", tmp_path / "body", tmp_path / "out")))
    assert "got one without: its folder lacks the files" in line  # no tokenizer comes first


@pytest.mark.parametrize("config", [BertConfig, GPT2Config, LlamaConfig, T5Config])
def test_a_model_without_its_tokenizer_is_not_measured_on_unknown_tokens(config: Any, tmp_path: Path) -> None:
    """transformers opens one for BERT, GPT-2 and T5, to which every word is unknown or nothing."""
    config().save_pretrained(tmp_path)
    source = locate(str(tmp_path), trust_remote_code=False)
    with pytest.raises(CheckpointError, match="lacks the files. Save them there"):
        open_tokenizer(source)
    if config is not LlamaConfig:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        texts = [Document("a", "It was the best of times. " * 20)]
        with pytest.raises(CheckpointError, match="lacks the files"):
            tokenize_documents(texts, tokenizer, 8)
        with pytest.raises(CheckpointError, match="lacks the files"):
            Questions(passkey=1).prompts(tokenizer, None, 512)
        with pytest.raises(CheckpointError, match="lacks the files"):
            make_rows(texts, tokenizer, 8)


def test_tokenizers_of_bytes_need_no_file() -> None:
    require_vocabulary(ByT5Tokenizer())


# Pickles


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_of_pickles_is_refused_in_one_line(command: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    line = error_of(run(command.split()[0], *words_of(command, folder, tmp_path / "out")))
    assert "contains only pytorch_model.bin, which could execute code when opened. Save the weights as" in line


# Code of the checkpoint

CODE = """
from pathlib import Path
Path(__file__).parent.joinpath("..").resolve()
Path({marker!r}).touch()
from transformers import LlamaConfig
class Own(LlamaConfig):
    model_type = "own"
"""


@pytest.fixture
def remote(tmp_path: Path) -> tuple[Path, Path]:
    """A folder whose config is a class of its own, and the file that its code writes."""
    folder, marker = Path(shutil.copytree(MODEL, tmp_path / "remote")), tmp_path / "executed"
    config = json.loads((folder / "config.json").read_text())
    custom = {"model_type": "own", "auto_map": {"AutoConfig": "code.Own"}}
    (folder / "config.json").write_text(json.dumps({**config, **custom}))
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    return folder, marker


@pytest.mark.parametrize("command", [*COMMANDS, "inspect"])
def test_code_in_a_checkpoint_does_not_run_whatever_is_typed(
    command: str, remote: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder, marker = remote
    line = error_of(run(command.split()[0], *words_of(command, folder, tmp_path / "out")))
    assert "contains code of its own, which is not run. Pass --trust-remote-code" in line
    assert not marker.exists()


def test_code_in_a_tokenizer_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder, marker = Path(shutil.copytree(MODEL, tmp_path / "remote")), tmp_path / "executed"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    custom = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "code.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **custom}))
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    with pytest.raises(PosExtError):
        load_model(str(folder), "float32", "cpu")
    assert not marker.exists()


def test_code_runs_where_it_is_trusted(remote: tuple[Path, Path]) -> None:
    folder, marker = remote
    result = run("inspect", folder, "--trust-remote-code")
    assert marker.exists(), result.output


def test_a_model_on_the_hub_is_refused_at_once_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://localhost:9")
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("a request is repeated"))
    message = error_of(run("inspect", "org/name"))
    assert "Expected a model, got org/name: this machine has no such path, and http://localhost:9 cannot be" in message
