"""Models and texts that the page offers, and the effect of one choice: a model as it is, and under one method."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..diagnosis import Diagnosis, diagnose, position_signal
from ..diagnosis.diagnosis import verdict
from ..diagnosis.reading import long_rows, read_documents
from ..errors import InvalidParameterError, PosExtError
from ..evaluation import Results, load_documents
from ..evaluation.documents import Documents
from ..evaluation.windows import CONTROL
from ..methods import as_method, list_methods
from ..patching.observe import frequencies_in_force
from ..plan import ExtensionPlan
from ..scheme import PositionalScheme

CHECKOUT = Path(__file__).parents[2]
"""The repository, if the package runs from one. Only a repository contains the shipped models, novels and results."""

MEASURED = ("demo", "fading", "remapping")
"""Folders of `results/` that contain comparisons of the shipped models."""

DOCUMENTS = 2
"""Texts that the page reads: the fewest that give an interval."""

FRONT_MATTER = 2000
"""Tokens of front matter at the beginning of each shipped novel."""

SHIPPED_LENGTH = 512
"""Trained length of the shipped models, in tokens. The config of the ALiBi model has no field for it."""

FACTOR = 4
"""Default factor, and the default length as a multiple of the trained length."""

LARGEST_FACTOR = 16
LARGEST_LENGTH = 8
"""Largest length, as a multiple of the trained length."""

READ = 8192
"""Largest number of tokens of a text that the page reads. Longer texts take minutes on a CPU."""

Opener = Callable[[str], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
"""Opens a folder as a model and its tokenizer; raises a `PosExtError` of one line."""


class Gain(NamedTuple):
    """Measured gain of a method over truncating the input, from a result file.

    Args:
        method (`str`): method.
        factor (`float`): its factor.
        length (`int`): tokens.
        gain (`float`): truncated perplexity / extended perplexity.
        low, high (`float`): 95 % interval.
        documents (`int`): number of documents.
        source (`str`): path of the result file in the repository.
    """

    method: str
    factor: float
    length: int
    gain: float
    low: float
    high: float
    documents: int
    source: str


@dataclass
class Shelf:
    """Models by the name that the page shows, and texts.

    Args:
        models (`dict[str, Path]`): folders by name.
        dataset (`Path`, *optional*): argument of [`load_documents`]; without it no loss can be measured.
        start (`int`): tokens to leave out at the beginning of each text.
        opener (`Callable`): opens a folder as a model and its tokenizer.
    """

    models: dict[str, Path]
    dataset: Path | None
    start: int
    opener: Opener
    _open: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = field(default_factory=dict)

    def open(self, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return a model and its tokenizer, which are opened once."""
        if not isinstance(name, str) or name not in self.models:
            raise InvalidParameterError(f"Expected one of the models {', '.join(self.models)}, got {name!r}.")
        if name not in self._open:
            self._open[name] = self.opener(str(self.models[name]))
        return self._open[name]

    def documents(self) -> Documents:
        """Return the texts that the page reads."""
        if self.dataset is None:
            raise InvalidParameterError(
                "There are no texts to read. Start the page with hf-posext app --dataset texts.jsonl (or a .csv, "
                ".parquet or .txt file, or a folder of .txt files)."
            )
        return load_documents(self.dataset, limit=DOCUMENTS)

    def known_length(self, name: str) -> int | None:
        """Return the trained length of a shipped model, `None` for other models."""
        return SHIPPED_LENGTH if self.models[name].parent == _shipped_folder(CHECKOUT) else None

    def known_gain(self, name: str, plan: ExtensionPlan, length: int) -> Gain | None:
        """Return the committed gain of a shipped model under a method, at the nearest factor and length."""
        if self.known_length(name) is None:
            return None
        gains = [gain for gain in _measured_gains(name) if gain.method == plan.method]
        return min(gains, key=lambda gain: (abs(gain.factor - plan.factor), abs(gain.length - length)), default=None)


@functools.cache
def _measured_gains(name: str) -> list[Gain]:
    """Return the gains of a shipped model in the committed results."""
    gains = []
    for path in (CHECKOUT / "results" / folder / f"{name}.json" for folder in MEASURED):
        source = path.relative_to(CHECKOUT).as_posix()
        for row in Results.load_json(path).rows if path.is_file() else ():
            gain, (low, high) = row["gain"], row["gain_ci95"] or (None, None)
            if gain is not None and low is not None and high is not None:
                cell = row["method"], row["factor"], row["length"]
                gains.append(Gain(*cell, gain, low, high, row["documents"], source))
    return gains


