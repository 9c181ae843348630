"""What the page offers to choose: models from folders, each opened once, and texts to read with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..errors import InvalidParameterError
from ..evaluation import load_documents
from ..evaluation.texts.documents import Documents

CHECKOUT = Path(__file__).parents[2]
"""The repository, where the package runs from one: only there are the shipped models and novels."""

DOCUMENTS = 2
"""Texts that are read: enough for an interval, and read in seconds."""

FRONT_MATTER = 2000
"""Tokens before which the shipped novels are not yet novels."""

SHIPPED_LENGTH = 512
"""Tokens that the shipped models were trained on. The config of the ALiBi one has no place to say so."""

Opener = Callable[[str], tuple[PreTrainedModel, Any]]
"""From a folder to a model and its tokenizer; raises a `PosExtError` of one line."""


@dataclass
class Shelf:
    """Models by the name that the page shows, and texts.

    Args:
        models (`dict[str, Path]`): folders by name.
        dataset (`Path`, *optional*): what [`load_documents`] reads; without it no loss can be measured.
        start (`int`): tokens to leave out at the beginning of each text.
        opener (`Callable`): from a folder to a model and its tokenizer.
    """

    models: dict[str, Path]
    dataset: Path | None
    start: int
    opener: Opener
    _open: dict[str, tuple[PreTrainedModel, Any]] = field(default_factory=dict)

    def open(self, name: str) -> tuple[PreTrainedModel, Any]:
        """A model and its tokenizer; from the second time on the same ones.

        Raises:
            InvalidParameterError: no model of that name was put on the shelf.
            PosExtError: it cannot be opened.
        """
        if name not in self.models:
            raise InvalidParameterError(f"no model {name!r} here; there are: {', '.join(self.models)}")
        if name not in self._open:
            self._open[name] = self.opener(str(self.models[name]))
        return self._open[name]

    def documents(self) -> Documents:
        """The texts.

        Raises:
            InvalidParameterError: none were given.
            DocumentError: they cannot be read.
        """
        if self.dataset is None:
            raise InvalidParameterError(
                "there are no texts to read; start the page with some: hf-posext app --dataset texts.jsonl (or a "
                ".csv, .parquet or .txt, or a folder of .txt)"
            )
        return load_documents(self.dataset, limit=DOCUMENTS)

    def known_length(self, name: str) -> int | None:
        """Trained length of a shipped model."""
        return SHIPPED_LENGTH if self.models[name].parent == _shipped_folder(CHECKOUT) else None


def make_shelf(
    folders: Sequence[Path], dataset: Path | None, start: int | None, opener: Opener, checkout: Path = CHECKOUT
) -> Shelf:
    """The models given, then the shipped ones; the texts given, or else the shipped novels.

    Args:
        folders (`Sequence[Path]`): of models.
        dataset (`Path`, *optional*): a file or folder of texts.
        start (`int`, *optional*): tokens to leave out at the beginning of each text; by default the front matter of
            the shipped novels, and none of other texts.
        opener (`Callable`): from a folder to a model and its tokenizer.
        checkout (`Path`, *optional*): where `examples/` is looked for.

    Raises:
        InvalidParameterError: a folder or file that is not there, or neither models given nor shipped ones.
    """
    for path, option in [*((folder, "model") for folder in folders), *([(dataset, "dataset")] if dataset else [])]:
        if not (path.is_dir() or option == "dataset" and path.is_file()):
            what = "folder of a model" if option == "model" else "file or folder of texts"
            raise InvalidParameterError(f"--{option} is {path}, which does not exist. Name a {what} on this machine")
    # The rotary one comes first, and with it something to see in every figure.
    shipped = sorted((path.parent for path in _shipped_folder(checkout).glob("*/config.json")), reverse=True)
    novels = checkout / "examples" / "data" / "heldout.jsonl"
    chosen = [*folders, *shipped]
    if not chosen:
        raise InvalidParameterError(
            "no model to show: the package brings none, and the shipped ones are only in a clone of its repository "
            "(examples/tiny); give one or more, as in hf-posext app --model FOLDER --dataset texts.jsonl"
        )
    texts = dataset or (novels if novels.is_file() else None)
    begin = start if start is not None else FRONT_MATTER if texts == novels else 0
    return Shelf(_named(chosen), texts, begin, opener)


def _shipped_folder(checkout: Path) -> Path:
    return checkout / "examples" / "tiny"


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders by their last part, or by all of it where two have the same."""
    ends = [folder.resolve().name for folder in folders]
    return {
        str(folder) if ends.count(end) > 1 else end: folder.resolve()
        for folder, end in zip(folders, ends, strict=True)
    }
