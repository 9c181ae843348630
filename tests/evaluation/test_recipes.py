"""Data recipes, on local folders of the layout that the repositories have: the tests reach no Hub."""

from __future__ import annotations

import gzip
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from hf_posext.errors import DocumentError
from hf_posext.evaluation import RECIPES, Document, load_documents

LONG, SHORT = "Long ago, " * 30_000, "Short. "
COLUMNS = {
    "pg19": {"short_book_title": "Emma", "publication_date": 1815, "url": "http://www.gutenberg.org/ebooks/158"},
    "govreport": {"summary": "In brief."},
    "arxiv": {"abstract": "We show."},
    "booksum": {"bid": 158, "title": "Emma", "summary": [{"source": "novelguide", "text": "In brief."}]},
}
"""The other columns of a row, as the cards of the repositories list them."""

LAYOUTS = {
    "pg19": "data/{split}-00000-of-00001.parquet",
    "govreport": "document/{split}-00000-of-00001.parquet",
    "arxiv": "document/{split}-00000-of-00001.parquet",
    "booksum": "books/{split}.jsonl",
}
CARD = """---
configs:
- config_name: {config}
  data_files:
  - {{split: test, path: "{test}"}}
  - {{split: validation, path: "{validation}"}}
- config_name: section
  data_files:
  - {{split: test, path: "nothing/here-*"}}
---
"""


