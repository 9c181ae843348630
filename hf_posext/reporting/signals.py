"""The pictures of a diagnosis: the signal that tells a model where a token stands, and the loss by position.

One language in all of them: blue is what training has shown, orange what it has not.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Patch as Swatch
from matplotlib.ticker import FixedLocator, MaxNLocator

from .drawing import BEFORE, CONTROL, GRID, INK, dress_axes, new_figure, note, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..diagnosis import Diagnosis, Signal

SHOWN, NEW = "#0072B2", "#D55E00"
"""Okabe and Ito's blue and vermilion, which colour-blind readers tell apart."""

AFTER = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Of methods in the loss: none of the two above, which mean something else."""

MAPS = (
    LinearSegmentedColormap.from_list("shown", ["#FFFFFF", "#7FB8DA", SHOWN, "#00263D"]),
    LinearSegmentedColormap.from_list("new", ["#FFFFFF", "#F2B68C", NEW, "#4D2200"]),
)
ABREAST = 4
TALLEST = 128
"""Lines of a heat map at least: fewer channels are repeated, so that they keep sharp edges."""

SHADES = {
    "learned": " (dark: large value)",
    "sinusoidal": " (dark: large value)",
    "rotary": " (dark: cosine 1, white: -1)",
    "alibi": " (dark: as heavy as the nearest token)",
    "relative": " (dark: large bias)",
}
KINDS = {
    "learned": "learned positions",
    "alibi": "ALiBi",
    "relative": "relative buckets",
    "sinusoidal": "sinusoids",
    "rotary": "rotary positions",
    "none": "no positions",
}


def plot_diagnosis(found: Diagnosis, path: str | Path) -> None:
    """Draws the signal of one model as it is and under each method, and below it the loss by position if measured.

    Args:
        found ([`~hf_posext.diagnosis.Diagnosis`]): of the model.
        path (`str` or `Path`): the PNG to write, 1800 pixels wide; replaced in one step.
    """
    signals, measured = found.signals, "losses" in found.tables
    columns = min(ABREAST, max(1, len(signals)))
    rows = -(-len(signals) // columns)
    heights = [1.9] * rows + [2.7] * measured
    figure = new_figure(1.0 + sum(heights))
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    for index, signal in enumerate(signals):
        panel = figure.add_subplot(grid[index // columns, index % columns])
        draw_signal(panel, signal, found)
        panel.set_ylabel(channel_label(signal) if index % columns == 0 else "")
        panel.set_xlabel(f"{signal.over} (tokens)" if index + columns >= len(signals) else "")
    lines: list[Any] = []
    if measured:
        panel = figure.add_subplot(grid[-1, :])
        panel.set_title("Loss by position")
        panel.set_ylabel("loss (nats per token)")
        draw_losses(panel, found)
        lines = panel.get_legend_handles_labels()[0]
    figure.suptitle(_title(found), fontsize=12, fontweight="bold", color=INK)
    legend(figure, [*colour_handles(SHADES.get(found.scheme.kind, "")), *lines])
    save_figure(figure, path)


def _title(found: Diagnosis) -> str:
    length = f"trained on {found.trained_length} tokens" if found.trained_length else "trained length unknown"
    return f"{Path(found.model).name}: {KINDS[found.scheme.kind]}, {length}"


def channel_label(signal: Signal) -> str:
    """What stands beside the channels of a signal."""
    return f"{signal.channel}s" if signal.channel == "head" else f"{signal.channel}s\n(fast above slow)"


def draw_signal(panel: Axes, signal: Signal, found: Diagnosis) -> None:
    """Channels downwards, tokens to the right; blue where training has shown it, the darker the larger."""
    values = signal.values
    if signal.channel == "dimension":  # each has a size of its own
        shown = signal.at < (found.trained_length or found.target_length)
        own = values[:, shown] if shown.sum() > 1 else values  # far from the target, one column holds all of them
        values = (values - np.nanmean(own, 1, keepdims=True)) / np.maximum(np.nanstd(own, 1, keepdims=True), 1e-12)
        values = values.clip(-2, 2)
    elif found.scheme.kind == "alibi":  # the weight of an equal score, beside that of the nearest token
        values = np.exp(values)
    low, high = np.nanmin(values), np.nanmax(values)
    share = (values - low) / max(high - low, 1e-12)
    image = np.where(signal.new[..., None], MAPS[1](share), MAPS[0](share))
    image[np.isnan(values)] = (0.93, 0.93, 0.93, 1.0)  # no such row
    image = image.repeat(-(-TALLEST // len(image)), axis=0)
    extent = (0.0, float(found.target_length), float(len(signal.channels)), 0.0)
    panel.imshow(image, aspect="auto", interpolation="antialiased", extent=extent)
    panel.set_title("as it is" if signal.method == "none" else signal.method)
    panel.set_yticks([])
    dress(panel, found)


def draw_losses(panel: Axes, found: Diagnosis) -> None:
    """The loss by position of the model as it is, of its level, and of each method that was measured."""
    lines = found.tables["losses"]
    level = f"last {found.provenance['context']} tokens"
    methods = [name for name in dict.fromkeys(lines.curve) if name not in ("none", level)]
    styles: dict[str, Any] = {name: {"color": AFTER[i % len(AFTER)]} for i, name in enumerate(methods)}
    styles |= {"none": {"color": BEFORE}, level: {"color": CONTROL, "linestyle": "--", "zorder": 1}}
    names = {"none": "as it is", level: "as it is, short context"}
    for name in ("none", *methods, level):
        own = lines[lines.curve == name]
        middles = (own.begin + own.end) / 2
        panel.plot(middles, own.nll, linewidth=1.7, label=names.get(name, name), **styles[name])
        if name != level and own.low.notna().all():
            panel.fill_between(middles, own.low, own.high, color=styles[name]["color"], alpha=0.1, linewidth=0)
    panel.set_xlim(0, found.target_length)
    panel.set_xlabel("position (tokens)")
    panel.grid(axis="y", color=GRID, linewidth=0.8)
    dress(panel, found)
    if found.departure:
        panel.axvline(found.departure, color=NEW, linewidth=1.3)
    told = f"departs at token {found.departure}" if found.departure else "does not depart"
    note(panel, told, found.departure or found.trained_length or 0, 1.0, ("data", "axes fraction"))


def dress(panel: Axes, found: Diagnosis) -> None:
    """Ticks at multiples of the trained length, and where training ended."""
    trained, target = found.trained_length, found.target_length
    if trained and target <= 6 * trained:
        panel.xaxis.set_major_locator(FixedLocator(list(range(0, target + trained // 8, trained))))
    else:
        panel.xaxis.set_major_locator(MaxNLocator(4))
    if trained:
        panel.axvline(trained, color=INK, linewidth=1.0, linestyle=":")
    dress_axes(panel)


def colour_handles(shade: str = "") -> list[Any]:
    """What the colours, their shades and the dotted line mean."""
    return [
        Swatch(color=SHOWN, label=f"shown in training{shade}"),
        Swatch(color=NEW, label="never shown in training"),
        Line2D([], [], color=INK, linewidth=1.0, linestyle=":", label="trained length"),
    ]


def legend(figure: Figure, handles: list[Any]) -> None:
    """One for all panels, below them."""
    place: Any = {"loc": "outside lower center", "ncols": 3}
    figure.legend(handles=handles, frameon=False, fontsize=9, **place)
