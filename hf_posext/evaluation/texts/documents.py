"""Documents from files, from `datasets` objects, from lists of strings, from the Hub, or by the name of a recipe."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DocumentError
from .reading import Texts, from_object, from_path, from_rows, json_lines, load_dataset, one_line_errors
from .recipes import RECIPES, Recipe

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


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

    A path is read as a whole, or refused: a folder that contains files of several kinds is refused with their names.

    Args:
        source (`str`, `Path`, [`Recipe`], `datasets.Dataset`, `datasets.IterableDataset`, `list` ...): one of

            - the name of a recipe (`"pg19"`, `"proof-pile"`, `"govreport"`, `"arxiv"`, `"booksum"`), whatever lies in
              the working directory: a folder of that name is `"./pg19"`;
            - a file: `.txt` (one document), `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet` or `.arrow` (a document a
              row), in UTF-8, also compressed (`.gz`, `.xz`, `.bz2`, `.zst`);
            - a folder of such files of one kind, at any depth, or one written by `Dataset.save_to_disk`;
            - a Hub id;
            - a list of texts or rows, a `Dataset`, a `DatasetDict`, a `DataFrame`, or a dict of columns.

            Line ends in `.txt` files become `\\n`; all other text stays as it is.
        text_column (`str`, *optional*): column of the text, by default the recipe's, or `"text"`; a column `id` names
            the documents.
        split (`str`, *optional*): of a folder, Hub id or `DatasetDict`; may be left out where there is only one. By
            default the recipe's.
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
        texts, read = from_path(Path(source), text_column, split, revision)
        extra.update(read)
    else:
        name = type(source).__name__
        texts = from_object(source, text_column, split)
    kept = _long_enough(one_line_errors(texts, name), minimum_characters or 0)
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


def _from_recipe(recipe: Recipe, text_column: str, split: str, revision: str | None) -> Texts:
    if recipe.files is not None and split not in recipe.files:
        raise DocumentError(
            f"the recipe {recipe.name!r} has no split {split!r}; choose one of {', '.join(recipe.files)}"
        )
    rows = load_dataset(recipe.path, **recipe.request(split, revision))
    if recipe.files is not None:
        rows = json_lines((line["text"] for line in rows), recipe.path)
    return from_rows(rows, text_column, recipe.path)


def _long_enough(texts: Texts, minimum: int) -> Texts:
    return (pair for pair in texts if not isinstance(pair[1], str) or len(pair[1]) >= minimum)


def _with_unique_ids(documents: list[Document]) -> list[Document]:
    """Ids numbered where they repeat: results are paired by id."""
    if len({document.id for document in documents}) == len(documents):
        return documents
    logger.warning("document ids repeat; they are numbered")
    return [Document(f"{index}-{document.id}", document.text) for index, document in enumerate(documents)]
