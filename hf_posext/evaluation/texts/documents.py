"""Documents from files, from `datasets` objects, from lists of strings, from the Hub, or by the name of a recipe."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ...errors import DocumentError
from .recipes import RECIPES, Recipe

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

BUILDERS: dict[str, dict[str, Any]] = {
    ".csv": {"path": "csv", "keep_default_na": False},  # an empty cell is an empty text, and "NA" is a word
    ".parquet": {"path": "parquet"},
}
"""File endings, and the builders of `datasets` that read them."""

SUFFIXES = (".txt", ".jsonl", ".json", *BUILDERS)

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Document:
    """
    A text to measure on.

    Lone surrogates, which UTF-8 cannot hold and tokenizers refuse, become U+FFFD, the replacement character.

    Args:
        id (`str`): a name for messages and result files: file name, `id` column, or index.
        text (`str`): the text.
    """

    id: str
    text: str

    def __post_init__(self) -> None:
        for name in ("id", "text"):
            value = getattr(self, name)
            try:
                value.encode()
            except UnicodeEncodeError:
                logger.warning("the %s of document %r has lone surrogates; they become U+FFFD", name, self.id)
                paired = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
                object.__setattr__(self, name, paired)


class Documents(list[Document]):
    """A list of [`Document`] that remembers where it comes from.

    Args:
        documents (`Iterable[Document]`): the documents.
        source (`Mapping`): `dataset`, `split`, `revision` and `text_column`, for the provenance of results; `recipe`,
            `config` and `minimum_characters` where there are such.
    """

    def __init__(self, documents: Iterable[Document], source: Mapping[str, Any]) -> None:
        super().__init__(documents)
        self.source = dict(source)


def load_documents(
    source: str | Path | Recipe | Iterable[str] | datasets.Dataset | datasets.IterableDataset,
    *,
    text_column: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
    minimum_characters: int | None = None,
) -> Documents:
    """
    Load texts to measure on.

    Args:
        source (`str`, `Path`, [`Recipe`], `datasets.Dataset`, `datasets.IterableDataset` or `list[str]`):
            the name of a recipe (`"pg19"`, `"proof-pile"`, `"govreport"`, `"arxiv"`, `"booksum"`); a folder of `.txt`
            files or one such file (a document each); a `.jsonl`, `.json`, `.csv` or `.parquet` file (a document a
            row); a folder or Hub id that `datasets.load_dataset` reads, streamed; or the data itself. Files are
            UTF-8; of `.txt` files a byte order mark is no text, and line ends are `\\n`; all other text stays as it
            is. The name of a
            recipe means the recipe, whatever lies in the working directory, so that a command means the same
            everywhere: a folder of that name is `"./pg19"`.
        text_column (`str`, *optional*): column of the text, by default the recipe's, or `"text"`; a column `id` names
            the documents.
        split (`str`, *optional*): for a data set folder or Hub id; may be left out where there is only one. By default
            the recipe's.
        revision (`str`, *optional*): branch, tag or commit of a Hub data set; by default the recipe's.
        limit (`int`, *optional*): how many documents to read, from the first on; all of them by default.
        minimum_characters (`int`, *optional*): leave out shorter documents; `limit` counts those that stay. By default
            the recipe's, or 0.

    Returns:
        [`Documents`]: a list of [`Document`], with its source.

    Raises:
        DocumentError: no such path or data set, no such split or column, a text that is none, or no documents at all.
    """
    if limit is not None and limit < 1:
        raise DocumentError(f"limit is {limit}; give the number of documents to read, 1 or more, or leave it out")
    if minimum_characters is not None and minimum_characters < 0:
        raise DocumentError(f"minimum_characters is {minimum_characters}; give 0 or more, or leave it out")
    recipe = _recipe(source)
    extra: dict[str, Any] = {}
    if recipe is not None:
        text_column = text_column or recipe.text_column
        split, revision = split or recipe.split, revision or recipe.revision
        if minimum_characters is None:
            minimum_characters = recipe.minimum_characters
        extra = {"recipe": recipe.name, "config": recipe.config}
    text_column = text_column or "text"
    if minimum_characters is not None:
        extra["minimum_characters"] = minimum_characters

    if recipe is not None:
        name = recipe.path
        texts = _from_recipe(recipe, text_column, split or recipe.split, revision)
    elif isinstance(source, str | Path):
        name = str(source)
        texts = _from_path(Path(source), text_column, split, revision)
    elif hasattr(source, "column_names"):
        name = type(source).__name__
        texts = _from_rows(source, text_column, name)
    else:
        name = type(source).__name__
        texts = ((str(index), text) for index, text in enumerate(cast("Iterable[str]", source)))
    kept = _long_enough(_one_line_errors(texts, name), minimum_characters or 0)
    documents: list[Document] = []
    for id, text in itertools.islice(kept, limit):
        if not isinstance(text, str):
            raise DocumentError(f"document {id!r} of {name} is {type(text).__name__}, not text; drop or convert it")
        documents.append(Document(id, text))
    if not documents and minimum_characters:
        raise DocumentError(
            f"{name} has no document of {minimum_characters:,} characters or more; give a lower minimum_characters"
        )
    if not documents:
        raise DocumentError(
            f"{name} has no documents; give a data set with one row or more, or a folder of .txt files"
        )
    where = {"dataset": name, "split": split, "revision": revision, "text_column": text_column, **extra}
    return Documents(_with_unique_ids(documents), where)


def as_documents(source: Any) -> list[Document]:
    """Documents as they are, numbered if ids repeat; anything else as [`load_documents`] reads it."""
    if isinstance(source, list) and all(isinstance(document, Document) for document in source):
        documents = _with_unique_ids(source)
        return Documents(documents, source.source) if isinstance(source, Documents) else documents
    return load_documents(source)


def _recipe(source: Any) -> Recipe | None:
    if isinstance(source, Recipe):
        return source
    if not isinstance(source, str) or source not in RECIPES:
        return None
    if Path(source).exists():
        logger.warning("%r is read by its recipe; for what lies here under this name, write ./%s", source, source)
    return RECIPES[source]


def _from_recipe(recipe: Recipe, text_column: str, split: str, revision: str | None) -> Iterable[tuple[str, Any]]:
    if recipe.files is not None and split not in recipe.files:
        raise DocumentError(
            f"the recipe {recipe.name!r} has no split {split!r}; choose one of {', '.join(recipe.files)}"
        )
    rows = _load_dataset(recipe.path, **recipe.request(split, revision))
    if recipe.files is not None:
        rows = _json_lines((line["text"] for line in rows), recipe.path)
    return _from_rows(rows, text_column, recipe.path)


def _long_enough(texts: Iterable[tuple[str, Any]], minimum: int) -> Iterable[tuple[str, Any]]:
    return (pair for pair in texts if not isinstance(pair[1], str) or len(pair[1]) >= minimum)


def _from_path(path: Path, text_column: str, split: str | None, revision: str | None) -> Iterable[tuple[str, Any]]:
    if path.is_file() and path.suffix == ".txt":
        return _from_text_files([path])
    if path.is_file() and path.suffix in (".jsonl", ".json"):
        return _from_rows(_json_rows(path), text_column, str(path))
    if path.is_file() and path.suffix in BUILDERS:
        rows = _load_dataset(str(path), **BUILDERS[path.suffix], data_files=str(path.absolute()), split="train")
        return _from_rows(rows, text_column, str(path))
    if path.is_file():
        raise DocumentError(f"{path} ends in {path.suffix!r}; give a file of {', '.join(SUFFIXES)}, or a folder")
    if path.is_dir() and (files := sorted(path.glob("*.txt"))):
        return _from_text_files(files)
    if not path.is_dir() and (path.suffix in SUFFIXES or not HUB_ID.fullmatch(str(path))):
        raise DocumentError(f"no such path: {path}; give a folder, a file of {', '.join(SUFFIXES)}, or a Hub id")
    name = str(path.absolute()) if path.is_dir() else str(path)
    found = _load_dataset(str(path), name, split=split, revision=revision)
    if isinstance(found, dict):
        if len(found) > 1:
            raise DocumentError(
                f"{path} has the splits {', '.join(found)}; choose one, as split={next(iter(found))!r}"
            )
        (found,) = found.values()
    return _from_rows(found, text_column, str(path))


def _load_dataset(shown: str, *args: Any, streaming: bool = True, **kwargs: Any) -> Any:
    import datasets

    # Streamed, so that a limit reads no more than it needs and nothing is copied into a cache.
    try:
        return datasets.load_dataset(*args, streaming=streaming, **kwargs)
    except Exception as error:
        raise _unreadable(shown, error) from error


def _from_text_files(paths: Iterable[Path]) -> Iterable[tuple[str, str]]:
    for path in paths:
        yield path.name, path.read_text(encoding="utf-8-sig")


def _json_rows(path: Path) -> Iterable[Any]:
    """Rows of a list or of lines. Not by `datasets`, which wants one type in a column, and drops lone surrogates."""
    if path.suffix == ".json" and (content := path.read_text(encoding="utf-8-sig")).lstrip().startswith("["):
        yield from json.loads(content)
        return
    with path.open(encoding="utf-8-sig") as lines:
        yield from _json_lines(lines, str(path))


def _json_lines(lines: Iterable[str], name: str) -> Iterable[Any]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DocumentError(f"cannot read {name}: line {number} is not JSON ({error})") from error


def _from_rows(rows: Any, text_column: str, name: str) -> Iterable[tuple[str, Any]]:
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DocumentError(f"row {index} of {name} is {type(row).__name__}, not an object with a column of text")
        if text_column not in row:
            raise DocumentError(
                f"{name} has no column {text_column!r}; it has {', '.join(row)}: choose one with text_column="
            )
        yield str(row.get("id", index)), row[text_column]


def _one_line_errors(texts: Iterable[tuple[str, Any]], name: str) -> Iterable[tuple[str, Any]]:
    """The same, with whatever the readers of files raise on the way turned into one line."""
    try:
        yield from texts
    except DocumentError:
        raise
    except Exception as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> DocumentError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return DocumentError(f"cannot read {name}: {reason}")


def _with_unique_ids(documents: list[Document]) -> list[Document]:
    """Ids numbered where they repeat: results are paired by id."""
    if len({document.id for document in documents}) == len(documents):
        return documents
    logger.warning("document ids repeat; they are numbered")
    return [Document(f"{index}-{document.id}", document.text) for index, document in enumerate(documents)]
