"""Texts of the page, as HTML. Everything that comes from models and users is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from ..diagnosis import Diagnosis
from ..methods import Composition, Method, RemapMethod, as_method
from ..reporting.signals import CLASSES, KINDS
from .view import DOCUMENTS, Gain, View, applicable

TITLE = (
    "<h1>hf-posext</h1><p>How a model encodes position, what happens past the length that it was trained on, and what "
    "a method changes.</p>"
)
METHOD = "or type one: rerope(window=128), yarn+log-n"
FIRST = ("self-extend", "table-linear")
"""Methods that are preselected if they apply. They have something to show on every tab."""


def first_method(names: Sequence[str]) -> str | None:
    """Return the method that is preselected."""
    return next((name for name in FIRST if name in names), next(iter(names), None))


def alert(message: str) -> str:
    """Return an error on one line."""
    return f'<div class="alert" role="alert">{escape(" ".join(message.split()))}</div>'


def verdict(text: str) -> str:
    """Return sentences that stand out."""
    return f'<div class="words">{escape(text)}</div>'


def plain(text: str) -> str:
    """Return a paragraph."""
    return f'<p class="plain">{escape(text)}</p>'


def facts(diagnosis: Diagnosis) -> str:
    """Return the scheme and the trained length of a model."""
    trained = f"{diagnosis.trained_length} tokens" if diagnosis.trained_length else "an unknown number of tokens"
    kind = KINDS[diagnosis.scheme.kind]
    lines = (
        (f"{kind[:1].upper()}{kind[1:]}.", f" {CLASSES[diagnosis.generalization]}: {diagnosis.reason}."),
        (f"Trained on {trained}", f" ({diagnosis.trained_length_source})."),
    )
    return "".join(f'<p class="plain"><b>{escape(head)}</b>{escape(detail)}</p>' for head, detail in lines)


def about(view: View) -> str:
    """Return the summary of the method, and its plan."""
    chosen = as_method(view.plan.method)
    methods: Sequence[Method] = chosen.components if isinstance(chosen, Composition) else (chosen,)
    lines = []
    for method in methods:
        name = escape(method.title)
        if method.url:
            name = f'<a href="{escape(method.url)}" target="_blank" rel="noreferrer">{name}</a>'
        lines.append(f'<p class="plain">{name}: {escape(method.summary())}</p>')
    return "".join(lines) + f'<p class="plain"><code>{escape(view.plan.describe().replace("->", "→"))}</code></p>'


def signal(view: View) -> str:
    """Return the text below the signal, with the measured gain of the method if it is known."""
    if not view.diagnosis.signals:
        return plain(f"{view.diagnosis.scheme.model_type} has no positions that can be drawn.")
    drawn = view.diagnosis.signals[0]
    return plain(
        f"Each line is a {drawn.channel}, each column a {drawn.over}. Orange is unseen in training. Blue under a "
        "method is necessary, not enough: a model may still read worse than with a truncated input."
    ) + gain(view.gain)


def gain(row: Gain | None) -> str:
    """Return the committed gain of a method on a shipped model."""
    if row is None:
        return plain("The gain of this method on this model is not known here. The tab Loss measures it.")
    better = "The longer context helps" if row.low > 1 else "Neither is better"
    better = "Truncating the input is the better choice" if row.high < 1 else better
    return plain(
        f"Measured: {row.method} x{row.factor:g} has a gain of {row.gain:.3f} [{row.low:.3f}, "
        f"{row.high:.3f}] over truncation at {row.length} tokens ({row.documents} documents, {row.source}). "
        f"{better}."
    )


def frequency(view: View) -> str:
    """Return the text below the frequencies."""
    if not view.diagnosis.scheme.rotaries:
        return plain(
            f"{Path(view.diagnosis.model).name} has {KINDS[view.diagnosis.scheme.kind]}, without frequencies."
        )
    return plain(
        "A pair above the dotted line makes less than one rotation within the trained length, so a longer text takes "
        "it to phases that training has not shown (orange). A method slows the pair, or keeps far tokens nearer."
    )


def mask(view: View) -> str:
    """Return the text below the mask."""
    if view.plan.bands:
        return plain(
            "Every query attends to every key before it. The colour is the distance at which the key appears. White "
            "lines separate the bands that the method treats differently."
        )
    remapping = [name for name in applicable(view.diagnosis.scheme) if isinstance(as_method(name), RemapMethod)]
    advice = f" Methods that change distances: {', '.join(remapping)}." if remapping else ""
    return plain(f"{view.plan.method} leaves every pair of tokens at its own distance.{advice}")


def loss(dataset: Path | None) -> str:
    """Return the text in place of the loss before it is measured."""
    if dataset is None:
        return plain("There are no texts to read. Start the page with hf-posext app --dataset texts.jsonl.")
    return plain(
        f"Reads the first {DOCUMENTS} texts of {dataset.name} up to the chosen length: the model as it is, under the "
        "method, and with its input truncated to the trained length. With a small model this takes seconds."
    )