def make_shelf(
    folders: Sequence[Path], dataset: Path | None, start: int | None, opener: Opener, checkout: Path = CHECKOUT
) -> Shelf:
    """Return a shelf of the given models and then the shipped ones, with the given texts or the shipped novels.

    Args:
        folders (`Sequence[Path]`): folders of models.
        dataset (`Path`, *optional*): a file or folder of texts.
        start (`int`, *optional*): tokens to leave out at the beginning of each text. Defaults to the front matter of
            the shipped novels, and to 0 for other texts.
        opener (`Callable`): opens a folder as a model and its tokenizer.
        checkout (`Path`, *optional*): repository with `examples/`.

    Raises:
        InvalidParameterError: a path does not exist, or there are neither given nor shipped models.
    """
    for path, option in [*((folder, "model") for folder in folders), *([(dataset, "dataset")] if dataset else [])]:
        if not (path.is_dir() or option == "dataset" and path.is_file()):
            kind = "folder of a model" if option == "model" else "file or folder of texts"
            raise InvalidParameterError(f"Expected a {kind} on this machine, got --{option} {path}.")
    # The rotary model comes first: it has something to show on every tab.
    shipped = sorted((path.parent for path in _shipped_folder(checkout).glob("*/config.json")), reverse=True)
    novels = checkout / "examples" / "data" / "heldout.jsonl"
    models = [*folders, *shipped]
    if not models:
        raise InvalidParameterError(
            "The page needs a model: the shipped ones are part of the repository (examples/tiny), not of the "
            "installed package. Pass at least one: hf-posext app --model FOLDER --dataset texts.jsonl"
        )
    texts = dataset or (novels if novels.is_file() else None)
    begin = start if start is not None else FRONT_MATTER if texts == novels else 0
    return Shelf(_named(models), texts, begin, opener)


def _shipped_folder(checkout: Path) -> Path:
    return checkout / "examples" / "tiny"


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """Name folders by their last component, or by the whole path if two have the same."""
    ends = [folder.resolve().name for folder in folders]
    return {
        str(folder) if ends.count(end) > 1 else end: folder.resolve()
        for folder, end in zip(folders, ends, strict=True)
    }


@dataclass(frozen=True)
class Choice:
    """Values of the fields of the page.

    Args:
        model (`str`): name of the model on the shelf.
        method (`str`): argument of [`as_method`].
        factor (`float`): target length of the method, as a multiple of the trained length.
        length (`int`): tokens to show, and to read.
        trained_length (`int`, *optional*): trained length in tokens; overrides what the model states.
    """

    model: str
    method: str
    factor: float
    length: int
    trained_length: int | None = None


@dataclass(frozen=True)
class View:
    """Result of a choice.

    Args:
        diagnosis ([`Diagnosis`]): diagnosis up to the chosen length, with the signals as it is and under the method.
            After [`read`] with the losses of both and of the control.
        plan (`ExtensionPlan`): plan of the method.
        in_force (`Mapping[str, torch.Tensor]`): rotary frequencies of the model as it is by set, radians per token.
        gain ([`Gain`], *optional*): committed gain of the method on this model.
    """

    diagnosis: Diagnosis
    plan: ExtensionPlan
    in_force: Mapping[str, torch.Tensor]
    gain: Gain | None = None

    @property
    def trained_length(self) -> int:
        """Trained length of the plan, in tokens."""
        return self.plan.trained_length


def applicable(scheme: PositionalScheme) -> list[str]:
    """Return the methods that extend a scheme without parameters other than the factor."""
    names = []
    for name in (info.name for info in list_methods(scheme.kind) if info.name != "none"):
        try:
            as_method(name).plan(scheme, factor=FACTOR, trained_length=scheme.trained_length or READ)
        except PosExtError:
            continue
        names.append(name)
    return names


