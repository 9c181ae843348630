"""Texts from files, folders, the Hub, and Python objects as pairs of id and text, and atomic writing.

Every reader first determines the kind of its source. It then reads all of it, or raises an error that names it. No
rule falls through to another that would mistake a line for a document, or part of a folder for all of it.
"""

from __future__ import annotations

import bz2
import csv
import errno
import gzip
import importlib
import io
import itertools
import json
import logging
import lzma
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..decode import short
from ..errors import DocumentError, first_line
from ..packages import hub_obstacle


def write_atomically(path: str | Path, data: str | bytes) -> Path:
    """Write a temporary file beside `path` and rename it. Neither a reader nor a crash sees a partial file.

    Raises:
        OSError: the file cannot be written. An existing file is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def portable(name: str) -> str:
    """Return an absolute path inside the current directory as a relative path, and any other text unchanged.

    It keeps the names of local directories out of the provenance of results where possible.
    """
    path = Path(name)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return name


logger = logging.getLogger(__name__)

Texts = Iterable[tuple[str, Any]]
"""Pairs of a document's id and its text. The caller refuses a text that is not a string."""

KINDS = {
    ".txt": "text",
    ".jsonl": "JSON",
    ".ndjson": "JSON",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "TSV",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""Kinds of files by extension, in lower case."""

OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
"""Openers of compressed files by last extension. `.zst` requires a package and is handled in `_open`."""

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")

ENDINGS = f"{', '.join(KINDS)} (all but the last two also compressed: {', '.join((*OPENERS, '.zst'))})"


def kind_of(path: Path) -> str | None:
    """Return the kind of a file by its extension, ignoring case and compression; `None` for any other file."""
    endings = [suffix.lower() for suffix in path.suffixes]
    if endings and endings[-1] in (*OPENERS, ".zst"):
        endings.pop()
    return KINDS.get(endings[-1]) if endings else None


def list_folder(folder: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """Return the document files of a folder by kind, and its other files, recursively and in path order.

    Hidden files are skipped. Metadata files of `datasets`, pipes, and linked folders count as other files.

    Raises:
        OSError: a folder inside cannot be listed.
    """
    from datasets.data_files import FILES_TO_IGNORE

    def stop(error: OSError) -> None:
        raise error

    paths: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=stop):
        hidden = [name for name in folders if name.startswith((".", "__"))]
        linked = [
            name for name in folders if Path(parent, name).is_symlink()
        ]  # not followed, as links can be circular
        folders[:] = [name for name in folders if name not in hidden]
        paths += [Path(parent, name) for name in (*linked, *names) if not name.startswith((".", "__"))]
    documents: dict[str, list[Path]] = {}
    others: list[Path] = []
    for path in sorted(paths):
        # A broken link counts as a document, whose reading then fails.
        is_file = path.is_file() or not path.exists()
        kind = kind_of(path) if is_file and path.name not in FILES_TO_IGNORE else None
        (others if kind is None else documents.setdefault(kind, [])).append(path)
    return documents, others


def from_path(
    path: Path, text_column: str, split: str | None, revision: str | None
) -> tuple[Texts, Mapping[str, Any]]:
    """Read the file or folder at a path, or a data set of the Hub.

    Returns:
        The texts, and for a folder the files read and skipped, for the provenance.

    Raises:
        DocumentError: nothing readable, files of several kinds, or a split that does not exist.
    """
    try:
        is_there = path.exists()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise DocumentError(
            f"Expected documents, got {short(path)}: no such path. Pass a list, also of one text."
        ) from None
    if is_there and revision is not None:
        raise DocumentError(
            f"Expected revision to be left out, as {path} is on this machine, got {revision!r}. Drop it."
        )
    if path.is_file():
        if split is not None:
            raise DocumentError(f"Expected split to be left out, as {path} is one file, got {split!r}. Drop it.")
        kind = kind_of(path)
        if kind is None:
            raise DocumentError(f"Expected a file of {ENDINGS}, got {path}. Pass such a file, or a folder.")
        return _from_files(kind, [path], path.parent, text_column), {}
    if path.is_dir():
        return _from_folder(path, text_column, split)
    if is_there:
        raise DocumentError(
            f"Expected a file or a folder, got {path}, which is neither. Save its content to a file of {ENDINGS}."
        )
    if kind_of(path) is not None or not HUB_ID.fullmatch(str(path)):
        raise DocumentError(
            f"Expected documents, got {short(path)}: no such path. Pass a folder, a file of {ENDINGS}, or a Hub id."
        )
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    if str(path) in _PACKAGED_DATASETS_MODULES:
        raise DocumentError(
            f"Expected a data set, got {str(path)!r}, the name of a reader of files in datasets. Pass the files: a "
            "path, or a Hub id such as org/name."
        )
    rows = _of_split(load_dataset(str(path), str(path), split=split, revision=revision), split, str(path))
    return from_rows(rows, text_column, str(path)), {}


def _from_folder(folder: Path, text_column: str, split: str | None) -> tuple[Texts, Mapping[str, Any]]:
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        import datasets

        with one_line_errors(str(folder)):
            saved = datasets.load_from_disk(str(folder))
        return from_rows(_of_split(saved, split, str(folder)), text_column, str(folder)), {"saved": "save_to_disk"}
    by_kind, others = list_folder(folder)
    if not by_kind:
        content = _names(others, folder) if others else "none"
        raise DocumentError(f"Expected documents in {folder}, got {content}. Pass a folder with files of {ENDINGS}.")
    if len(by_kind) > 1:
        kinds = "; ".join(f"{kind}: {_names(files, folder)}" for kind, files in by_kind.items())
        first = min((files[0] for files in by_kind.values()), key=lambda file: len(file.parts))
        raise DocumentError(
            f"Expected files of one kind in {folder}, got several ({kinds}). Pass one of them, as {first}, or a "
            "folder of one kind."
        )
    ((kind, files),) = by_kind.items()
    if kind == "text":
        if split is not None:
            raise DocumentError(
                f"Expected split to be left out, as in {folder} each .txt is a document, got {split!r}. Drop it."
            )
    else:
        files = _files_of_split(folder, files, split)
    if others:
        logger.warning("%d files of %s are read, not %s", len(files), folder, _names(others, folder))
    facts = {"files": len(files), "files_left": [str(file.relative_to(folder)) for file in others]}
    return _from_files(kind, files, folder, text_column), facts


def _files_of_split(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    """Return the files of one split, if file names, folder names, or a README define splits."""
    import datasets

    root = folder.absolute()
    try:
        data_files = datasets.load_dataset_builder(str(root)).config.data_files
    except datasets.exceptions.DataFilesNotFoundError:  # extensions in upper case, which datasets does not recognize
        data_files = {}
    splits = {str(name): [Path(file) for file in listed] for name, listed in data_files.items()}
    known = {file for listed in splits.values() for file in listed}
    are_named = known and all("train" in str(file.relative_to(root)) for file in known)
    if set(splits) <= {"train"} and not are_named:  # the files of datasets would lack extensions in upper case
        known = {file.absolute() for file in files}
        splits = {"train": sorted(known)}
    rest = [file for file in files if file.absolute() not in known]
    if rest:
        raise DocumentError(
            f"Expected every file of {folder} to be of a split, or none, got the splits {', '.join(splits)} and "
            f"besides {_names(rest, folder)}. Pass one file, or a folder in which every file is of a split or none is."
        )
    return [folder / file.relative_to(root) for file in _of_split(splits, split, str(folder))]


def _names(files: list[Path], folder: Path) -> str:
    names = [str(file.relative_to(folder)) for file in files[:3]]
    return ", ".join(names) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def _from_files(kind: str, files: list[Path], folder: Path, text_column: str) -> Texts:
    if kind == "text":
        return ((file.relative_to(folder).as_posix(), _text(file)) for file in files)
    if kind in ("parquet", "arrow"):
        names = [str(file.absolute()) for file in files]
        shown = str(files[0] if len(files) == 1 else folder)
        return from_rows(load_dataset(shown, kind, data_files=names, split="train"), text_column, shown)
    readers: dict[str, Callable[[Path], Iterable[Any]]]
    readers = {"JSON": _json_rows, "CSV": lambda file: _table(file, ","), "TSV": lambda file: _table(file, "\t")}
    several = len(files) > 1
    return itertools.chain.from_iterable(
        from_rows(readers[kind](file), text_column, str(file), f"{file.relative_to(folder).as_posix()}:" * several)
        for file in files
    )


def _open(path: Path, newline: str | None = None) -> io.TextIOBase:
    """Open a file as text, decompressed, without its byte order mark."""
    suffix = path.suffix.lower()
    opener: Any = OPENERS.get(suffix, open)
    if suffix == ".zst":
        try:
            zstandard = importlib.import_module("zstandard")
        except ImportError as error:
            raise DocumentError(
                f"Expected the package zstandard for {path}, got none. Run pip install zstandard."
            ) from error
        opener = zstandard.open
    file: io.TextIOBase = opener(path, "rt", encoding="utf-8-sig", newline=newline)
    return file


def _text(path: Path) -> str:
    with _open(path) as file:
        text = file.read()
    if 4 * text.count("\0") > len(text):  # ASCII text in UTF-16 or UTF-32 without a byte order mark is valid UTF-8
        raise DocumentError(
            f"Expected UTF-8 in {path}, got a text of which a quarter or more is NUL. Save it as UTF-8."
        )
    return text


def _json_rows(path: Path) -> Iterator[Any]:
    """Yield the rows of a JSON list or of JSON lines, or a single row.

    `datasets` is not used, because it requires one type per column and drops lone surrogates.
    """
    with _open(path) as lines:
        if ".json" in [suffix.lower() for suffix in path.suffixes]:
            first = next((line for line in lines if line.strip()), "")
            try:
                content = _json(first)
            except json.JSONDecodeError:  # a list or an object over several lines, or not JSON
                content = _json(first + lines.read())
            yield from content if isinstance(content, list) else [content]
        yield from json_lines(lines, str(path))


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique_keys)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError(f"Expected unique keys in an object, got {', '.join(key for key, _ in pairs)}. Rename them.")
    return content


def json_lines(lines: Iterable[str], name: str) -> Iterator[Any]:
    """Yield the JSON value of every line that is not empty.

    Raises:
        DocumentError: a line is not JSON.
    """
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield _json(line)
            except json.JSONDecodeError as error:
                raise DocumentError(
                    f"Expected JSON in line {number} of {name}, got {error}. Mend that line."
                ) from error


def _table(path: Path, delimiter: str) -> Iterator[dict[str, str]]:
    """Yield the rows of a table. `datasets` would convert numeric texts to numbers and `NA` to NaN."""
    csv.field_size_limit(sys.maxsize)
    with _open(path, newline="") as file:  # keeps line ends inside cells
        rows = csv.DictReader(file, delimiter=delimiter, strict=True)
        columns = rows.fieldnames or ()
        require_unique(columns, str(path))
        for number, row in enumerate(rows, start=1):
            surplus = row.pop(None, [])  # DictReader fills missing cells with `None`
            if surplus or None in row.values():
                cells = len(surplus) + sum(value is not None for value in row.values())
                raise DocumentError(
                    f"Expected {len(columns)} cells in row {number} of {path}, as in its header, got {cells}. Mend "
                    "that row."
                )
            yield row


def require_unique(columns: Iterable[Any], name: str) -> None:
    """Check that column names are unique. A row would keep only the last of two equal columns."""
    names = list(map(str, columns))
    if len(set(names)) < len(names):
        raise DocumentError(f"Expected unique columns in {name}, got {', '.join(names)}. Rename them.")


def from_rows(rows: Any, text_column: str, name: str, prefix: str = "") -> Texts:
    """Yield the id and text of each row. An id is the column `id` if not empty, otherwise `prefix` and the row index.

    Raises:
        DocumentError: a row is not an object, or lacks the column.
    """
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DocumentError(
                f"Expected rows with columns in {name}, got {type(row).__name__} as row {index + 1}. Pass objects "
                "such as {'text': '...'}."
            )
        if text_column not in row:
            columns = ", ".join(map(str, row))
            raise DocumentError(
                f"Expected {text_column!r} in every row of {name}, got {columns} in row {index + 1}. Drop or fill it."
                if index
                else f"Expected text_column to be one of {columns} in {name}, got {text_column!r}. Pass one of these."
            )
        id = row.get("id")
        yield f"{prefix}{index}" if id is None or id == "" else str(id), row[text_column]


def from_object(source: Any, text_column: str, split: str | None, revision: str | None) -> Texts:
    """Read a Python object: a data set, a table, a dictionary of columns, or a sequence of texts or rows.

    Raises:
        DocumentError: another type, or a split or revision for an object without them.
    """
    name = type(source).__name__
    if isinstance(source, Mapping) and source and all(hasattr(value, "column_names") for value in source.values()):
        source, split = _of_split(source, split, name), None  # of a DatasetDict
    for what, value in (("split", split), ("revision", revision)):
        if value is not None:
            raise DocumentError(f"Expected {what} to be left out, as {name} has none, got {value!r}. Drop it.")
    if isinstance(source, Mapping):
        return from_rows(_rows_of_columns(source, name), text_column, name)
    if hasattr(source, "iter_rows") and hasattr(source, "columns"):  # polars
        return from_rows(source.iter_rows(named=True), text_column, name)
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # pandas
        require_unique(source.columns, name)
        return from_rows(source.astype(object).where(source.notna(), None).to_dict("records"), text_column, name)
    if hasattr(source, "to_pylist") and hasattr(source, "column_names"):  # pyarrow
        return from_rows(source.to_pylist(), text_column, name)
    if hasattr(source, "column_names"):  # a Dataset or an IterableDataset
        return from_rows(source, text_column, name)
    if isinstance(source, bytes | set | frozenset) or not isinstance(source, Iterable):  # sets have no order
        raise DocumentError(
            f"Expected texts, got {name}. Pass a path, a list of texts, a Dataset, a DataFrame, or a dict of columns."
        )
    return from_rows((_row_of(item, text_column) for item in source), text_column, name)


def _row_of(item: Any, text_column: str) -> Mapping[Any, Any]:
    """Return a row, a [`Document`], or a text as a row."""
    if isinstance(item, Mapping):
        return item
    return {"id": getattr(item, "id", None), text_column: getattr(item, "text", item)}


def _rows_of_columns(columns: Mapping[Any, Any], name: str) -> Iterator[dict[str, Any]]:
    lengths = {
        len(column) if isinstance(column, list | tuple) or hasattr(column, "tolist") else None
        for column in columns.values()
    }
    if len(lengths) != 1 or None in lengths:
        shown = ", ".join(f"{key!r}: {type(value).__name__}" for key, value in itertools.islice(columns.items(), 3))
        raise DocumentError(
            f"Expected lists of one length in {name}, got {{{shown}}}. Pass columns, as {{'text': [...]}}, or texts."
        )
    return (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


def _of_split(data: Any, split: str | None, name: str) -> Any:
    """Return one split of a data set, or the data set itself if it has no splits."""
    if not isinstance(data, Mapping):
        return data
    first = next(iter(data))
    if (split or first) not in data or (split is None and len(data) > 1):
        raise DocumentError(
            f"Expected split to be one of {', '.join(data)} of {name}, got {split and repr(split)}. "
            f"Pass split={first!r}."
        )
    return data[split or first]


def load_dataset(shown: str, *args: Any, streaming: bool = True, **kwargs: Any) -> Any:
    """Call `datasets.load_dataset`, streaming by default. Streaming copies nothing and reads only the rows needed.

    `shown` is the path or Hub id.

    Raises:
        DocumentError: any of its errors, on one line.
    """
    import datasets

    if not Path(shown).exists() and (obstacle := hub_obstacle(shown, "dataset")):
        raise DocumentError(f"Expected documents, got {shown!r}: {obstacle}. Pass a file, a folder, or a list.")
    with one_line_errors(shown):
        return datasets.load_dataset(*args, streaming=streaming, **kwargs)


@contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """Convert any error of a reader inside the block to a `DocumentError` of one line, with advice on the encoding."""
    try:
        yield
    except DocumentError:
        raise
    except Exception as error:
        advice = "Save it as UTF-8." if isinstance(error, UnicodeDecodeError) else "Pass another."
        reason = first_line(error).rstrip(".")
        raise DocumentError(f"Expected documents that can be read, got {name}: {reason}. {advice}") from error