def make_repository(name: str, folder: Path) -> None:
    """A copy of a repository, with three documents in `test` and one in `validation`."""
    recipe = RECIPES[name]
    texts = {"test": [LONG + "0", SHORT, LONG + "2"], "validation": [LONG + "v"]}
    if recipe.files is not None:
        metas: list[Any] = [{"config": "arxiv", "file": "a.tex"}, {"set_name": "MATH", "config": 3}, "one more kind"]
        for split, path in recipe.files.items():
            (folder / path).parent.mkdir(parents=True)
            with gzip.open(folder / path, "wt", encoding="utf-8") as file:
                for text, meta in zip(texts[split], metas, strict=False):
                    file.write(json.dumps({"meta": meta, "text": text}) + "\n")
        return
    files = {split: LAYOUTS[name].format(split=split) for split in texts}
    for split, path in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        rows = datasets.Dataset.from_list([{**COLUMNS[name], recipe.text_column: text} for text in texts[split]])
        if path.endswith(".parquet"):
            rows.to_parquet(folder / path)
        else:
            rows.to_json(folder / path)
    (folder / "README.md").write_text(CARD.format(config=recipe.config or "default", **files), encoding="utf-8")


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(params=RECIPES)
def name(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe whose repository is a local copy."""
    copy = tmp_path / "copy"
    copy.mkdir()
    make_repository(request.param, copy)
    monkeypatch.setitem(RECIPES, request.param, replace(RECIPES[request.param], path=str(copy)))
    return str(request.param)


def test_every_recipe_reads_its_layout(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    documents = load_documents(name)
    expected = [Document("0", LONG + "0"), Document("1", SHORT), Document("2", LONG + "2")]
    assert documents == [document for document in expected if len(document.text) >= recipe.minimum_characters]
    assert len(documents) == 2 + (recipe.minimum_characters == 0)
    assert documents.source == {
        "dataset": recipe.path,
        "split": "test",
        "revision": recipe.revision,
        "text_column": recipe.text_column,
        "recipe": name,
        "config": recipe.config,
        "minimum_characters": recipe.minimum_characters,
    }
    assert not list((tmp_path / "cache").rglob("*.arrow")), "streamed, not copied"


def test_what_is_asked_for_goes_before_the_recipe(name: str) -> None:
    assert [document.text for document in load_documents(name, split="validation")] == [LONG + "v"]
    assert len(load_documents(name, minimum_characters=0)) == 3
    with pytest.raises(DocumentError, match="Expected documents of 999,999 characters or more"):
        load_documents(name, minimum_characters=999_999)
    with pytest.raises(DocumentError, match="Expected text_column to be one of .* got 'body'"):
        load_documents(name, text_column="body")
    with pytest.raises(DocumentError, match=r"got 'dev'|[Uu]nknown split|can be read") as error:
        load_documents(name, split="dev")
    assert "\n" not in str(error.value)


def test_limit_counts_what_is_long_enough(name: str) -> None:
    documents = load_documents(name, limit=2, minimum_characters=100)
    assert [document.text[-1] for document in documents] == ["0", "2"]
    assert [document.text[-1] for document in load_documents(name, limit=1, minimum_characters=100)] == ["0"]


def test_no_more_is_read_than_the_limit_needs(name: str) -> None:
    """The rest cannot be read, as is seen where it is asked for."""
    copy = Path(RECIPES[name].path)
    files = RECIPES[name].files
    if files is not None:
        with gzip.open(copy / files["test"], "at", encoding="utf-8") as file:
            file.write("torn\n")
    else:
        first = copy / LAYOUTS[name].format(split="test")
        last = first.with_name(first.name.replace("test", "test-last"))
        last.write_bytes(b"torn\n")
        card = (copy / "README.md").read_text(encoding="utf-8")
        paths = f"[{first.relative_to(copy)}, {last.relative_to(copy)}]"
        (copy / "README.md").write_text(card.replace(f'"{first.relative_to(copy)}"', paths), encoding="utf-8")
    documents = load_documents(name, limit=2, minimum_characters=100)
    assert [document.text[-1] for document in documents] == ["0", "2"]
    with pytest.raises(DocumentError, match="can be read|Expected JSON in line"):
        load_documents(name, limit=3, minimum_characters=100)


def test_not_streamed_it_is_kept_in_the_cache_of_datasets(name: str, tmp_path: Path) -> None:
    assert load_documents(replace(RECIPES[name], streaming=False)) == load_documents(name)
    assert list((tmp_path / "cache").rglob("*.arrow"))


def test_the_minimum_length_is_for_every_source() -> None:
    documents = load_documents(["one", "three", "four"], minimum_characters=4, limit=1)
    assert documents == [Document("1", "three")]
    assert documents.source["minimum_characters"] == 4
    with pytest.raises(DocumentError, match="minimum_characters to be 0 or more, got -1"):
        load_documents(["one"], minimum_characters=-1)


def test_a_name_means_the_recipe_and_a_path_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    make_repository("pg19", copy)
    monkeypatch.setitem(RECIPES, "pg19", replace(RECIPES["pg19"], path=str(copy)))
    (tmp_path / "pg19").mkdir()
    (tmp_path / "pg19" / "own.txt").write_text("A file of my own.", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING, logger="hf_posext"):
        assert len(load_documents("pg19")) == 3
    assert "write ./pg19" in caplog.text
    caplog.clear()
    for path in ("./pg19", Path("pg19")):
        assert load_documents(path) == [Document("own.txt", "A file of my own.")]
    assert not caplog.records


def test_the_hub_is_asked_for_the_pinned_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    request: dict[str, Any] = {}

    def load_dataset(**kwargs: Any) -> Any:
        request.update(kwargs)
        return [{"report": LONG, "text": json.dumps({"text": LONG})}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_documents("govreport")
    assert request == {
        "path": "ccdv/govreport-summarization",
        "name": "document",
        "split": "test",
        "revision": "4e21184e01ae8017e2c036e180fe5e541fef60a0",
        "streaming": True,
    }
    request.clear()
    load_documents("proof-pile", split="validation", revision="abc123")
    assert request == {
        "path": "text",
        "data_files": "hf://datasets/hoskinson-center/proof-pile@abc123/dev/proofpile_dev.jsonl.gz",
        "split": "train",
        "streaming": True,
    }


def test_each_says_where_it_is_from_and_under_which_licence() -> None:
    assert list(RECIPES) == ["pg19", "proof-pile", "govreport", "arxiv", "booksum"]
    for name, recipe in RECIPES.items():
        assert recipe.name == name
        assert recipe.homepage.startswith("https://")
        assert recipe.licence