def first_look(shelf: Shelf, name: str, length: int | None = None, trained: int | None = None) -> Diagnosis:
    """Return the diagnosis of a model as it is, up to a length in tokens, without remedies' signals."""
    model, _ = shelf.open(name)
    diagnosis = diagnose(model, methods=[], target_length=length, trained_length=trained)
    shipped = shelf.known_length(name)
    if diagnosis.trained_length or not shipped:
        return diagnosis
    diagnosis = diagnose(model, methods=[], target_length=length, trained_length=shipped)
    return replace(diagnosis, trained_length_source="as all shipped models were")


def look(shelf: Shelf, choice: Choice) -> View:
    """Return the view of a choice from the weights; no text is read."""
    diagnosis = first_look(shelf, choice.model, choice.length, choice.trained_length)
    trained = diagnosis.trained_length
    if trained is None:
        raise InvalidParameterError(
            f"The trained length of {choice.model} is unknown. Enter it in the field Trained length, in tokens."
        )
    if choice.length > LARGEST_LENGTH * trained:
        raise InvalidParameterError(
            f"Expected a length of at most {LARGEST_LENGTH * trained} tokens ({LARGEST_LENGTH} times the trained "
            f"length), got {choice.length}."
        )
    if not 1 <= choice.factor <= LARGEST_FACTOR:
        raise InvalidParameterError(f"Expected a factor of 1 to {LARGEST_FACTOR}, got {choice.factor:g}.")
    plan = as_method(choice.method).plan(diagnosis.scheme, factor=choice.factor, trained_length=trained)
    model, _ = shelf.open(choice.model)
    signals = [position_signal(model, diagnosis.scheme, entry, choice.length, trained) for entry in (None, plan)]
    in_force = frequencies_in_force(model, choice.length) if diagnosis.scheme.rotaries else {}
    diagnosis = replace(diagnosis, signals=tuple(signal for signal in signals if signal is not None))
    return View(diagnosis, plan, in_force, shelf.known_gain(choice.model, plan, choice.length))


def read(shelf: Shelf, choice: Choice) -> View:
    """Return the view of a choice with the loss by position: as it is, under the method, and of the control."""
    view = look(shelf, choice)
    if choice.length > READ:
        raise InvalidParameterError(
            f"Expected a length of at most {READ} tokens to read on the page, got {choice.length}. Longer texts "
            "belong on the command line: hf-posext explain MODEL --dataset TEXTS --methods METHOD --target-length "
            "TOKENS"
        )
    if view.diagnosis.scheme.ends and choice.length > view.plan.target_length:
        raise InvalidParameterError(
            f"{view.plan.method} with factor {choice.factor:g} has {view.plan.target_length} positions, got a length "
            f"of {choice.length}. Choose a larger factor or a smaller length."
        )
    model, tokenizer = shelf.open(choice.model)
    plans = {} if view.plan.changes_nothing else {view.plan.method: view.plan}
    texts = shelf.documents()
    rows = long_rows(texts, tokenizer, view.diagnosis, shelf.start, exactly=True)
    diagnosis = read_documents(model, texts, rows, view.diagnosis, plans, 0, attention=False, control=True)
    return replace(view, diagnosis=replace(diagnosis, verdict=verdict(diagnosis)))


def effect(view: View) -> str:
    """Return the effect of the method on the loss, and its gain over truncation in the second half of the texts."""
    lines, trained, method = view.diagnosis.tables["losses"], view.trained_length, view.plan.method
    if view.plan.changes_nothing:
        return f"{method} changes nothing, so there is nothing to compare."

    def mean(curve: str, begin: int, end: int | None = None) -> float:
        stretches = lines[(lines.curve == curve) & (lines.begin >= begin) & (lines.end <= (end or lines.end.max()))]
        return float(np.average(stretches.nll, weights=stretches.end - stretches.begin))

    readable = lines[lines.curve == "none"].begin.max() >= trained
    as_it_is = f"{mean('none', trained):.2f} nats per token as it is" if readable else "undefined as it is"
    half = view.diagnosis.target_length // 2
    gain = float(np.exp(mean(CONTROL, half) - mean(method, half)))
    return (
        f"Past token {trained} the loss is {as_it_is} and {mean(method, trained):.2f} with {method}; up to there it "
        f"is {mean('none', 0, trained):.2f} and {mean(method, 0, trained):.2f}. From token {half} on, {method} has a "
        f"gain of {gain:.3f} over truncating the input to {trained} tokens. Above 1 the longer context helps; below 1 "
        "truncation is the better choice."
    )
