"""The long-document data sets of the papers, by name: `load_documents("pg19", limit=10)`.

`datasets` 4 and newer run no loading scripts, so every recipe names a repository of plain parquet or JSON lines, or
the plain files of one that has a script as well.

Nothing here was downloaded when it was written: the tests read local files of the same layout. Ids, configurations,
columns and file names are what the Hub's pages and public code say; these are what a first use should look at:

- `proof-pile` and `booksum` are not pinned to a commit; pass `revision=`.
- `booksum`: the column `text` of the configuration `books`, from its card.

Minimum lengths are in characters, so that a document is left out before it is tokenized: roughly what 32,768 tokens
(Proof-pile) and 16,384 tokens (GovReport, arXiv) take, at three or four characters each. Documents that pass and still
have too few tokens are left out and listed by the measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """
    Where the documents of a data set are, and in which column.

    Args:
        name (`str`): what to type.
        path (`str`): Hub id; or a folder that holds a copy of the repository, for machines without network:
            `load_documents(dataclasses.replace(RECIPES["pg19"], path="copies/pg19"))`.
        split (`str`): read unless another is asked for.
        text_column (`str`): column of the text.
        homepage (`str`): where the data set is described.
        licence (`str`): what is said of the licence; a note, not advice.
        config (`str`, *optional*): configuration of the repository.
        revision (`str`, *optional*): commit; the newest where it is `None`.
        files (`Mapping[str, str]`, *optional*): JSON-lines file of each split, for a repository that cannot be loaded
            by its id because it has a loading script.
        minimum_characters (`int`, *optional*, defaults to 0): shorter documents are left out.
        streaming (`bool`, *optional*, defaults to `True`): read no more than is asked for; `False` keeps a copy of the
            whole split in the cache of `datasets`.
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

    def request(self, split: str, revision: str | None) -> dict[str, Any]:
        """
        Arguments of `datasets.load_dataset`; with `files` its rows have one column, `text`, a line of JSON each.

        Args:
            split (`str`): to read.
            revision (`str`, *optional*): commit, branch or tag.

        Raises:
            KeyError: a recipe of files has none for that split.
        """
        local = Path(self.path).is_dir()
        if self.files is None:
            path = str(Path(self.path).absolute()) if local else self.path
            return {
                "path": path,
                "name": self.config,
                "split": split,
                "revision": None if local else revision,
                "streaming": self.streaming,
            }
        root = str(Path(self.path).absolute()) if local else f"hf://datasets/{self.path}@{revision or 'main'}"
        return {
            # Not "json", which wants the same type of every column in every row: the `meta` of Proof-pile has many.
            "path": "text",
            "data_files": f"{root}/{self.files[split]}",
            "split": "train",  # what datasets calls the one split of files that are given by name
            "streaming": self.streaming,
        }


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
"""The recipes by name."""
