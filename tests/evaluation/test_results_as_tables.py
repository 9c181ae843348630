"""results.json in the tools that people have: pandas and `datasets`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest

from hf_posext.evaluation import Results

from ..reporting.helpers import make_results


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With what is not there in some rows and with nothing at all in others, LongPPL and retrieval beside."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    results = make_results()
    for row in results.rows:
        row |= {"longppl": None, "longppl_ci95": None, "longppl_truncated": None, "key_tokens": None}
    results.rows[-1] |= {"longppl": 5.25, "longppl_ci95": [4.5, 6.0], "longppl_truncated": 6.5, "key_tokens": 17}
    results.rows[0] |= {"gain": None, "gain_ci95": None, "perplexity": float("inf")}
    place = {"method": "yarn", "factor": 8.0, "length": 512, "trials": 4}
    results.retrieval = [
        {**place, "task": "passkey", "depth": 0.5, "accuracy": 1.0},
        {**place, "task": "common-words", "depth": None, "accuracy": None},
    ]
    return results.save_json(tmp_path / "results.json")


def rounded(value: Any) -> Any:
    """As `datasets` reads numbers from a field of a JSON file: to ten decimals."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 10) if isinstance(value, float) else value


@pytest.mark.parametrize("field", ["rows", "per_document", "retrieval", "short_context"])
def test_results_json_opens_as_a_data_set(path: Path, field: str) -> None:
    table = datasets.load_dataset("json", data_files=str(path), field=field, split="train")
    written = json.loads(path.read_text())[field]
    assert rounded(table.to_list()) == rounded(written) and len(written) > 1
    assert table.column_names == list(written[0])


def test_results_json_opens_as_a_frame(path: Path) -> None:
    frame = Results.load_json(path).to_frame()
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    assert len(frame) == len(rows) and list(frame["method"]) == [row["method"] for row in rows]
    assert frame["gain_ci95_low"].isna().tolist() == [row["gain_ci95"] is None for row in rows]
    last = frame.iloc[-1]
    assert (last["longppl"], last["longppl_ci95_low"], last["longppl_ci95_high"]) == (5.25, 4.5, 6.0)
    plain = pandas.DataFrame(rows)
    assert plain["perplexity"].tolist()[1:] == frame["perplexity"].tolist()[1:]
    assert plain.loc[len(rows) - 1, "longppl_ci95"] == [4.5, 6.0]
    assert pandas.isna(frame["perplexity"][0]), "an infinity is nothing in JSON"


def test_a_frame_goes_into_a_data_set_and_back(path: Path) -> None:
    frame = Results.load_json(path).to_frame()
    table = datasets.Dataset.from_pandas(frame, preserve_index=False)
    pandas.testing.assert_frame_equal(table.to_pandas(), frame, check_dtype=False)
