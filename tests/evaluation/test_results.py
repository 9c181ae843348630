"""Results to and from files."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import pandas
import pytest

from hf_posext.errors import EvaluationError, InvalidParameterError
from hf_posext.evaluation import Results
from hf_posext.evaluation.results import ROW_KEYS
from hf_posext.reporting import describe_methods, write_report

from ..reporting.helpers import make_results
from .helpers import DOCUMENT_KEYS


def a_row(method: str = "yarn", length: int = 512, factor: float = 8.0, **columns: Any) -> dict[str, Any]:
    row = dict.fromkeys(ROW_KEYS)
    return {
        **row,
        "method": method,
        "protocol": "prefix",
        "bos": "none",
        "dtype": "float32",
        "length": length,
        "tokens": 511,
        "documents": 1,
        "factor": factor,
        "perplexity": 40.5,
        "ci95": [38.0, 43.0],
        **columns,
    }


def some_results() -> Results:
    rows = [a_row("none", factor=1.0, gain=1.0), a_row(passkey=0.9, passkey_trials=10), a_row(factor=16.0)]
    record = dict(
        zip(DOCUMENT_KEYS, ["Emma", "none", 1.0, 512, 1, 10.5, 5, 21, 4.5, 2, None, None, [0.5] * 16], strict=True)
    )
    return Results({"model": "tiny", "versions": {"python": "3.11"}}, rows, [record])


def torn(part: str, **values: Any) -> str:
    """Results as a file would hold them, with some values of a row, a document or the provenance changed."""
    data = some_results().to_dict()
    (data[part] if part == "provenance" else data[part][0]).update(values)
    return json.dumps(data)


def test_json_round_trip(tmp_path: Path) -> None:
    results = some_results()
    path = results.save_json(tmp_path / "results.json")
    assert Results.load_json(path) == results
    assert json.loads(path.read_text())["schema"] == 2
    assert os.listdir(tmp_path) == ["results.json"]


def test_numbers_that_json_does_not_have_become_null(tmp_path: Path) -> None:
    results = some_results()
    results.rows[0] |= {"perplexity": math.inf, "ci95": [math.nan, 1.0]}
    text = results.save_json(tmp_path / "results.json").read_text()
    assert "Infinity" not in text and "NaN" not in text
    row = Results.load_json(tmp_path / "results.json").rows[0]
    assert row["perplexity"] is None and row["ci95"] == [None, 1.0]


def test_the_old_file_stays_whole_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = some_results()
    path = results.save_json(tmp_path / "results.json")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        Results().save_json(path)
    assert Results.load_json(path) == results
    assert os.listdir(tmp_path) == ["results.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 2, "rows": [', "as JSON"),
        ("[]", "Expected results of hf_posext, .*. Pass a results.json"),
        ("[" * 100_000, "as JSON"),
        ('{"schema": 1}', "Expected results of schema 2, got 1. Upgrade hf_posext, or measure again"),
        ('{"schema": 2, "provenance": {}, "rows": []}', r"none of \['per_document'\]"),
        ('{"schema": 2, "provenance": [], "rows": [], "per_document": []}', "provenance"),
        ('{"schema": 2, "provenance": {}, "rows": {}, "per_document": []}', "the results to be a list, got dict"),
        (
            '{"schema": 2, "provenance": {}, "rows": [3], "per_document": []}',
            r"Expected rows\.0 to be an object of Row, got 3",
        ),
        (
            '{"schema": 2, "provenance": {}, "rows": [{"method": "x"}], "per_document": []}',
            r"rows\.0 lacks \['bits_per_byte'",
        ),
        (torn("rows", length="512"), r"Expected rows\.0\.length to be a whole number, got '512'"),
        (torn("rows", length=10**30), r"rows\.0\.length to be a whole number, got 10000000000000.* Pass at most"),
        (torn("rows", length=-512), r"rows\.0\.length to be 0 or more, got -512"),
        (torn("rows", length=True), r"rows\.0\.length to be a whole number, got True"),
        (torn("rows", method=None), r"rows\.0\.method to be text, got None"),
        (torn("rows", dtype=None), r"rows\.0\.dtype to be text, got None"),
        (torn("rows", bits_per_byte="2"), r"rows\.0\.bits_per_byte to be a number, got '2'"),
        (torn("per_document", groups=1.5), r"per_document\.0\.groups to be a whole number, got 1.5"),
        (torn("rows", gain="high"), r"rows\.0\.gain to be a number, got 'high'"),
        (torn("rows", gain_ci95=[1.0]), r"2 numbers in rows\.0\.gain_ci95, got \[1.0\]"),
        (torn("rows", ci95=0.5), r"rows\.0\.ci95 to be a list, got 0.5"),
        (torn("per_document", position_nll_sums=[1.0]), r"16 numbers in per_document\.0\.position_nll_sums"),
        (torn("provenance", trained_length="512"), "trained_length of the provenance to be int, got 512"),
        (torn("provenance", not_applicable=["yarn"]), r"not_applicable of the provenance to be dict, got \['yarn'\]"),
    ],
)
def test_corrupt_files_are_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=message) as error:
        Results.load_json(path)
    assert "results.json" in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EvaluationError, match=r"as JSON in .*results\.json"):
        Results.load_json(tmp_path / "results.json")


def test_what_happens_inside_the_trained_length_is_told_first(tmp_path: Path) -> None:
    changes = {"change": 0.095, "change_ci95": [0.09, 0.101]}
    rows = [a_row("none", factor=1.0), a_row(length=256, **changes), a_row(**changes), a_row(length=1024, **changes)]
    results = Results({"trained_length": 600}, rows)
    (change,) = results.short_context()
    assert change == {"method": "yarn", "factor": 8.0, "length": 512, **changes}
    written = json.loads(results.save_json(tmp_path / "results.json").read_text())
    assert written["short_context"] == [change] and list(written).index("short_context") < list(written).index("rows")
    assert Results.load_json(tmp_path / "results.json") == results
    assert Results({}, rows).short_context() == [] == Results({"trained_length": 100}, rows).short_context()


def test_an_unknown_key_is_refused() -> None:
    data = some_results().to_dict()
    data["rows"][0]["colour"] = "red"
    with pytest.raises(EvaluationError, match=r"unknown \['colour'\]"):
        Results.from_dict(data)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="No such file"):
        Results.load_json(tmp_path / "nothing.json")


def test_csv_and_frame_have_an_interval_in_two_columns(tmp_path: Path) -> None:
    results = some_results()
    frame = results.to_frame()
    table = pandas.read_csv(results.save_csv(tmp_path / "results.csv"))
    assert list(table.columns) == list(frame.columns)
    assert table["ci95_low"].tolist() == [38.0] * 3 and table["ci95_high"].tolist() == [43.0] * 3
    assert table["gain_ci95_low"].isna().all()
    assert table["passkey"].tolist()[1] == 0.9
    assert Results().save_csv(tmp_path / "empty.csv").read_text().startswith("method,factor")


def test_row_is_found_or_the_choice_named() -> None:
    results = some_results()
    assert results.row("none", 512) is results.rows[0]
    assert results.row("yarn", 512, factor=16) is results.rows[2]
    with pytest.raises(
        InvalidParameterError, match="row of 'yarn' at 512 .*, got 2. .*yarn x8 at 512, yarn x16 at 512"
    ):
        results.row("yarn", 512)
    with pytest.raises(InvalidParameterError, match="one row of 'ntk' at 512 .*, got 0. .*none x1 at 512"):
        results.row("ntk", 512)


def test_records_are_dictionaries_with_attributes(tmp_path: Path) -> None:
    results = Results.load_json(some_results().save_json(tmp_path / "results.json"))
    row, record = results.rows[1], results.per_document[0]
    assert (row.method, row.factor, row.perplexity, row.passkey) == ("yarn", 8.0, 40.5, 0.9)
    assert row.perplexity == row["perplexity"] and {**row} == row and list(row)[0] == "method"
    assert results.rows[0].passkey is None and "passkey" not in results.rows[0], "a key that is not always there"
    assert (record.document, record.tail_tokens, record.key_tokens) == ("Emma", 2, None)
    with pytest.raises(AttributeError, match="Row has no 'perplexty'"):
        _ = row.perplexty
    assert type(copy.deepcopy(row)) is type(pickle.loads(pickle.dumps(row))) is type(row)
    assert results.row("yarn", 512, 8.0).gain is row.gain


def test_verbs_of_results(tmp_path: Path) -> None:
    results = make_results()
    assert Results.load_json(results.save(tmp_path / "all.json")) == Results.from_dict(results.to_dict())
    assert results.save(tmp_path / "rows.CSV").read_text() == results.save_csv(tmp_path / "same.csv").read_text()
    with pytest.raises(InvalidParameterError, match=r"Expected a file that ends in \.json or \.csv, got .*rows\.xls"):
        results.save(tmp_path / "rows.xls")
    assert results.describe().splitlines() == describe_methods(results)
    readme = results.save_report(tmp_path / "report")
    written = write_report(results, tmp_path / "other")
    assert readme == tmp_path / "report" / "README.md" and readme.read_text() == written.read_text()
    assert sorted(os.listdir(readme.parent)) == sorted(os.listdir(written.parent))
