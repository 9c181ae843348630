"""`explain`: words, JSON and a picture, with and without documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ..conftest import EXAMPLES
from .helpers import LEARNED, MODEL, NOVELS, error_of, run

ALIBI = EXAMPLES / "tiny" / "tiny-alibi"


def words(result: object) -> str:
    return " ".join(result.stdout.split())


def test_a_model_is_explained_without_documents() -> None:
    result = run("explain", LEARNED)
    assert result.exit_code == 0, result.output
    assert "trained length 511 tokens (statistics of the table" in words(result)
    assert "untrained rows 511 to 2047" in words(result)
    assert "Try table-cubic, table-group, table-hierarchical, table-linear, table-repeat" in words(result)
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_json_holds_the_tables() -> None:
    explanation = json.loads(run("explain", MODEL, "--json").stdout)
    assert explanation["critical_dimension"] == 32 and len(explanation["tables"]["frequencies"]) == 32
    assert [
        explanation["generalization"] for explanation in json.loads(run("explain", MODEL, ALIBI, "--json").stdout)
    ] == [
        "interpolation",
        "extrapolation",
    ]


def test_documents_and_a_method_are_read_and_drawn(tmp_path: Path) -> None:
    text = json.loads(NOVELS.read_text(encoding="utf-8").splitlines()[0])["text"][8000:13_000]
    (tmp_path / "novel.txt").write_text(text, encoding="utf-8")
    picture = tmp_path / "pictures" / "found.png"
    options = ["--dataset", tmp_path / "novel.txt", "--methods", "yarn", "--target-length", "900", "--plot", picture]
    result = run("explain", MODEL, *options)
    assert result.exit_code == 0, result.output
    assert "loss departs token" in words(result) and "unseen phases as it is 16" in words(result)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_too_little_text_does_not_depart_nowhere() -> None:
    """Past the trained length, 128 tokens of one novel are too few to tell."""
    result = run("explain", MODEL, "--dataset", NOVELS, "--documents", 1, "--target-length", 640)
    assert result.exit_code == 0, result.output
    assert "loss departs nowhere in the first 512 tokens" in words(result)


def test_several_models_take_the_methods_that_apply(tmp_path: Path) -> None:
    options = ["--methods", "yarn,table-linear", "--trained-length", "512", "--plot", tmp_path / "all.png"]
    result = run("explain", MODEL, LEARNED, ALIBI, *options)
    assert result.exit_code == 0, result.output
    assert words(result).count("positions ") >= 3 and (tmp_path / "all.png").stat().st_size > 50_000


def test_ten_million_tokens_are_drawn_where_a_picture_can_show_them(tmp_path: Path) -> None:
    options = ["--target-length", "10000000", "--plot", tmp_path / "far.png"]
    for model in (MODEL, LEARNED):
        result = run("explain", model, *options)
        assert result.exit_code == 0 and "target length 10000000 tokens" in words(result), result.output
    two_models = run("explain", MODEL, LEARNED, *options)
    assert two_models.exit_code == 2 and words(two_models).count("target length 10000000 tokens") == 2, (
        "what was found is told"
    )
    assert "Expected a picture that shows a wave of the 511 tokens of training" in two_models.stderr
    assert "Pass --target-length 16352" in two_models.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["./no/such/model"], "no such folder"),
        ([MODEL, "--methods", "yarm"], "did you mean 'yarn'"),
        ([MODEL, "--methods", "table-linear"], "table-linear extends learned positions"),
        ([MODEL, "--plot", "found.pdf"], "Expected the name of a PNG, got found.pdf. Pass --plot found.png."),
        ([MODEL, "--trained-length", "0"], "Expected --trained-length to be a whole number of 1 or more, got '0'"),
        ([MODEL, "--dataset", "no.jsonl"], "no such path"),
        ([], "Expected MODEL, got none. Pass MODEL: Folders or Hub ids; their weights are read."),
    ],
)
def test_wrong_input_is_one_line(options: list[object], message: str) -> None:
    assert message in error_of(run("explain", *options))


@pytest.mark.parametrize("with_texts", [False, True])
def test_a_model_with_a_patch_is_refused_and_the_base_named(with_texts: bool, patched: Path, adapter: Path) -> None:
    options = ["--dataset", NOVELS, "--documents", "1"] if with_texts else []
    message = error_of(run("explain", patched, *options))
    assert f"{patched} was saved with a patch (rerope(window=32): 64 -> 128 tokens (x2)" in message
    assert "Either show its plan with hf-posext inspect, or pass the model that it was made from" in message
    message = error_of(run("explain", MODEL, adapter, *options))
    assert f"{adapter} was saved with a patch (yarn: 64 -> 128" in message and message.endswith(f"from, {MODEL}.")
