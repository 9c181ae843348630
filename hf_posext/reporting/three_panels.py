"""The textbook's figure, of models at hand: a column each, its signal above and its loss by position below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InvalidParameterError
from .drawing import INK, new_figure, save_figure
from .signals import AFTER, KINDS, NEW, SHOWN, colour_handles, draw_losses, dress, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..diagnosis import Diagnosis, Signal

CLASSES = {"none": "No generalization", "extrapolation": "Extrapolation", "interpolation": "Interpolation"}
ABREAST = 3
"""Models beside each other; more go below."""

LINES = 3
"""Channels that are drawn of each signal."""

SHARES = (0.8, 0.35, 0.15)
"""About how often the rotary pairs that are drawn turn within the trained length: less than once, or they would not
break."""

SLOWEST = 4
"""Turns of a wave within the trained length, at least: slower ones are trends."""

WAVES = 6
"""Turns of a table's waves that are drawn on either side of the trained length."""

LOWEST = -32.0
"""Nats below which a bias is out of the picture: e to that power is nothing."""


def plot_classes(runs: Sequence[Diagnosis], path: str | Path) -> None:
    """Draws a column for each model: what its position signal does past the trained length, and what its loss does.

    A rotary model that has been diagnosed with a method has the phases of that method beside its own.

    Args:
        runs (`Sequence[Diagnosis]`): one or more; three make the textbook's figure. Models without positions that can
            be drawn are left out.
        path (`str` or `Path`): the PNG to write, 1800 pixels wide; replaced in one step.

    Raises:
        InvalidParameterError: the target is so long that a table's trained rows are fewer than ten columns.
    """
    runs = [found for found in runs if found.signals]
    measured = ["losses" in found.tables for found in runs]
    columns = min(ABREAST, len(runs))
    heights = ([2.5, 2.3] if any(measured) else [2.5]) * -(-len(runs) // columns)
    figure = new_figure(1.1 + sum(heights))
    axes = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
    rows = 2 if any(measured) else 1
    uppers, below = axes[::rows].flatten(), axes[rows - 1 :: rows].flatten()
    lowers: list[Axes] = []
    for index, (upper, lower) in enumerate(zip(uppers, below, strict=True)):
        if index >= len(runs):
            upper.remove()
        else:
            draw_class(upper, runs[index])
        if index < len(runs) and measured[index]:
            lowers.append(lower)
            draw_losses(lower, runs[index])
            _name_methods(lower, runs[index])
            lower.set_ylabel("loss (nats per token)" if index % columns == 0 else "")
        elif lower is not upper:
            lower.remove()
    for panel in lowers:
        low, high = zip(*(other.get_ylim() for other in lowers), strict=True)
        panel.set_ylim(min(low), max(high))
        panel.tick_params(labelleft=bool(panel.get_ylabel()) or panel is lowers[0])
    handles = (
        [line for line in lowers[0].get_lines() if str(line.get_label()).startswith("as it is")] if lowers else []
    )
    legend(figure, [*colour_handles(), *handles])
    save_figure(figure, path)


def draw_class(panel: Axes, found: Diagnosis) -> None:
    """A few channels of the signal as lines."""
    signal = found.signals[0]
    panel.set_title(CLASSES[found.generalization], pad=18)
    named = f"{Path(found.model).name}, {KINDS[found.scheme.kind]}"
    panel.annotate(named, (0.5, 1.04), xycoords="axes fraction", ha="center", fontsize=9.5, color=INK)
    panel.set_xlabel(f"{signal.over} (tokens)")
    dress(panel, found)
    panel.set_xlim(0, found.target_length)
    if signal.channel == "head":
        for line in range(len(signal.channels)):
            _line(panel, signal, line)
        if found.scheme.kind == "alibi":
            panel.set_ylim(LOWEST, 1)
        panel.set_ylabel(f"{signal.quantity}\nof {len(signal.channels)} heads")
        return
    trained = found.trained_length or found.target_length
    chosen = _slow_pairs(found) if signal.channel == "rotary pair" else _waves(panel, signal, trained)
    low, high = panel.get_xlim()
    visible = (signal.at >= low) & (signal.at <= high)
    squeezed = found.signals[1] if signal.channel == "rotary pair" and len(found.signals) > 1 else None
    for place, line in enumerate(chosen):
        scale = 2.6 * float(np.nanmax(np.abs(signal.values[line, visible])))
        _line(panel, signal, line, place, scale)
        if squeezed is not None:
            _line(panel, squeezed, line, place, scale, linewidth=2.2, linestyle=(0, (4, 1)))
    if squeezed is not None:
        told = f"dashed: {squeezed.method}"
        panel.annotate(told, (1.0, 1.0), xycoords="axes fraction", ha="right", va="top", fontsize=8.5, color=SHOWN)
    panel.set_ylim(0.5 - LINES, 0.75)
    panel.set_yticks([])
    panel.set_ylabel(f"{signal.quantity}\nof {LINES} {signal.channel}s")


def _line(panel: Axes, signal: Signal, line: int, place: int = 0, scale: float = 1.0, **style: Any) -> None:
    """One channel, blue as far as training has shown it."""
    values, new = signal.values[line] / scale - place, signal.new[line]
    for wanted, colour in ((False, SHOWN), (True, NEW)):
        inside = new == wanted
        inside[:-1] |= inside[1:]  # the two colours meet
        panel.plot(signal.at, np.where(inside, values, np.nan), color=colour, **{"linewidth": 1.4, **style})


def _slow_pairs(found: Diagnosis) -> list[int]:
    if "frequencies" not in found.tables:  # nothing tells the trained length
        count = len(found.signals[0].channels)
        return [round(share * (count - 1)) for share in (0.3, 0.5, 0.7)]
    lines = found.tables["frequencies"]
    turns = lines[lines.set == lines.set.iloc[0]].turns.to_numpy()
    return [int(np.abs(np.log(turns / share)).argmin()) for share in SHARES]


def _waves(panel: Axes, signal: Signal, trained: int) -> list[int]:
    """The dimensions whose power within the trained length is most at one frequency; the panel is zoomed to them."""
    rows = signal.values[:, signal.at < trained]
    if rows.shape[1] < 2 * (SLOWEST + 1):
        raise InvalidParameterError(
            f"a picture up to token {signal.at[-1]} shows no wave of the {trained} tokens of training, which are "
            f"{rows.shape[1]} of its {len(signal.at)} columns; give a shorter target_length, as {32 * trained}"
        )
    steps = np.vander(np.linspace(-1, 1, rows.shape[1]), 3)
    rows = rows - (steps @ np.linalg.lstsq(steps, rows.T, rcond=None)[0]).T  # without its trend
    power = np.abs(np.fft.rfft(rows * np.hanning(rows.shape[1]), axis=1)) ** 2
    peaks = (power[:, :-2] + power[:, 1:-1] + power[:, 2:])[:, SLOWEST - 1 :]
    chosen = np.argsort(-peaks.max(1) / np.maximum(power.sum(1), 1e-30))[:LINES]
    width = min(trained, round(WAVES * trained / (SLOWEST + peaks[chosen].argmax(1).mean())))
    panel.set_xlim(trained - width, trained + width)
    panel.set_xticks([trained - width, trained, trained + width])
    return [int(line) for line in chosen]


def _name_methods(panel: Axes, found: Diagnosis) -> None:
    """The name of each method at its own line, since each model has others."""
    lines = found.tables["losses"]
    for index, signal in enumerate(found.signals[1:]):
        own = lines[lines.curve == signal.method]
        colour = AFTER[index % len(AFTER)]
        panel.annotate(
            signal.method,
            (found.target_length, own.high.iloc[-4:].max() if own.high.notna().all() else own.nll.iloc[-4:].max()),
            ha="right",
            va="bottom",
            fontsize=8.5,
            color=colour,
        )
