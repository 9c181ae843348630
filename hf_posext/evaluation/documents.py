"""Documents from files, `datasets` objects, lists, the Hub, or a recipe: `load_documents("pg19", limit=10)`.

Recipes are the long-document data sets of the papers, by name. `datasets` 4 and newer do not run loading scripts.
Every recipe therefore refers to a repository of plain parquet or JSON lines, or to the plain files of a repository
that also contains a script.

The recipes were written without downloading the data. The tests read local files of the same layout. Ids,
configurations, columns, and file names come from the Hub's pages and public code. Check these on first use:

- `proof-pile` and `booksum` are not pinned to a commit. Pass `revision=`.
- `booksum` uses the column `text` of the configuration `books`, according to its card.

Minimum lengths are in characters, so that a short document is left out before it is tokenized. They correspond roughly
to 32,768 tokens (Proof-pile) and 16,384 tokens (GovReport, arXiv), at three or four characters per token. Documents
that pass and still have too few tokens are left out and listed by the measurement.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DocumentError
from .config import checked
from .reading import from_object, from_path, from_rows, json_lines, load_dataset, one_line_errors

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Recipe:
    """Location of a data set, and the column that contains its documents.

    Args:
        name (`str`): name to pass to [`load_documents`].
        path (`str`): Hub id, or a folder with a copy of the repository for machines without network:
            `load_documents(dataclasses.replace(RECIPES["pg19"], path="copies/pg19"))`.
        split (`str`): default split.
        text_column (`str`): column of the text.
        homepage (`str`): page that describes the data set.
        licence (`str`): note on the licence; not legal advice.
        config (`str`, *optional*): configuration of the repository.
        revision (`str`, *optional*): commit of the repository. `None` for the newest.
        files (`Mapping[str, str]`, *optional*): JSON-lines file of each split, for a repository that cannot be loaded
            by its id because it contains a loading script.
        minimum_characters (`int`, *optional*, defaults to 0): shorter documents are left out.
        streaming (`bool`, *optional*, defaults to `True`): read only the requested documents. `False` keeps a copy of
            the whole split in the cache of `datasets`.
    """

    name: str
    path: str
    split: str
    text_column: str
    homepage: str
    licence: str
    config: str | None = None
    revision: str | None = None
    files: Mapping[str, str] | None = None
    minimum_characters: int = 0
    streaming: bool = True

    def rows(self, split: str, revision: str | None) -> Iterable[Any]:
        """Return the rows of a split, at a commit, branch or tag.

        Raises:
            DocumentError: the data set has no such split, or cannot be read.
        """
        local = str(Path(self.path).absolute()) if Path(self.path).is_dir() else None
        if self.files is None:
            arguments = {"path": local or self.path, "name": self.config, "split": split}
            rows: Iterable[Any] = load_dataset(
                self.path, **arguments, revision=None if local else revision, streaming=self.streaming
            )
            return rows
        if split not in self.files:
            raise DocumentError(
                f"Expected split to be one of {', '.join(self.files)} of the recipe {self.name!r}, got {split!r}. "
                f"Pass split={next(iter(self.files))!r}."
            )
        root = local or f"hf://datasets/{self.path}@{revision or 'main'}"
        # Not "json", which requires one type per column: the `meta` of Proof-pile has many. The split is the one that
        # datasets assigns to data_files without a split.
        lines = load_dataset(
            self.path, path="text", data_files=f"{root}/{self.files[split]}", split="train", streaming=self.streaming
        )
        return json_lines((line["text"] for line in lines), self.path)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="pg19",
            path="emozilla/pg19",
            split="test",
            text_column="text",
            revision="c021754c8e01c5b1cc83a1f549c1f97fbbb756b8",
            homepage="https://github.com/google-deepmind/pg19",
            licence="Apache-2.0 for the collection; the books are in the public domain of the United States",
        ),
        Recipe(
            name="proof-pile",
            path="hoskinson-center/proof-pile",
            split="test",
            text_column="text",
            files={"test": "test/proofpile_test.jsonl.gz", "validation": "dev/proofpile_dev.jsonl.gz"},
            minimum_characters=98_304,
            homepage="https://github.com/zhangir-azerbayev/proof-pile",
            licence="tagged Apache-2.0; the sources, arXiv papers among them, keep their own",
        ),
        Recipe(
            name="govreport",
            path="ccdv/govreport-summarization",
            config="document",
            split="test",
            text_column="report",
            revision="4e21184e01ae8017e2c036e180fe5e541fef60a0",
            minimum_characters=65_536,
            homepage="https://gov-report-data.github.io",
            licence="none stated; reports of the United States government (GAO, CRS)",
        ),
        Recipe(
            name="arxiv",
            path="ccdv/arxiv-summarization",
            config="document",
            split="test",
            text_column="article",
            revision="240aaf1a969b3f8cd0ade6986bfad0cd730ee288",
            minimum_characters=49_152,
            homepage="https://github.com/armancohan/long-summarization",
            licence="none stated; papers keep their authors' licences (text in lower case, formulas replaced)",
        ),
        Recipe(
            name="booksum",
            path="ubaada/booksum-complete-cleaned",
            config="books",
            split="test",
            text_column="text",
            homepage="https://github.com/salesforce/booksum",
            licence="BSD-3-Clause for BookSum; the novels are in the public domain of the United States",
        ),
    )
}
"""Recipes by name."""


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """Text to measure on.

    Lone surrogates become U+FFFD, the replacement character, because UTF-8 cannot encode them and tokenizers refuse
    them.

    Args:
        id (`str`): name in messages and result files: file name, value of the `id` column, or index.
        text (`str`): the text.
    """

    id: str
    text: str

    def __post_init__(self) -> None:
        for name in ("id", "text"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise DocumentError(f"Expected text as {name} of a document, got {type(value).__name__}.")
            try:
                value.encode()
            except UnicodeEncodeError:
                logger.warning("the %s of document %r has lone surrogates; they become U+FFFD", name, self.id)
                paired = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
                object.__setattr__(self, name, paired)


class Documents(list[Document]):
    """List of [`Document`] with a record of its source.

    Args:
        documents (`Iterable[Document]`): the documents.
        source (`Mapping`): `dataset`, `split`, `revision`, and `text_column`, for the provenance of results. `recipe`,
            `config`, and `minimum_characters` are included if they apply.
    """

    def __init__(self, documents: Iterable[Document], source: Mapping[str, Any]) -> None:
        super().__init__(documents)
        self.source = dict(source)


@checked
def load_documents(
    source: str | Path | Recipe | Iterable[str] | datasets.Dataset | datasets.IterableDataset,
    *,
    text_column: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
    minimum_characters: int | None = None,
) -> Documents:
    """Load texts to measure on.

    A path is read as a whole or refused. For a folder that contains files of several kinds, the error names them.

    Args:
        source (`str`, `Path`, [`Recipe`], `datasets.Dataset`, `datasets.IterableDataset`, `list` ...): one of

            - the name of a recipe (`"pg19"`, `"proof-pile"`, `"govreport"`, `"arxiv"`, `"booksum"`), which takes
              precedence over a folder of that name in the working directory. Write `"./pg19"` for the folder;
            - a file: `.txt` (one document), `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, or `.arrow` (one document
              per row), in UTF-8, all but the last two optionally compressed (`.gz`, `.xz`, `.bz2`, `.zst`);
            - a folder of such files of one kind, at any depth but not through links to other folders, or a folder
              written by `Dataset.save_to_disk`;
            - a Hub id;
            - a list of texts or rows, a `Dataset`, a `DatasetDict`, a `DataFrame`, or a dict of columns.

            Line endings in `.txt` files become `\\n`. All other text is unchanged.
        text_column (`str`, *optional*): column of the text. Defaults to the recipe's column, or `"text"`. A column
            `id`, if present, contains the names of the documents.
        split (`str`, *optional*): split of a folder, Hub id, or `DatasetDict`. Defaults to the recipe's split.
            Optional if there is only one split.
        revision (`str`, *optional*): branch, tag, or commit of a Hub data set. Defaults to the recipe's revision.
        limit (`int`, *optional*): number of documents to read, starting with the first. Defaults to all.
        minimum_characters (`int`, *optional*): leave out shorter documents, which do not count towards `limit`.
            Defaults to the recipe's minimum, or 0.

    Returns:
        [`Documents`]: a list of [`Document`], with its source.

    Raises:
        DocumentError: the path, data set, split, or column does not exist, a text is not a string, or there are no
            documents.
    """
    if limit is not None and limit < 1:
        raise DocumentError(
            f"Expected limit to be 1 or more, got {limit}. Pass the number of documents to read, or leave it out."
        )
    if minimum_characters is not None and minimum_characters < 0:
        raise DocumentError(
            f"Expected minimum_characters to be 0 or more, got {minimum_characters}. Pass 0, or leave it out."
        )
    if isinstance(source, str) and not source:  # as a path, it is the working directory
        raise DocumentError(
            "Expected a path, got ''. Pass a file, a folder such as '.', a Hub id, or a list of texts."
        )
    recipe = _recipe(source)
    facts: dict[str, Any] = {}
    if recipe is not None:
        text_column = text_column or recipe.text_column
        split, revision = split or recipe.split, revision or recipe.revision
        if minimum_characters is None:
            minimum_characters = recipe.minimum_characters
        facts = {"recipe": recipe.name, "config": recipe.config}
    text_column = text_column or "text"
    if minimum_characters is not None:
        facts["minimum_characters"] = minimum_characters
    name = recipe.path if recipe else str(source) if isinstance(source, str | Path) else type(source).__name__
    documents: list[Document] = []
    with one_line_errors(name):
        if recipe is not None:
            texts = from_rows(recipe.rows(split or recipe.split, revision), text_column, name)
        elif isinstance(source, str | Path):
            texts, files = from_path(Path(source), text_column, split, revision)
            facts |= files
        else:
            texts = from_object(source, text_column, split, revision)
        for id, text in texts:
            if not isinstance(text, str):
                raise DocumentError(
                    f"Expected text in document {id!r} of {name}, got {type(text).__name__}. Drop or convert it."
                )
            if len(text) >= (minimum_characters or 0):
                documents.append(Document(id, text))
            if len(documents) == limit:
                break
    if not documents:
        raise DocumentError(
            f"Expected documents of {minimum_characters:,} characters or more in {name}, got none. Pass a lower "
            "minimum_characters."
            if minimum_characters
            else f"Expected documents in {name}, got none. Pass a data set with rows, or a folder of .txt files."
        )
    provenance = {"dataset": name, "split": split, "revision": revision, "text_column": text_column, **facts}
    return Documents(_with_unique_ids(documents), provenance)


def as_documents(source: Any) -> list[Document]:
    """Return documents with unique ids; load any other source with [`load_documents`]."""
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


def _with_unique_ids(documents: list[Document]) -> list[Document]:
    """Number repeated ids, because results are paired by id."""
    if len({document.id for document in documents}) == len(documents):
        return documents
    logger.warning("document ids repeat; they are numbered")
    return [Document(f"{index}-{document.id}", document.text) for index, document in enumerate(documents)]
