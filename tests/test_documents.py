"""Documents from every source, through the real `load_dataset`, on local files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from hf_posext.errors import DocumentError
from hf_posext.evaluation import Document, load_documents

ROWS = [{"id": "emma", "text": "Emma Woodhouse,\nhandsome"}, {"id": "anne", "text": "Sir Walter Elliot, caf\u00e9"}]
EXPECTED = [Document("emma", ROWS[0]["text"]), Document("anne", ROWS[1]["text"])]


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    table = datasets.Dataset.from_list(rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_files(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"novels{suffix}")
    documents = load_documents(path)
    assert documents == EXPECTED
    assert documents.source == {"dataset": str(path), "split": None, "revision": None, "text_column": "text"}
    assert load_documents(str(path), limit=1) == EXPECTED[:1]
    assert not list((tmp_path / "cache").rglob("*.arrow")), "streamed, not copied"


def test_text_files(tmp_path: Path) -> None:
    for row in ROWS:
        (tmp_path / f"{row['id']}.txt").write_text(row["text"], encoding="utf-8")
    (tmp_path / "notes.md").write_text("no novel")
    expected = [Document("anne.txt", ROWS[1]["text"]), Document("emma.txt", ROWS[0]["text"])]
    assert load_documents(tmp_path) == expected
    assert load_documents(tmp_path / "emma.txt") == expected[1:]


def test_strings_and_datasets() -> None:
    assert load_documents(["one", "two"]) == [Document("0", "one"), Document("1", "two")]
    table = datasets.Dataset.from_list(ROWS)
    assert load_documents(table) == EXPECTED
    assert load_documents(table.to_iterable_dataset(), limit=1) == EXPECTED[:1]
    assert load_documents(table.rename_column("text", "book"), text_column="book") == EXPECTED


def test_a_data_set_folder_goes_through_load_dataset(tmp_path: Path) -> None:
    """The same code as for a Hub id: builder found by the files, splits, streaming."""
    folder = tmp_path / "novels"
    folder.mkdir()
    write(folder / "test.jsonl")
    assert load_documents(folder) == EXPECTED
    write(folder / "train.jsonl", ROWS[:1])
    assert load_documents(folder, split="train") == EXPECTED[:1]
    assert load_documents(folder, split="test").source["split"] == "test"
    with pytest.raises(DocumentError, match="has the splits .*; choose one, as split='"):
        load_documents(folder)
    with pytest.raises(DocumentError, match="cannot read .*validation"):
        load_documents(folder, split="validation")


def test_a_hub_id_is_asked_for_with_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    documents = load_documents("emozilla/pg19", split="test", revision="abc123")
    assert documents == EXPECTED
    assert asked == [(("emozilla/pg19",), {"streaming": True, "split": "test", "revision": "abc123"})]
    assert documents.source["revision"] == "abc123"


def test_ids_that_repeat_are_numbered(caplog: pytest.LogCaptureFixture) -> None:
    documents = load_documents(datasets.Dataset.from_list([ROWS[0], ROWS[0]]))
    assert [document.id for document in documents] == ["0-emma", "1-emma"]
    assert "ids repeat" in caplog.text


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ([], {}, "list has no documents"),
        (datasets.Dataset.from_dict({"text": []}), {}, "Dataset has no documents"),
        (datasets.Dataset.from_list(ROWS), {"text_column": "body"}, "no column 'body'; it has id, text"),
        (["fine", None], {}, "document '1' of list is NoneType, not text"),
        (["fine"], {"limit": 0}, "limit is 0"),
        ("missing/folder/of/novels", {}, "no such path: missing/folder/of/novels"),
        ("missing.jsonl", {}, "no such path: missing.jsonl"),
        ("nobody/nothing", {}, "cannot read nobody/nothing"),  # a Hub id, and the tests are offline
    ],
)
def test_bad_sources_are_one_clear_line(source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DocumentError, match=message) as error:
        load_documents(source, **options)
    assert "\n" not in str(error.value)


def test_bad_files_are_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "novels.docx").write_bytes(b"\x00")
    with pytest.raises(DocumentError, match="ends in '.docx'; give a file of .txt"):
        load_documents(tmp_path / "novels.docx")
    (tmp_path / "torn.jsonl").write_text('{"text": "whole"}\n{"text": "to')
    with pytest.raises(DocumentError, match="cannot read .*torn.jsonl") as error:
        load_documents(tmp_path / "torn.jsonl")
    assert "\n" not in str(error.value)
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(DocumentError, match="cannot read .*latin.txt: .*utf-8"):
        load_documents(tmp_path / "latin.txt")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DocumentError, match="cannot read .*empty"):
        load_documents(empty)
