"""Content of the page: figures, and the texts beside them as HTML, in which everything from outside is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.lines import Line2D

from ..diagnosis import Diagnosis
from ..diagnosis.weights import phase_table, planned_frequencies, relative_positions
from ..methods import Composition, Method, RemapMethod, as_method
from ..methods.rotary import first_rotary
from ..patching.kernels.bands import belongs
from ..reporting import signals
from ..reporting.drawing import COLOURS, CONTROL, GRID, INK, dress_axes, new_figure, note
from .view import DOCUMENTS, Gain, View, applicable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELLS = 512
"""Largest number of queries and keys in a mask. Longer texts are sampled evenly."""

STEPS = 256
"""Number of colours of a mask."""


def signal_figure(view: View) -> Figure | None:
    """Return the signal of positions, as it is and under the method; `None` if none can be drawn."""
    drawn = view.diagnosis.signals
    if not drawn:
        return None
    figure = new_figure(3.6)
    for panel, signal in zip(figure.subplots(1, 2, sharey=True), drawn, strict=True):
        signals.draw_signal(panel, signal, view.diagnosis)
        panel.set_xlabel(f"{signal.over} (tokens)")
    figure.axes[0].set_ylabel(signals.channel_label(drawn[0]))
    signals.legend(figure, signals.colour_handles(signals.SHADES[view.diagnosis.scheme.kind]))
    return figure


def frequency_figure(view: View) -> Figure | None:
    """Return the wavelength of each rotary pair, as it is and under the method; `None` without rotary positions.

    A pair is orange if the text needs unseen phases of it.
    """
    scheme = view.diagnosis.scheme
    if not scheme.rotaries:
        return None
    rotary, length = first_rotary(scheme), view.diagnosis.target_length
    phases = phase_table(scheme, view.in_force, {"none": None, "after": view.plan}, view.trained_length, length)
    figure = new_figure(4.0)
    panel = figure.subplots()
    styles: tuple[tuple[str, Any, dict[str, Any]], ...] = (
        ("none", None, {"marker": "o", "markersize": 8.5, "color": CONTROL}),
        ("after", view.plan, {"marker": "s", "markersize": 4.5, "color": INK}),
    )
    for name, plan, style in styles:
        radians = planned_frequencies(rotary, view.in_force, plan, length)[: rotary.pairs].double().numpy()
        tokens = 2 * np.pi / np.where(radians > 0, radians, np.nan)  # a pair that stands still has no wavelength
        new = phases[(phases.method == name) & (phases.set == rotary.name)].new.to_numpy()
        panel.plot(tokens, linewidth=1.2, label=_names(view)[name], **style | {"markersize": 0})
        for unseen, colour in ((False, signals.SHOWN), (True, signals.NEW)):
            points = np.where(new == unseen, tokens, np.nan)
            panel.plot(points, linestyle="", markeredgecolor="white", **style | {"color": colour})
    _mark_trained_length(panel, view, 0.0)
    panel.set_yscale("log")
    panel.set_title("Wavelength of each rotary pair")
    panel.set_xlabel("rotary pair (fast to slow)")
    panel.set_ylabel("tokens per rotation")
    panel.grid(axis="y", color=GRID, linewidth=0.8)
    dress_axes(panel)
    series = [
        Line2D([], [], linewidth=1.2, label=_names(view)[name], **style | {"markeredgecolor": "white"})
        for name, _, style in styles
    ]
    signals.legend(figure, [*series, *signals.colour_handles()])
    return figure


def mask_figure(view: View) -> Figure | None:
    """Return the relative position of each query and key, as it is and under the method; `None` if both are equal."""
    plan, length, trained = view.plan, view.diagnosis.target_length, view.trained_length
    if not plan.bands:
        return None
    figure = new_figure(4.1)
    panels = figure.subplots(1, 3)
    tokens = (
        torch.from_numpy(np.unique(np.arange(CELLS) * length // CELLS)) if length > CELLS else torch.arange(length)
    )
    colours = {"cmap": _distance_colours(trained, length), "vmin": 0, "vmax": length}
    ticks = np.arange(0, length + 1, trained * -(-length // (4 * trained)) if length > trained else length)
    for panel, name, entry in zip(panels, ("none", "after"), (None, plan), strict=False):
        grid = relative_positions(entry, tokens, tokens).numpy()
        extent = (0.0, float(length), float(length), 0.0)
        unseen = np.isnan(grid) & np.tri(len(tokens), dtype=bool)
        panel.imshow(np.where(unseen, 0.5, np.nan), cmap="gray", vmin=-1, vmax=1, aspect="auto", extent=extent)
        image = panel.imshow(grid, **colours, aspect="auto", interpolation="nearest", extent=extent)
        panel.set_title(_names(view)[name])
        panel.set_xlabel("key (token)")
        # A key has no distance, so none is the trained one.
        signals.dress(panel, replace(view.diagnosis, trained_length=None))
        panel.set_xticks(ticks)
        panel.set_yticks(ticks)
    _draw_band_edges(panels[1], view, tokens)
    panels[0].set_ylabel("query (token)")
    panels[1].tick_params(labelleft=False)
    _draw_last_query(panels[2], view)
    bar = figure.colorbar(image, ax=list(panels[:2]), orientation="horizontal", aspect=40)
    bar.set_label("relative position (tokens): blue within the trained length, orange past it", fontsize=9, color=INK)
    bar.set_ticks([0, trained, length] if trained < length else [0, length])
    bar.ax.tick_params(labelsize=8.5, colors=INK)
    return figure


def loss_figure(view: View) -> Figure:
    """Return the loss by position, as it is and under the method, of a view that [`~hf_posext.app.view.read`] made."""
    figure = new_figure(3.8)
    panel = figure.subplots()
    panel.set_title("Loss by position")
    panel.set_ylabel("loss (nats per token)")
    signals.draw_losses(panel, view.diagnosis)
    signals.legend(figure, [*panel.get_legend_handles_labels()[0], signals.colour_handles()[-1]])
    return figure


def _names(view: View) -> dict[str, str]:
    return {"none": "as it is", "after": fill(f"{view.plan.method} x{view.plan.factor:g}", 26)}


def _distance_colours(trained: int, length: int) -> Colormap:
    """Return blue up to the trained length and orange from there on, darker with the distance."""
    middles = (np.arange(STEPS) + 0.5) * length / STEPS
    inside, outside = 0.12 + 0.6 * middles / trained, 0.3 + 0.6 * (middles - trained) / max(length - trained, 1)
    colours = np.where((middles < trained)[:, None], signals.MAPS[0](inside), signals.MAPS[1](outside))
    return ListedColormap(colours).with_extremes(bad=(1.0, 1.0, 1.0, 0.0))


def _draw_band_edges(panel: Axes, view: View, tokens: torch.Tensor) -> None:
    """Draw white lines between the bands of a plan."""
    number = np.zeros((len(tokens), len(tokens)))
    for place, band in enumerate(view.plan.bands):
        number[belongs(band, tokens, tokens).numpy()] = place
    number[np.triu_indices(len(tokens), 1)] = 0
    if number.any():
        levels = np.arange(len(view.plan.bands)) + 0.5
        panel.contour(tokens.numpy(), tokens.numpy(), number, levels=levels, colors="white", linewidths=1.0)


def _draw_last_query(panel: Axes, view: View) -> None:
    """Draw the relative position of each key, seen from the last token."""
    length = view.diagnosis.target_length
    apart = np.arange(length)
    relative = relative_positions(view.plan, torch.tensor([length - 1]), torch.from_numpy(length - 1 - apart))[
        0
    ].numpy()
    panel.plot(apart, apart, color=CONTROL, linewidth=1.2, linestyle="--")
    panel.plot(apart, relative, color=COLOURS[0], linewidth=1.9)
    _mark_trained_length(panel, view, 1.0, ha="right")
    panel.set_title("seen from the last token")
    panel.set_xlabel("distance in the text (tokens)")
    panel.set_ylabel("relative position (tokens)")
    signals.dress(panel, view.diagnosis)
    panel.set_xlim(0, length)
    top = max(1.3 * view.trained_length, 1.1 * np.nanmax(relative))
    panel.set_ylim(0, top)
    note(panel, " as it is", min(top, 0.7 * length), 1.0, ("data", "axes fraction"))


def _mark_trained_length(panel: Axes, view: View, x: float, **alignment: Any) -> None:
    """Draw a dotted line at the trained length, which is on the vertical axis, and name it."""
    panel.axhline(view.trained_length, color=INK, linewidth=1.0, linestyle=":")
    text = f"trained length {view.trained_length}"
    note(panel, text, x, view.trained_length, ("axes fraction", "data"), va="bottom", **alignment)


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
    kind = signals.KINDS[diagnosis.scheme.kind]
    lines = (
        (f"{kind[:1].upper()}{kind[1:]}.", f" {signals.CLASSES[diagnosis.generalization]}: {diagnosis.reason}."),
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
            f"{Path(view.diagnosis.model).name} has {signals.KINDS[view.diagnosis.scheme.kind]}, without frequencies."
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
