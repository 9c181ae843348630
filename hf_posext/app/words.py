"""What the page says, as HTML; whatever comes from models and users is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from ..diagnosis import Diagnosis
from ..methods import Composition, Method, RemapMethod, as_method
from ..reporting.signals import KINDS
from ..reporting.three_panels import CLASSES
from .shelf import DOCUMENTS
from .view import View, applicable

TITLE = (
    "<h1>hf-posext</h1><p>How a model tells positions apart, what becomes of it past the length it was trained on, "
    "and what a method does about it.</p>"
)
METHOD = "or type one: rerope(window=128), yarn+log-n"
FIRST = ("self-extend", "table-linear")
"""What is shown first where it applies: methods that show something on every tab, and help."""


def first_method(names: Sequence[str]) -> str | None:
    """The method that is shown before one is chosen."""
    return next((name for name in FIRST if name in names), next(iter(names), None))


def alert(message: str) -> str:
    """An error, on one line."""
    return f'<div class="alert" role="alert">{escape(" ".join(message.split()))}</div>'


def verdict(text: str) -> str:
    """Sentences that stand out."""
    return f'<div class="words">{escape(text)}</div>'


def plain(text: str) -> str:
    """A paragraph below a picture."""
    return f'<p class="plain">{escape(text)}</p>'


def facts(found: Diagnosis) -> str:
    """What a model has."""
    trained = f"{found.trained_length} tokens" if found.trained_length else "an unknown number of tokens"
    kind = KINDS[found.scheme.kind]
    lines = (
        (f"{kind[:1].upper()}{kind[1:]}.", f" {CLASSES[found.generalization]}: {found.reason}."),
        (f"Trained on {trained}", f" ({found.trained_length_source})."),
    )
    return "".join(f'<p class="plain"><b>{escape(head)}</b>{escape(rest)}</p>' for head, rest in lines)


def about(view: View) -> str:
    """What the method is, and the plan that it made."""
    chosen = as_method(view.plan.method)
    parts: Sequence[Method] = chosen.parts if isinstance(chosen, Composition) else (chosen,)
    told = []
    for part in parts:
        name = escape(part.title)
        if part.url:
            name = f'<a href="{escape(part.url)}" target="_blank" rel="noreferrer">{name}</a>'
        told.append(f'<p class="plain">{name}: {escape(part.summary())}</p>')
    return "".join(told) + f'<p class="plain"><code>{escape(view.plan.describe().replace("->", "→"))}</code></p>'


def signal(view: View) -> str:
    """Below the signal."""
    if not view.found.signals:
        return plain(f"{view.found.scheme.model_type} has no positions that can be drawn.")
    drawn = view.found.signals[0]
    return plain(
        f"Each line is a {drawn.channel}, each column a {drawn.over}. Where it is orange, training has shown nothing "
        "like it; a method that helps turns orange to blue."
    )


def frequency(view: View) -> str:
    """Below the frequencies."""
    if not view.found.scheme.rotaries:
        return plain(f"{Path(view.found.model).name} has {KINDS[view.found.scheme.kind]}, without frequencies.")
    return plain(
        "A pair above the dotted line makes less than one turn within the trained length, so that a longer text takes "
        "it to phases that training has not shown (orange). A method slows the pair, or keeps far tokens nearer."
    )


def mask(view: View) -> str:
    """Below the mask."""
    if view.plan.parts:
        return plain(
            "Every query looks back at every key before it, and this is how far away the key seems. White lines part "
            "the regions that the method treats differently."
        )
    remapping = [name for name in applicable(view.found.scheme) if isinstance(as_method(name), RemapMethod)]
    others = f" Those that do not: {', '.join(remapping)}." if remapping else ""
    return plain(f"{view.plan.method} leaves every pair of tokens at its own distance.{others}")


def loss(dataset: Path | None) -> str:
    """Where the loss will be."""
    if dataset is None:
        return plain("There are no texts to read; start the page with some: hf-posext app --dataset texts.jsonl.")
    return plain(
        f"The first {DOCUMENTS} texts of {dataset.name} are read, up to the length chosen, as the model is and with "
        "the method. That takes seconds with a small model."
    )
