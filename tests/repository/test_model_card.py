"""`MODEL_CARD.md` is what the committed result files give, and the Hub's own library reads it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

ROOT = Path(__file__).parents[2]
MODELS = ("tiny-rope", "tiny-learned", "tiny-alibi")


def check(results: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "model_card.py"), "--check", "--results", str(results)]
    return subprocess.run(command, capture_output=True, text=True)


def rows(model: str) -> list[dict[str, float]]:
    return json.loads((ROOT / "results" / f"{model}.json").read_text(encoding="utf-8"))["rows"]


def test_the_committed_card_is_what_the_results_give() -> None:
    done = check(ROOT / "results")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("model", MODELS)
def test_a_changed_figure_is_noticed(model: str, tmp_path: Path) -> None:
    results = tmp_path / "results"
    shutil.copytree(ROOT / "results", results)
    path = results / f"{model}.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["rows"][-1]["perplexity"] += 0.01
    path.write_text(json.dumps(content), encoding="utf-8")
    done = check(results)
    assert done.returncode == 1
    assert "make card" in done.stderr


def test_the_hub_library_reads_every_figure_of_every_model() -> None:
    data = ModelCard.load(ROOT / "MODEL_CARD.md").data
    assert (data.license, data.pipeline_tag, data.library_name) == ("apache-2.0", "text-generation", "transformers")
    read = [(entry.dataset_args["length"], entry.metric_value) for entry in data.eval_results]
    assert read == [
        (row["length"], round(row[key], 2))
        for model in MODELS
        for row in rows(model)
        for key in ("perplexity", "perplexity_tail", "passkey")
    ]


def test_the_index_has_an_entry_for_each_shipped_model() -> None:
    """`ModelCard` joins the entries into one model; the Hub reads the metadata block itself."""
    block = (ROOT / "MODEL_CARD.md").read_text(encoding="utf-8").split("---\n")[1]
    assert [entry["name"] for entry in yaml.safe_load(block)["model-index"]] == list(MODELS)
    assert all((ROOT / "examples" / "tiny" / model).is_dir() for model in MODELS)
