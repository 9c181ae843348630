"""`report`: several result files in, one report out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .helpers import LEARNED, compare, error_of, run

FILES = {"README.md", "results.json", "gain_by_position.png"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of one model, and one of another."""
    root = tmp_path_factory.mktemp("runs")
    arguments = {
        "yarn": {"methods": "none,yarn"},
        "linear": {"methods": "none,linear"},
        "learned": {"methods": "none,table-linear,yarn", "model": LEARNED},
    }
    for name, options in arguments.items():
        result = compare(root / name, documents=1, **options)
        assert result.exit_code == 0, result.output
    return [root / name / "results.json" for name in arguments]


def test_runs_are_merged_into_one_report(runs: list[Path], tmp_path: Path) -> None:
    result = run("report", *runs, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    *table, last = result.stdout.splitlines()
    assert last == f"report: {tmp_path / 'out' / 'README.md'}" and max(map(len, table)) <= 80
    assert sum(line.startswith(("yarn x2", "linear x2", "table-linear x2")) for line in table) == 3 * 4
    assert "tiny-learned: Left out: yarn (extends rotary positions; gpt2 has learned)." in " ".join(table)
    per_model = {f"{name}_{file}" for name in ("tiny-rope", "tiny-learned") for file in FILES - {"README.md"}}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md",
        "perplexity.png",
        "results.csv",
        *per_model,
    }


def test_the_report_may_lie_beside_the_folders_of_its_runs(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_bytes(runs[0].read_bytes())
    assert run("report", tmp_path / "run" / "results.json", "--output", tmp_path).exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"run", "perplexity.png", "results.csv", *FILES}


def test_other_protocols_are_told_apart(runs: list[Path], tmp_path: Path) -> None:
    sliding = compare(tmp_path / "sliding", documents=1, methods="none", protocol="sliding", stride=32)
    assert sliding.exit_code == 0, sliding.output
    result = run("report", runs[0], tmp_path / "sliding" / "results.json", "--output", tmp_path / "out")
    note = "Compare within a model, not across: the runs differ in protocol (prefix, sliding); stride (None, 32)."
    assert note in " ".join(result.stdout.split()) and note in (tmp_path / "out" / "README.md").read_text()
    assert "tiny-rope (protocol prefix, stride None)" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "Expected results at"),
        ("[", "as JSON"),
        ("{}", "Expected results of hf_posext"),
        ('{"schema": 2, "provenance": {}, "rows": [], "per_document": []}', "Expected rows in"),
    ],
)
def test_files_that_hold_no_results_are_refused(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_text(content)
    error = error_of(run("report", path, "--output", tmp_path / "out"))
    assert message in error and "broken.json" in error and not (tmp_path / "out").exists()


def test_contradicting_runs_are_refused(runs: list[Path], tmp_path: Path) -> None:
    data = json.loads(runs[0].read_text())
    data["rows"][0]["nll_sum"] += 1
    (tmp_path / "other.json").write_text(json.dumps(data))
    error = error_of(run("report", runs[0], tmp_path / "other.json", "--output", tmp_path / "out"))
    assert "to agree on none at 64" in error and not (tmp_path / "out").exists()


def test_an_output_with_files_in_it_is_refused(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("precious")
    assert "with files" in error_of(run("report", runs[0], "--output", tmp_path))
    assert (tmp_path / "README.md").read_text() == "precious"
