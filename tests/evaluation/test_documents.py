"""Documents from every source, through the real `load_dataset`, on local files."""

from __future__ import annotations

import bz2
import csv
import errno
import gzip
import io
import json
import lzma
import os
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest

from hf_posext.errors import DocumentError
from hf_posext.evaluation import Document, load_documents
from hf_posext.packages import hub_obstacle

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
    assert load_documents(str(path), limit=10**30) == EXPECTED  # past what itertools counts
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
    with pytest.raises(DocumentError, match="Expected split to be one of .* got None. Pass split='"):
        load_documents(folder)
    with pytest.raises(DocumentError, match="Expected split to be one of train, test of .* got 'validation'"):
        load_documents(folder, split="validation")


def test_a_hub_id_is_asked_for_with_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    documents = load_documents("emozilla/pg19", split="test", revision="abc123")
    assert documents == EXPECTED
    assert calls == [(("emozilla/pg19",), {"streaming": True, "split": "test", "revision": "abc123"})]
    assert documents.source["revision"] == "abc123"


def test_ids_that_repeat_are_numbered(caplog: pytest.LogCaptureFixture) -> None:
    documents = load_documents(datasets.Dataset.from_list([ROWS[0], ROWS[0]]))
    assert [document.id for document in documents] == ["0-emma", "1-emma"]
    assert "ids repeat" in caplog.text


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ([], {}, "Expected documents in list, got none"),
        (datasets.Dataset.from_dict({"text": []}), {}, "Expected documents in Dataset, got none"),
        (datasets.Dataset.from_list(ROWS), {"text_column": "body"}, "one of id, text in Dataset, got 'body'"),
        (["fine", None], {}, "Expected text in document '1' of list, got NoneType"),
        (["fine"], {"limit": 0}, "limit to be 1 or more, got 0"),
        ("", {}, "Expected a path, got ''. Pass a file, a folder such as '.'"),
        ("missing/folder/of/novels", {}, "got missing/folder/of/novels: no such path"),
        ("missing.jsonl", {}, "got missing.jsonl: no such path"),
        ("nobody/nothing", {}, "got nobody/nothing: "),  # a Hub id, and the tests are offline
    ],
)
def test_bad_sources_are_one_clear_line(source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DocumentError, match=message) as error:
        load_documents(source, **options)
    assert "\n" not in str(error.value)


def test_bad_files_are_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "novels.docx").write_bytes(b"\x00")
    with pytest.raises(DocumentError, match="Expected a file of .txt.*, got .*.docx"):
        load_documents(tmp_path / "novels.docx")
    (tmp_path / "torn.jsonl").write_text('{"text": "whole"}\n{"text": "to')
    with pytest.raises(DocumentError, match="JSON in line .* of .*torn.jsonl") as error:
        load_documents(tmp_path / "torn.jsonl")
    assert "\n" not in str(error.value)
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(DocumentError, match="got .*latin.txt: .*utf-8.*. Save it as UTF-8"):
        load_documents(tmp_path / "latin.txt")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DocumentError, match="Expected documents in .*empty, got none. Pass a folder"):
        load_documents(empty)


# What lies in a folder


def lay(folder: Path, *files: str) -> Path:
    """Files in a folder; each text tells its path, a JSON line if the file is of such."""
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) + "\n" if ".json" in name.lower() else name)
    return folder


