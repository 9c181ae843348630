"""Every example, run as a person runs it, on less: what it prints is what its first lines promise.

A new numbered file is run here the moment it exists, without arguments where `RUNS` has none for it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from hf_posext import ExtensionPlan, detect_scheme, load_documents

from ..conftest import EXAMPLES, tiny_llama

NAMES = [path.stem for path in [*sorted(EXAMPLES.glob("[0-9][0-9]_*.py")), EXAMPLES / "pretrain_tiny.py"]]

RUNS: dict[str, tuple[str, list[str]]] = {
    "01_inspect": (
        "",
        [
            r"tiny-rope\n  scheme +rotary\n  generalizes by +interpolation\n",
            r"tiny-learned\n.*\n  generalizes by +none\n  its config says 2048 .*\n  its weights say 511 ",
            r"tiny-alibi\n.*\n  generalizes by +extrapolation\n",
        ],
    ),
    "02_patch_and_generate": (
        "--length 1024 --factor 4",
        [r"as it is:  (?!48213)", r"patched:   48213\n", r"undone to the bit: True\n"],
    ),
    "03_before_after": (
        "--documents 1 --lengths 512 1024 --methods none yarn --passkey 1",
        [
            r"Short-context check.*\n.*\n.*\nyarn x4 +\+\d",
            r"Gain over truncation.*\n.*\n.*\nnone +1.00 +0\.[1-4]\d\nyarn x4 +0\.9\d +(0\.9|1\.0)\d\n",
            r"Passkeys.*\n.*\n.*\nnone +100 % +0 %\nyarn x4 +100 % +100 %\n",
            r"the report: reports/before_after/README.md\n",
        ],
    ),
    "04_accelerate_eval": (
        "--documents 2 --lengths 512 1024",
        [r"yarn x4 +4\d\.\d \(.*\) +4\d\.\d \(", r"2 documents on 1 process\(es\)\n"],
    ),
    "05_lora_finetune": (
        "--documents 1 --lengths 128 256 --length 256 --steps 2 --accumulation 1 --output reports/lora",
        [
            r"yarn and LoRA: 2 steps of 1 rows of 256 tokens, 86,016 of 5,770,496 parameters\n",
            r"perplexity at +128 +256\nbefore +[\d.]+ +[\d.]+\nafter +[\d.]+ +[\d.]+\n",
            r"the adapter, with its plan: reports/lora/adapter\n",
        ],
    ),
    "06_load_adapter": (
        "--length 1024 --adapter reports/lora/adapter",
        [
            r"the base alone: +perplexity +\d{2,3}\.\d over 1024 tokens\n",
            r"does the adapter fit\? +no: the adapter was trained under \(yarn: 512 -> 2048",
            r"does it fit now\? +yes\n",
            r"merged: .*\n +logits differ by [0-9.]+e-0[4-9] at most\n",  # float32, one product instead of three
            r"plain transformers: .*\n +logits differ by 0e\+00 at most\n +its config says 2048 tokens\n",
        ],
    ),
    "07_custom_method": (
        "--documents 1 --lengths 128 256 --methods none ntk-mixed",
        [
            r"ntk-mixed: NTK-RoPE-mixed, https://\S+\nBetween",
            r"It keeps the contract: ",
            r"ntk-mixed x4 +\+\d",
            r"none .*\nntk-mixed x4 ",
        ],
    ),
    "08_encoder_table": (
        "--novels 1 --per-novel 2 --lengths 1024",
        [r"1024  none, truncated to 512 +after 512 +4 ", r"1024  table-linear x2 +after 512 +4 "],
    ),
    "pretrain_tiny": (
        "--steps 3 --batch-size 1 --scheme learned",
        [
            r"learned: 6,311,936 parameters, 1,536 tokens\nstep +1   loss 8\.\d+\n",  # ln 4096 is 8.3
            r"perplexity at +512 +1024\nthis run +\d{4}\.\d +\d{4}\.\d\nthe shipped weights +4\d\.\d +\d+\.\d\n",
            r"saved: reports/pretrain_tiny\n",
        ],
    ),
}
BEFORE = {"06_load_adapter": "05_lora_finetune"}
ALONE = {"07_custom_method"}
"""In a process of its own: a method that it registers stays."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which examples run and leave their reports."""
    return tmp_path_factory.mktemp("examples")


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the output of an example."""
    path, words = EXAMPLES / f"{name}.py", RUNS.get(name, ("", []))[0].split()
    if name in ALONE:
        environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(path), *words]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    with contextlib.redirect_stdout(io.StringIO()) as said:
        runpy.run_path(str(path), run_name="__main__")
    return said.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_an_example_does_what_it_says(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = BEFORE.get(name)
    if first is not None and not (folder / "reports" / "lora").exists():  # where tests are shared out
        run(first, folder, monkeypatch)
    said = run(name, folder, monkeypatch)
    assert said.strip()
    assert [pattern for pattern in RUNS.get(name, ("", []))[1] if not re.search(pattern, said)] == [], said
    assert [line for line in said.splitlines() if len(line) > 80] == []
    assert str(EXAMPLES) not in said and str(folder) not in said


@pytest.mark.parametrize("name", NAMES)
def test_an_example_says_what_one_learns_and_how_to_run_it(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    docstring = text.split('"""')[1]
    assert "One learns" in docstring
    assert f"python examples/{name}.py" in docstring


