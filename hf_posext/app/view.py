"""What the page shows of one choice: a model as it is, and as one method would make it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..diagnosis import Diagnosis, diagnose, position_signal
from ..diagnosis.reading import long_rows, read_documents
from ..diagnosis.verdict import verdict
from ..errors import InvalidParameterError, PosExtError
from ..methods import as_method, list_methods
from ..patching.observe import frequencies_in_force
from ..plan import ExtensionPlan
from ..scheme import PositionalScheme
from .shelf import Shelf

FACTOR = 4
"""By how much the page extends, and how many times the trained length it shows, before anything is chosen."""

LARGEST_FACTOR = 16
SHOWN = 8
"""Times the trained length that can be shown at most."""

READ = 8192
"""Tokens of a text that are read at most: on a CPU more would take minutes, and belongs on the command line."""


@dataclass(frozen=True)
class Choice:
    """What a user has chosen.

    Args:
        model (`str`): its name on the shelf.
        method (`str`): as [`as_method`] reads it.
        factor (`float`): how many times the trained length the method is for.
        length (`int`): tokens to show, and to read.
        trained_length (`int`, *optional*): tokens; what is found of the model if not given.
    """

    model: str
    method: str
    factor: float
    length: int
    trained_length: int | None = None


@dataclass(frozen=True)
class View:
    """One choice, worked out.

    Args:
        found ([`Diagnosis`]): up to the chosen length, with two signals where the model has any that can be drawn: as
            it is, and with the method. After [`read`] with the losses of both.
        plan (`ExtensionPlan`): of the method.
        in_force (`Mapping[str, torch.Tensor]`): rotary frequencies of the model as it is by set, radians per token.
    """

    found: Diagnosis
    plan: ExtensionPlan
    in_force: Mapping[str, torch.Tensor]

    @property
    def trained_length(self) -> int:
        """Tokens that the plan counts from."""
        return self.plan.trained_length


def applicable(scheme: PositionalScheme) -> list[str]:
    """Names of the methods that extend a scheme, those that need no more than a factor."""
    names = []
    for name in (info.name for info in list_methods(scheme.kind) if info.name != "none"):
        try:
            as_method(name).plan(scheme, factor=FACTOR, trained_length=scheme.trained_length or READ)
        except PosExtError:
            continue
        names.append(name)
    return names


def first_look(shelf: Shelf, name: str, length: int | None = None, trained: int | None = None) -> Diagnosis:
    """A model as it is, with the trained length that is known of it, if any.

    Args:
        shelf ([`Shelf`]): that the model is on.
        name (`str`): of the model.
        length (`int`, *optional*): tokens to look at; four times the trained length if not given.
        trained (`int`, *optional*): trained length in tokens, overriding what is found.

    Raises:
        PosExtError: it cannot be opened or looked at.
    """
    model, _ = shelf.open(name)
    found = diagnose(model, methods=[], target_length=length, trained_length=trained)
    known = shelf.known_length(name)
    if found.trained_length or not known:
        return found
    found = diagnose(model, methods=[], target_length=length, trained_length=known)
    return replace(found, trained_length_source="as all shipped models were")


def look(shelf: Shelf, choice: Choice) -> View:
    """What the weights tell of a choice; no text is read.

    Raises:
        InvalidParameterError: a length or factor out of bounds, or a trained length that nothing tells.
        PosExtError: the model cannot be opened, or the method does not apply to it.
    """
    found = first_look(shelf, choice.model, choice.length, choice.trained_length)
    trained = found.trained_length
    if trained is None:
        raise InvalidParameterError(f"nothing tells the length that {choice.model} was trained on; give it in tokens")
    if choice.length > SHOWN * trained:
        raise InvalidParameterError(
            f"length is {choice.length}; give {SHOWN * trained} tokens at most, {SHOWN} times the trained length"
        )
    if not 1 <= choice.factor <= LARGEST_FACTOR:
        raise InvalidParameterError(f"factor is {choice.factor:g}; give 1 to {LARGEST_FACTOR}")
    plan = as_method(choice.method).plan(found.scheme, factor=choice.factor, trained_length=trained)
    model, _ = shelf.open(choice.model)
    signals = [position_signal(model, found.scheme, entry, choice.length, trained) for entry in (None, plan)]
    in_force = frequencies_in_force(model, choice.length) if found.scheme.rotaries else {}
    return View(replace(found, signals=tuple(signal for signal in signals if signal is not None)), plan, in_force)


def read(shelf: Shelf, choice: Choice) -> View:
    """A choice with the loss by position, as the model is and with the method, and with the verdict on both.

    Raises:
        InvalidParameterError: more tokens than are read here, or than the method makes positions for; no texts.
        DocumentError: the texts are too short.
        PosExtError: as of [`look`], and a model that cannot be measured.
    """
    view = look(shelf, choice)
    if choice.length > READ:
        raise InvalidParameterError(
            f"length is {choice.length}, and the page reads {READ} tokens at most; choose less here, or take the "
            "command line for it: hf-posext explain MODEL --dataset TEXTS --methods METHOD --target-length TOKENS"
        )
    if view.found.scheme.ends and choice.length > view.plan.target_length:
        raise InvalidParameterError(
            f"{view.plan.method} makes {view.plan.target_length} positions by factor {choice.factor:g}, and length is "
            f"{choice.length}; choose a larger factor or a smaller length"
        )
    model, tokenizer = shelf.open(choice.model)
    plans = {} if view.plan.changes_nothing else {view.plan.method: view.plan}
    texts = shelf.documents()
    rows = long_rows(texts, tokenizer, view.found, shelf.start, exactly=True)
    found = read_documents(model, texts, rows, view.found, plans, 0, attention=False)
    return replace(view, found=replace(found, verdict=verdict(found)))


def effect(view: View) -> str:
    """In one sentence, what the method does to the loss: means over the stretches of the curves, those that lie past
    the trained length, and those up to there.

    Args:
        view ([`View`]): after [`read`].
    """
    lines, trained, method = view.found.tables["losses"], view.trained_length, view.plan.method
    if view.plan.changes_nothing:
        return f"{method} changes nothing, so that there is nothing to compare."

    def mean(curve: str, past: bool) -> str:
        inside = lines.begin >= trained if past else lines.end <= trained
        own = lines[(lines.curve == curve) & inside]
        return f"{np.average(own.nll, weights=own.end - own.begin):.2f}"

    own = lines[lines.curve == "none"]
    as_it_is = f"{mean('none', True)} nats per token as it is" if own.begin.max() >= trained else "undefined as it is"
    return (
        f"Past token {trained} the loss is {as_it_is} and {mean(method, True)} with {method}; up to there it is "
        f"{mean('none', False)} and {mean(method, False)}."
    )