def test_text_files_in_folders_are_one_document_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = lay(tmp_path, "a.txt", "haggard/Mines.TXT", "stevenson/b/Catriona.txt", "README.md", ".hidden/c.txt")
    documents = load_documents(folder)
    assert [document.id for document in documents] == ["a.txt", "haggard/Mines.TXT", "stevenson/b/Catriona.txt"]
    assert all(document.id == document.text for document in documents)
    assert documents.source["files"] == 3 and documents.source["files_left"] == ["README.md"]
    assert f"3 files of {folder} are read, not README.md" in caplog.text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ("novels.jsonl", "LICENSE.txt"),
            r"got several \(text: LICENSE.txt; JSON: novels.jsonl\). Pass one of them",
        ),
        (("a.csv", "sub/b.parquet"), r"got several \(CSV: a.csv; parquet: sub/b.parquet\)"),
        (("a.txt", "b.TXT", "c/d.txt", "e/f.txt", "g.tsv"), r"text: a.txt, b.TXT, c/d.txt and 1 more; TSV: g.tsv"),
        (("novels.jsonl", "test.jsonl"), "got the splits test and besides novels.jsonl"),
        (("notes.md", "sub/paper.pdf"), "got notes.md, sub/paper.pdf. Pass a folder"),
    ],
)
def test_folders_of_which_a_part_would_be_read_are_refused(tmp_path: Path, files: Any, message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        load_documents(lay(tmp_path, *files))


def test_rows_in_folders_are_read_from_all_files(tmp_path: Path) -> None:
    folder = lay(tmp_path, "part-1.jsonl", "more/part-2.JSONL", "README.md")
    assert [(document.id, document.text) for document in load_documents(folder)] == [
        ("more/part-2.JSONL:0", "more/part-2.JSONL"),
        ("part-1.jsonl:0", "part-1.jsonl"),
    ]


@pytest.mark.parametrize("ending", [".gz", ".xz", ".bz2", ".GZ"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".txt"])
def test_compressed_files_are_read_alone_and_in_folders(tmp_path: Path, suffix: str, ending: str) -> None:
    if suffix == ".txt":
        plain, expected = "Emma Woodhouse,\nhandsome", ["Emma Woodhouse,\nhandsome"]
    else:
        expected = [str(row["text"]) for row in ROWS]
        if suffix in (".csv", ".tsv"):
            table = io.StringIO()
            writer = csv.DictWriter(table, ["id", "text"], delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
            plain = table.getvalue()
        else:
            plain = json.dumps(ROWS) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in ROWS)
    compress = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}[ending.lower()]
    (tmp_path / f"novels{suffix.upper()}{ending}").write_bytes(compress(plain.encode()))
    for source in (tmp_path, tmp_path / f"novels{suffix.upper()}{ending}"):
        assert [document.text for document in load_documents(source)] == expected


def test_data_sets_that_were_saved_to_disk_are_read(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    splits = datasets.DatasetDict({"train": table, "test": table.select([1])})
    splits.save_to_disk(tmp_path / "both")
    assert load_documents(tmp_path / "one") == EXPECTED
    for source in (tmp_path / "both", splits):
        assert load_documents(source, split="test") == EXPECTED[1:]
        with pytest.raises(DocumentError, match="one of train, test of .* got None. Pass split='train'"):
            load_documents(source)
        with pytest.raises(DocumentError, match="Expected split to be one of train, test of .* got 'dev'"):
            load_documents(source, split="dev")


@pytest.mark.parametrize("name", ["text", "json", "csv", "parquet", "pandas"])
def test_names_of_readers_do_not_read_the_working_directory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lay(tmp_path, "secret.json", "x.txt"))
    with pytest.raises(DocumentError, match=f"got '{name}', the name of a reader of files in datasets"):
        load_documents(name)


