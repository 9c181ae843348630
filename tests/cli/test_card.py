"""`card`: from a saved adapter, two result files, and what its training left beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_posext.evaluation import Results

from .helpers import MODEL, NOVELS, compare, error_of, run


@pytest.fixture(scope="module")
def figures(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Result files of before and after, as `card` takes them."""
    root = tmp_path_factory.mktemp("figures")
    assert compare(root / "before", documents=1, methods="none").exit_code == 0
    words = ["--model", adapter, "--dataset", NOVELS, "--documents", 1, "--lengths", "64,128"]
    result = run("evaluate", *words, "--output", root / "after")
    assert result.exit_code == 0, result.output
    return [word for side in ("before", "after") for word in (f"--{side}", str(root / side / "results.json"))]


@pytest.fixture
def output(adapter: Path, tmp_path: Path) -> Path:
    """As `finetune` leaves it."""
    shutil.copytree(adapter, tmp_path / "run" / "adapter")
    provenance = {"run": {"settings": {"steps": 3}}, "result": {"path": "adapter", "seconds": 1.5}}
    (tmp_path / "run" / "provenance.json").write_text(json.dumps(provenance))
    return tmp_path / "run"


def test_the_card_tells_before_after_and_training(output: Path, figures: list[str]) -> None:
    result = run("card", output, *figures)
    assert result.exit_code == 0, result.output
    path = output / "adapter" / "README.md"
    assert result.stdout == f"card: {path}\n" and (output / "adapter" / "before_after.png").is_file()
    card = ModelCard(path.read_text())
    assert "| result.seconds | 1.5 |" in card.text and "| run.settings.steps | 3 |" in card.text
    after = Results.load_json(figures[3]).row("yarn", 128)
    assert after["perplexity"] in [entry.metric_value for entry in card.data.eval_results]


def test_the_provenance_of_another_run_is_left_alone(output: Path, figures: list[str]) -> None:
    (output / "provenance.json").write_text('{"result": {"path": "model", "seconds": 1.5}}')
    assert run("card", output / "adapter", *figures).exit_code == 0
    assert "## Training" not in (output / "adapter" / "README.md").read_text()


def test_an_adapter_goes_to_the_hub_with_its_card(
    output: Path, figures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []

    def push(directory: Path, repo: str) -> str:
        sent.extend([repo, (directory / "README.md").read_text()])
        return "https://hub/commit"

    monkeypatch.setattr("hf_posext.adapters.push_to_hub", push)
    result = run("card", output, *figures, "--push", "me/adapter")
    assert result.stdout.splitlines()[-1] == "pushed: https://hub/commit"
    assert sent[0] == "me/adapter" and "## Before and after" in sent[1]


def test_wrong_input_is_one_line(output: Path, figures: list[str], patched: Path) -> None:
    assert "to contain an adapter or a model saved with a patch" in error_of(run("card", MODEL, *figures))
    assert f"hf upload me/x {patched}" in error_of(run("card", patched, *figures, "--push", "me/x"))
    figures_without_file = [*figures[:3], str(output / "none.json")]
    assert "Expected results at" in error_of(run("card", output, *figures_without_file))