def test_the_page_lists_every_example() -> None:
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    files = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh", ".ipynb")]
    assert [name for name in files if f"[`{name}`]({name})" not in page] == []


def test_the_adapter_is_asked_for_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("06_load_adapter", tmp_path, monkeypatch)
    assert "run examples/05_lora_finetune.py first" in capsys.readouterr().err


def test_the_custom_method_is_that_of_its_author(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in https://kexue.fm/archives/9706: n / (base ** ((m - 1) / n) * exp(a * m ** b)) for m = 1 ... n pairs."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    method = importlib.import_module("07_custom_method").NTKMixed
    model = tiny_llama()  # 8 pairs, base 10,000
    plan: ExtensionPlan = method().plan(detect_scheme(model), factor=4)
    places = torch.arange(1, 9, dtype=torch.float64)
    scale = torch.log(torch.tensor(4.0, dtype=torch.float64)) / 8**0.625
    expected = 1 / (10_000 ** ((places - 1) / 8) * torch.exp(scale * places**0.625))
    found = torch.tensor(plan.rotaries[0].inv_freq, dtype=torch.float64)
    # float32, and rounded once more through longrope's factors
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert plan.rotaries[0].attention_factor == 1


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / "pretrain_tiny.py"))


def test_the_rows_of_the_recipe(recipe: dict[str, Any]) -> None:
    """One in eight is synthetic, two thirds of those with a pass key whose answer is marked; all have 512 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tiny" / "tiny-rope")
    texts = load_documents(EXAMPLES / "data" / "train.jsonl", limit=1)
    rows = recipe["Rows"](texts, tokenizer, 480, 0)
    keys = copies = 0
    for row in (rows[index] for index in range(len(rows))):
        ids, marked = row["input_ids"], row["labels"] >= len(tokenizer)
        assert ids.shape == row["labels"].shape == (512,)
        assert torch.equal(row["labels"] % len(tokenizer), ids)
        text = tokenizer.decode(ids)
        key = re.search(r"What is the pass key\? The pass key is (\d{5})\.$", text)
        if key:
            keys += 1
            assert text.count(key[1]) == 3 and tokenizer.decode(ids[marked]) == key[1]
        else:
            assert not marked.any()
            copies += text[-40:] in text[:-60]
    # 40 and 20 are expected, with standard deviations of 6.1 and 4.4
    assert 22 < keys < 58 and 7 < copies < 33


def test_the_loss_of_the_recipe_weighs_answers_four_times(recipe: dict[str, Any]) -> None:
    logits = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, 3 + 16, 4, 5], [6, 7, 8, 9 + 16, 10 + 16]])
    expected = 0.0
    for row in range(2):
        for at in range(4):
            label = int(labels[row, at + 1])
            expected -= logits[row, at].log_softmax(-1)[label % 16].item() * (4 if label >= 16 else 1)
    outputs = type("Outputs", (), {"logits": logits})
    found = recipe["weighted_loss"](outputs, labels, torch.tensor(8))
    assert found.item() == pytest.approx(expected / 8, rel=1e-6)


def test_the_recipe_decays_matrices_alone(recipe: dict[str, Any]) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    decayed, others = recipe["optimizer"](model).param_groups
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0
    assert {names[id(weight)] for weight in others["params"]} == {
        name for name in names.values() if "norm" in name or "embed" in name
    }
    assert len(decayed["params"]) + len(others["params"]) == len(names)