def test_tables_and_columns_are_rows(tmp_path: Path) -> None:
    frame = datasets.Dataset.from_list(ROWS).to_pandas()
    for source in (frame, {"id": ["emma", "anne"], "text": [row["text"] for row in ROWS]}, ROWS, list(EXPECTED)):
        assert load_documents(source) == EXPECTED
    assert load_documents(datasets.Dataset.from_list(ROWS).data.table) == EXPECTED


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"text": "one"}, "Expected lists of one length in dict, got {'text': str}"),
        ({"text": ["a", "b"], "id": ["c"]}, "Expected lists of one length in dict"),
        (b"bytes", "Expected texts, got bytes. Pass a path, a list of texts"),
        (3, "Expected texts, got int"),
    ],
)
def test_objects_that_are_no_texts_are_refused_by_what_they_are(source: Any, message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        load_documents(source)


# Rows


def test_texts_of_tables_stay_as_they_are(tmp_path: Path) -> None:
    """Right values: the cells as they stand in the file."""
    path = tmp_path / "t.csv"
    path.write_bytes('\ufefftext,id\r\n007,1\r\nNA,2\r\n"a ""b"",\r\nc",\r\n1.50,x\r\n'.encode())
    documents = load_documents(path)
    assert [document.text for document in documents] == ["007", "NA", 'a "b",\r\nc', "1.50"]
    assert len({document.id for document in documents}) == 4, "the third has no id, and 2 would be another's"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "r.jsonl",
            '{"text": "a"}\n{"body": "b"}\n',
            "Expected 'text' in every row of .*r.jsonl, got body in row 2",
        ),
        ("r.jsonl", '{"body": "b"}\n', "Expected text_column to be one of body in .*r.jsonl, got 'text'"),
        ("r.jsonl", '{"text": "a"}\n3\n', "rows with columns in .*r.jsonl, got int as row 2"),
        ("r.jsonl", '{"text": "a", "text": "b"}\n', "r.jsonl: Expected unique keys in an object, got text, text"),
        ("r.json", '[{"text": "a",\n"text": "b"}]\n', "r.json: Expected unique keys in an object, got text, text"),
        ("r.csv", "id,text\n1,a\n2\n", "Expected 2 cells in row 2 of .* got 1"),
        ("r.csv", "id,text\n1,a,b\n", "Expected 2 cells in row 1 of .* got 3"),
        ("r.csv", 'id,text\n1,"open\n', "got .*r.csv"),
        ("r.jsonl", b"\xff\xfe{\x00", "codec can't decode.*. Save it as UTF-8"),
    ],
)
def test_rows_that_cannot_be_read_are_named_by_their_number(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DocumentError, match=message):
        load_documents(tmp_path / name)


def test_ids_that_are_null_are_numbers_of_rows(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"id": null, "text": "a"}\n{"id": "b", "text": "b"}\n')
    assert [document.id for document in load_documents(tmp_path / "r.jsonl")] == ["0", "b"]


def test_one_row_over_several_lines_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(ROWS[0], indent=2))
    assert load_documents(tmp_path / "r.json") == EXPECTED[:1]


def test_a_split_or_revision_that_means_nothing_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "novels.jsonl")
    with pytest.raises(DocumentError, match="split to be left out, as .* is one file, got 'test'"):
        load_documents(path, split="test")
    with pytest.raises(DocumentError, match="revision to be left out, as .* is on this machine, got 'abc'"):
        load_documents(path, revision="abc")
    for source in (["a"], datasets.Dataset.from_list(ROWS), {"text": ["a"]}, pandas.DataFrame({"text": ["a"]})):
        for option in ({"split": "test"}, {"revision": "abc"}):
            with pytest.raises(DocumentError, match=r"(split|revision) to be left out, as \w+ has none, got"):
                load_documents(source, **option)


def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text,text\n1,first,second\n")
    with pytest.raises(DocumentError, match=r"unique columns in .*a\.csv, got id, text, text\. Rename them"):
        load_documents(tmp_path / "a.csv")
    with pytest.raises(DocumentError, match=r"unique columns in DataFrame, got text, text\. Rename them"):
        load_documents(pandas.DataFrame([["first", "second"]], columns=["text", "text"]))


def test_a_row_of_a_frame_without_an_id_is_known_by_its_number() -> None:
    frame = pandas.DataFrame({"text": ["first", "second"], "id": ["a", None]}, index=[7, 3])
    assert [document.id for document in load_documents(frame)] == ["a", "1"]


# Sources that would be read in part, or as something else


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32-le", "latin-1"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv"])
def test_a_file_in_another_encoding_is_refused(tmp_path: Path, suffix: str, encoding: str) -> None:
    """ASCII text in UTF-16 without a byte order mark is valid UTF-8, of which every other character is NUL."""
    text = "caf\u00e9" if encoding == "latin-1" else "cafe"
    content = {".txt": text * 9, ".jsonl": f'{{"text": "{text}"}}', ".json": f'["{text}"]', ".csv": f"text\n{text}\n"}
    (tmp_path / f"a{suffix}").write_bytes(content[suffix].encode(encoding))
    with pytest.raises(DocumentError, match=r"UTF-8|got 'text'|Expected JSON|that can be read") as error:
        load_documents(tmp_path / f"a{suffix}")
    assert "\n" not in str(error.value)


