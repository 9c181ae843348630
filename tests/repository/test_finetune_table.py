"""The page of fine-tuning, from result files made by hand: its numbers, its words, and what it does without runs."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from ..helpers import ROOT
from ..reporting.helpers import panels

sys.path.insert(0, str(ROOT / "tools"))

import finetune_table

TOKENS = (100, 300)
"""Of the second half of two documents."""


def a_run(tail: float, tilt: float = 0.0, trained: int | None = None) -> dict[str, Any]:
    """A run of that tail perplexity at 4096 tokens; one document is harder than the other by `tilt` nats a token."""
    nats = (math.log(tail) + 3 * tilt, math.log(tail) - tilt)  # they weigh 1 to 3
    documents = [
        {"document": name, "length": 4096, "tail_nll_sum": count * nll, "tail_tokens": count}
        for name, count, nll in zip("ab", TOKENS, nats, strict=True)
    ]
    rows = [
        {"length": length, "perplexity": tail, "perplexity_tail": value, "gain": 30 / value, "passkey": 0.5}
        for length, value in ((512, 40.0), (4096, tail))
    ]
    run: dict[str, Any] = {"rows": rows, "short_context_change": 0.1, "per_document": documents}
    if trained:
        run |= {"parameters": {"trained": trained, "model": 1000}}
    return run


def a_file(path: Path, **runs: dict[str, Any]) -> Path:
    settings = {"model": "tiny-rope", "train": "train.jsonl", "documents": "heldout.jsonl", "steps": 3, "batch": 1}
    settings |= {"warmup": 1, "passkey": 4, "seed": 0, "bf16": False, "lengths": [512, 4096]}
    named = {name.replace("__", "/").replace("_", "-"): run for name, run in runs.items()}
    machine = {"processor": "x86_64", "cores": 2, "threads": 1}
    path.write_text(json.dumps({"settings": settings, "machine": machine, "runs": named}))
    return path


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """All trainings of yarn, in the order in which they might come; untrained alone of linear."""
    return a_file(
        tmp_path / "finetune.json",
        yarn__full=a_run(32, trained=1000),
        yarn__lora_plus=a_run(33, tilt=0.01, trained=200),
        yarn__untrained=a_run(40),
        yarn__lora=a_run(36, trained=20),
        yarn__pose_lora=a_run(44, trained=20),
        linear__untrained=a_run(50),
    )


def test_the_table_has_a_line_for_each_run_in_order(results: Path, tmp_path: Path) -> None:
    page = finetune_table.render(results, tmp_path / "none.json")
    lines = [line for line in page.splitlines() if "/" in line and line.startswith("| ")]
    gained = math.log(40 / 32)
    shares = {name: f"{100 * math.log(40 / tail) / gained:.0f} %" for name, tail in (("lora", 36), ("plus", 33))}
    assert shares == {"lora": "47 %", "plus": "86 %"}
    assert lines == [
        "| linear/untrained | 40.0 | +10.0 % | 50.0 | 0.600 | 2 of 4 | - | - |",
        "| yarn/untrained | 40.0 | +10.0 % | 40.0 | 0.750 | 2 of 4 | - | - |",
        "| yarn/lora | 40.0 | +10.0 % | 36.0 | 0.833 | 2 of 4 | 47 % | 20 (2.0%) |",
        "| yarn/lora-plus | 40.0 | +10.0 % | 33.0 | 0.909 | 2 of 4 | 86 % | 200 (20.0%) |",
        "| yarn/full | 40.0 | +10.0 % | 32.0 | 0.938 | 2 of 4 | 100 % | 1,000 (100.0%) |",
        "| yarn/pose-lora | 40.0 | +10.0 % | 44.0 | 0.682 | 2 of 4 | -43 % | 20 (2.0%) |",
    ]
    assert "--steps 3 --batch 1 --warmup 1 --passkey 4 --seed 0 --no-bf16" in page and "Settings tried" not in page


def test_the_words_follow_the_numbers(results: Path) -> None:
    best, verdict, unmeasured = finetune_table.sentences(finetune_table.load(results))
    assert best.startswith(
        "The best at 4096 tokens is `yarn/full`, with a gain over truncation of 0.938. None is above"
    )
    ratio = 33 / 36 - 1
    assert f"that helps with `yarn` ({100 * ratio:+.1f} % [" in verdict
    assert unmeasured.startswith("Not measured yet: `none/untrained`") and "`yarn/" not in unmeasured
    for tail, tilt, words in ((39, 0.01, "harms"), (36.5, 0.05, "makes no difference that these documents show")):
        content = finetune_table.load(results)
        content["runs"]["yarn/lora-plus"] = a_run(tail, tilt, 200)
        assert f"that {words} with `yarn`" in finetune_table.sentences(content)[1]


def test_training_that_gains_nothing_has_no_share(results: Path) -> None:
    content = finetune_table.load(results)
    content["runs"]["yarn/full"] = a_run(42, trained=1000)
    assert "Training all weights raised the perplexity at 4096 of `yarn` (+5.0 %)." in finetune_table.sentences(
        content
    )
    assert finetune_table.share_of_full("yarn/lora", content["runs"]) is None
    content["runs"]["none/untrained"] = a_run(25)
    assert "Above 1, where the longer context helps, are `none/untrained`." in finetune_table.sentences(content)[0]


def test_candidates_are_a_table_of_their_own_against_the_best_full(results: Path, tmp_path: Path) -> None:
    runs = {"yarn__untrained": a_run(40), "yarn__full_slow": a_run(38, trained=1000)}
    runs |= {"yarn__full_fast": a_run(34, trained=1000), "yarn__dora": a_run(36, trained=30)}
    page = finetune_table.render(results, a_file(tmp_path / "tried.json", **runs))
    share = 100 * math.log(40 / 36) / math.log(40 / 34)
    assert f"| yarn/dora | 40.0 | +10.0 % | 36.0 | 0.833 | 2 of 4 | {share:.0f} % | 30 (3.0%) |" in page
    assert "## Settings tried" in page and "[`benchmarks/results/finetune_candidates.json`]" in page


def test_the_picture(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = finetune_table.load(results)
    gain, cost = panels(lambda: finetune_table.plot(content, tmp_path / "p.png"), monkeypatch)
    assert imread(tmp_path / "p.png").shape[1] == 1800
    dots = {line.get_label(): list(line.get_xdata()) for line in gain.lines}
    assert dots["lora"] == [30 / 36] and dots["untrained"] == [30 / 50, 30 / 40]
    assert all(panel.get_title() and panel.get_xlabel() for panel in (gain, cost)) and gain.get_ylabel() == "method"


def test_a_file_without_runs_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected runs in .*, got none. Run benchmarks/finetune.py"):
        finetune_table.load(a_file(tmp_path / "finetune.json"))
