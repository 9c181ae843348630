"""`--longppl` and `--retrieval` of `compare` and `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_posext.evaluation import Results

from .helpers import MODEL, NOVELS, OPTIONS, compare, error_of, run

ASKED = {"retrieval": 1, "tasks": "passkey", "depths": "0,1", "longppl": "yarn", "short_length": 8, "beta": -3}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    output = tmp_path_factory.mktemp("asked") / "out"
    return compare(output, documents=1, **ASKED), output


def test_a_run_with_both(finished: tuple[Any, Path]) -> None:
    result, output = finished
    assert result.exit_code == 0, result.output
    names = {path.name for path in output.iterdir()}
    assert {f"retrieval_{name}.png" for name in ("none", "linear_x2", "yarn_x2")} | {"retrieval.csv"} <= names
    results = Results.load_json(output / "results.json")
    places = [(row["method"], row["length"], row["depth"]) for row in results.retrieval]
    assert places == [(m, n, d) for m in ("none", "linear", "yarn") for n in (64, 128) for d in (0.0, 1.0)]
    assert results.provenance["longppl"]["evaluator"] == "yarn x2"
    criterion = results.provenance["longppl"]
    assert (criterion["alpha"], criterion["beta"], criterion["short_length"]) == (2, -3, 8)
    assert all((row["key_tokens"] is not None) == (row["length"] == 128) for row in results.rows)
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 80
    assert "Retrieval: share found" in result.stdout


def test_the_command_in_the_provenance_measures_the_same_again(finished: tuple[Any, Path], tmp_path: Path) -> None:
    first = Results.load_json(finished[1] / "results.json")
    _, *words = first.provenance["command"].split()
    words[words.index("--output") + 1] = str(tmp_path / "again")
    assert run(*words).exit_code == 0
    again = Results.load_json(tmp_path / "again" / "results.json")
    assert (again.rows, again.retrieval) == (first.rows, first.retrieval)


def test_evaluate_with_a_folder_as_evaluator(tmp_path: Path) -> None:
    words = ["--model", MODEL, "--dataset", NOVELS, "--lengths", "128", "--documents", 1, "--output", tmp_path / "out"]
    tasks = [
        "--longppl",
        MODEL,
        "--short-length",
        8,
        "--alpha",
        1.5,
        "--retrieval",
        1,
        "--tasks",
        "passkey",
        "--depths",
        "0.5",
    ]
    result = run("evaluate", *words, *tasks)
    assert result.exit_code == 0, result.output
    results = Results.load_json(tmp_path / "out" / "results.json")
    assert results.provenance["longppl"]["evaluator"].endswith("tiny-rope")
    assert results.provenance["longppl"]["alpha"] == 1.5
    assert [row["depth"] for row in results.retrieval] == [0.5]


def test_settings_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "retrieval: 1\ntasks: [passkey]\ndepths: [0, 0.5]\nlongppl: none\nshort-length: 8\nalpha: 1\nbeta: -2.5\n"
    )
    result = compare(tmp_path / "out", methods="none", documents=1, config=file)
    assert result.exit_code == 0, result.output
    results = Results.load_json(tmp_path / "out" / "results.json")
    assert {row["depth"] for row in results.retrieval} == {0.0, 0.5}
    criterion = results.provenance["longppl"]
    assert (criterion["evaluator"], criterion["alpha"], criterion["beta"]) == ("none", 1, -2.5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"depths": "0,half"}, "got --depths 0,half. Pass --depths 0,0.5,1"),
        ({"tasks": "poetry"}, "Expected --tasks to be some of passkey, multi-key"),
        ({"tasks": "passkey,multi-key"}, "for a prompt of the task 'multi-key', got"),
        ({"longppl": "ntk"}, "one method (none, linear x2, yarn x2), got 'ntk', which none of them have"),
        ({"longppl": "./no/such"}, "got ./no/such: no such folder"),
        ({"longppl": None}, "Expected --longppl with --beta -3.0, got none"),
        ({"beta": 3}, "finite and beta below 0, in nats, got 2.0 and 3.0"),
        ({"short_length": 126}, "their sum below 128 tokens, got 126 and 31"),
        ({"retrieval": None}, "with --tasks passkey, got 0"),
    ],
)
def test_bad_input_is_one_line(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in error_of(compare(tmp_path / "out", documents=1, **{**ASKED, **changed}))
    assert not (tmp_path / "out").exists()
    assert "retrieval" not in OPTIONS