def test_a_split_that_no_file_name_defines_is_refused(tmp_path: Path) -> None:
    folder = lay(tmp_path, "part-1.jsonl", "part-2.jsonl")
    assert load_documents(folder, split="train") == load_documents(folder), "as datasets calls files without a split"
    with pytest.raises(DocumentError, match="Expected split to be one of train of .* got 'test'"):
        load_documents(folder, split="test")


def test_a_readme_with_several_configurations_is_not_ignored(tmp_path: Path) -> None:
    folder = lay(tmp_path, "en.jsonl", "de.jsonl")
    configs = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in ("en", "de")]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    with pytest.raises(DocumentError, match="Config name is missing|config") as error:
        load_documents(folder)
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = lay(tmp_path, "a.txt", "locked/b.txt")
    scandir = os.scandir

    def refuse(path: Any) -> Any:  # as for another user's folder; the tests may run as root
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DocumentError, match="can be read, got .*Permission denied"):
        load_documents(folder)


def test_links_and_pipes_of_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, elsewhere = lay(tmp_path / "novels", "a.txt"), lay(tmp_path / "elsewhere", "b.txt")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "circle").symlink_to(folder)
    (folder / "c.txt").symlink_to(elsewhere / "b.txt")
    os.mkfifo(folder / "pipe.txt")
    assert [document.id for document in load_documents(folder)] == ["a.txt", "c.txt"]
    assert "are read, not circle, linked, pipe.txt" in caplog.text
    (folder / "broken.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(DocumentError, match="can be read, got .*No such file"):
        load_documents(folder)
    with pytest.raises(DocumentError, match="got .*pipe.txt, which is neither"):
        load_documents(folder / "pipe.txt")


def test_texts_without_an_order_are_refused() -> None:
    """Their ids are their places, which would differ between processes."""
    for texts in ({"one", "two"}, frozenset({"one"})):
        with pytest.raises(DocumentError, match="Expected texts, got (set|frozenset)"):
            load_documents(texts)


def test_files_that_are_not_what_their_names_say(tmp_path: Path) -> None:
    for name in ("a.txt.gz", "a.jsonl.gz", "a.parquet", "a.arrow", "a.txt.xz"):
        (tmp_path / name).write_bytes(b"plain text")
        with pytest.raises(DocumentError, match=f"can be read, got .*{name}") as error:
            load_documents(tmp_path / name)
        assert "\n" not in str(error.value)
    (tmp_path / "empty.txt").touch()
    assert load_documents(tmp_path / "empty.txt") == [Document("empty.txt", "")]


def test_dictionaries_of_streams_and_rows_in_lists() -> None:
    stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    streams = datasets.IterableDatasetDict({"train": stream, "test": stream.skip(1)})
    assert load_documents(streams, split="test") == EXPECTED[1:]
    assert load_documents(stream, limit=1) == EXPECTED[:1]
    assert load_documents([ROWS[0], "plain", Document("d", "text")]) == [
        EXPECTED[0],
        Document("1", "plain"),
        Document("d", "text"),
    ]
    with pytest.raises(DocumentError, match="Expected 'text' in every row of list, got body in row 2"):
        load_documents([ROWS[0], {"body": "x"}])


def test_a_name_on_the_hub_is_refused_at_once_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's client would repeat its requests for 23 seconds, and for a model for a minute."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://localhost:9")
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("a request is repeated"))
    for name in ("novels", "org/novels", "pg19"):
        with pytest.raises(DocumentError, match=r"(novels|pg19)'.*: this machine has no such path, and .*localhost:9"):
            load_documents(name)


def test_copies_of_the_hub_need_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://localhost:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "cannot be reached" in str(hub_obstacle("org/name", "dataset"))
    (tmp_path / "datasets--org--name").mkdir()
    assert hub_obstacle("org/name", "dataset") is None and hub_obstacle("org/name", "model") is not None
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub_obstacle("org/name", "model") is None, "the libraries read their caches"
