"""Pictures of a diagnosis: the signal that encodes the position of a token, and the loss by position.

In all pictures blue marks positions or phases seen in training, and orange marks unseen ones. [`plot_classes`] draws a
column for each model, with its signal above and its loss by position below.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Patch as Swatch
from matplotlib.ticker import FixedLocator, MaxNLocator

from ..errors import InvalidParameterError
from .drawing import BEFORE, CONTROL, GRID, INK, dress_axes, label_of, method_styles, new_figure, note, save_figure
from .tables import short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..diagnosis import Diagnosis, Signal

SHOWN, NEW = "#0072B2", "#D55E00"
"""Okabe and Ito's blue and vermilion, which colour-blind readers can distinguish."""

MAPS = (
    LinearSegmentedColormap.from_list("shown", ["#FFFFFF", "#7FB8DA", SHOWN, "#00263D"]),
    LinearSegmentedColormap.from_list("new", ["#FFFFFF", "#F2B68C", NEW, "#4D2200"]),
)
ABREAST = 4
TALLEST = 128
"""Minimum number of image rows of a heat map. Fewer channels are repeated, which keeps their edges sharp."""

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


def plot_diagnosis(diagnosis: Diagnosis, path: str | Path) -> None:
    """Draw the signal of one model, unpatched and with each method, above the loss by position if measured."""
    signals, measured = diagnosis.signals, "losses" in diagnosis.tables
    columns = min(ABREAST, max(1, len(signals)))
    rows = -(-len(signals) // columns)
    heights = [1.9] * rows + [2.7] * measured
    figure = new_figure(1.0 + sum(heights))
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    for index, signal in enumerate(signals):
        panel = figure.add_subplot(grid[index // columns, index % columns])
        draw_signal(panel, signal, diagnosis)
        panel.set_ylabel(channel_label(signal) if index % columns == 0 else "")
        panel.set_xlabel(f"{signal.over} (tokens)" if index + columns >= len(signals) else "")
    lines: list[Any] = []
    if measured:
        panel = figure.add_subplot(grid[-1, :])
        panel.set_title("Loss by position")
        panel.set_ylabel("loss (nats per token)")
        draw_losses(panel, diagnosis)
        lines = panel.get_legend_handles_labels()[0]
    figure.suptitle(_title(diagnosis), fontsize=12, fontweight="bold", color=INK)
    legend(figure, [*colour_handles(SHADES.get(diagnosis.scheme.kind, "")), *lines])
    save_figure(figure, path)


def _title(diagnosis: Diagnosis) -> str:
    length = f"trained on {diagnosis.trained_length} tokens" if diagnosis.trained_length else "trained length unknown"
    return f"{short_name(Path(diagnosis.model).name)}: {KINDS[diagnosis.scheme.kind]}, {length}"


def channel_label(signal: Signal) -> str:
    """Return the label beside the channels of a signal."""
    return f"{signal.channel}s" if signal.channel == "head" else f"{signal.channel}s\n(fast above slow)"


def draw_signal(panel: Axes, signal: Signal, diagnosis: Diagnosis) -> None:
    """Draw a heat map of channels by tokens, in blue if seen in training, and darker for larger values."""
    values = signal.values
    if signal.channel == "dimension":  # dimensions have different scales, so each is standardized
        is_trained = signal.at < (diagnosis.trained_length or diagnosis.target_length)
        trained = (
            values[:, is_trained] if is_trained.sum() > 1 else values
        )  # a distant target leaves one column or none
        mean, deviation = np.nanmean(trained, 1, keepdims=True), np.nanstd(trained, 1, keepdims=True)
        values = ((values - mean) / np.maximum(deviation, 1e-12)).clip(-2, 2)
    elif diagnosis.scheme.kind == "alibi":  # weight at an equal score, relative to the nearest token
        values = np.exp(values)
    low, high = np.nanmin(values), np.nanmax(values)
    share = (values - low) / max(high - low, 1e-12)
    image = np.where(signal.unseen[..., None], MAPS[1](share), MAPS[0](share))
    image[np.isnan(values)] = (0.93, 0.93, 0.93, 1.0)  # positions without a value
    image = image.repeat(-(-TALLEST // len(image)), axis=0)
    extent = (0.0, float(diagnosis.target_length), float(len(signal.channels)), 0.0)
    panel.imshow(image, aspect="auto", interpolation="antialiased", extent=extent)
    panel.set_title("as it is" if signal.method == "none" else short_name(signal.method))
    panel.set_yticks([])
    dress(panel, diagnosis)


def draw_losses(panel: Axes, diagnosis: Diagnosis) -> None:
    """Draw the loss by position of the unpatched model, its short-context baseline, and each measured method."""
    lines = diagnosis.tables["losses"]
    level = f"last {diagnosis.provenance['context']} tokens"
    methods = [name for name in dict.fromkeys(lines.curve) if name not in ("none", level)]
    styles: dict[str, Any] = {name: {**style, "markersize": 4} for name, style in method_styles(methods).items()}
    dashes = ":" if "truncated" in methods else "--"  # the control is grey and dashed, too
    styles |= {"none": {"color": BEFORE}, level: {"color": CONTROL, "linestyle": dashes, "zorder": 2.5}}
    names = {"none": "as it is", level: "as it is, short context"}
    for name in ("none", *methods, level):
        curve = lines[lines.curve == name]
        middles, style = (curve.begin + curve.end) / 2, {**styles[name], "linewidth": 1.7}
        panel.plot(middles, curve.nll, label=names.get(name, label_of(short_name(name))), markevery=4, **style)
        if name != level and curve.low.notna().all():
            panel.fill_between(middles, curve.low, curve.high, color=style["color"], alpha=0.1, linewidth=0)
    panel.set_xlim(0, diagnosis.target_length)
    panel.set_xlabel("position (tokens)")
    panel.grid(axis="y", color=GRID, linewidth=0.8)
    dress(panel, diagnosis)
    if diagnosis.departure:
        panel.axvline(diagnosis.departure, color=NEW, linewidth=1.3)
    text = f"departs at token {diagnosis.departure}" if diagnosis.departure else "does not depart"
    note(panel, text, diagnosis.departure or diagnosis.trained_length or 0, 1.0, ("data", "axes fraction"))


def dress(panel: Axes, diagnosis: Diagnosis) -> None:
    """Set ticks at multiples of the trained length if they fit, and mark the trained length."""
    trained, target = diagnosis.trained_length, diagnosis.target_length
    if trained and target <= 6 * trained:
        panel.xaxis.set_major_locator(FixedLocator(list(range(0, target + trained // 8, trained))))
    else:
        panel.xaxis.set_major_locator(MaxNLocator(4))
    if trained:
        panel.axvline(trained, color=INK, linewidth=1.0, linestyle=":")
    dress_axes(panel)


def colour_handles(shade: str = "") -> list[Any]:
    """Return the legend handles of the colours, their shades, and the dotted line."""
    return [
        Swatch(color=SHOWN, label=f"shown in training{shade}"),
        Swatch(color=NEW, label="never shown in training"),
        Line2D([], [], color=INK, linewidth=1.0, linestyle=":", label="trained length"),
    ]


def legend(figure: Figure, handles: list[Any]) -> None:
    """Draw one legend for all panels, below them."""
    place: Any = {"loc": "outside lower center", "ncols": 3}
    figure.legend(handles=handles, frameon=False, fontsize=9, **place)


CLASSES = {"none": "No generalization", "extrapolation": "Extrapolation", "interpolation": "Interpolation"}
MODELS_ABREAST = 3
"""Maximum number of models in a row."""

LINES = 3
"""Number of channels drawn of each signal, except for signals by head."""

SHARES = (0.8, 0.35, 0.15)
"""Approximate rotations of the drawn rotary pairs within the trained length. Full rotations leave no unseen phase."""

SLOWEST = 4
"""Minimum number of cycles of a wave within the trained length. Slower waves count as trends."""

WAVES = 6
"""Number of cycles of a table's waves drawn on either side of the trained length."""

LOWEST = -32.0
"""Lower end of the axis of ALiBi biases, in nats. The weight `exp(-32)` is negligible."""


def plot_classes(runs: Sequence[Diagnosis], path: str | Path) -> None:
    """Draw a column for each model to a PNG: its position signal past the trained length, and its loss.

    Three models reproduce the textbook figure. Models without a signal are left out. If a rotary model was diagnosed
    with a method, the phases under the first method are drawn dashed.

    Raises:
        InvalidParameterError: the target is too long to draw the trained rows of a table in ten columns or more.
    """
    runs = [diagnosis for diagnosis in runs if diagnosis.signals]
    measured = ["losses" in diagnosis.tables for diagnosis in runs]
    columns = min(MODELS_ABREAST, len(runs))
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
        low, high = zip(*(lower.get_ylim() for lower in lowers), strict=True)
        panel.set_ylim(min(low), max(high))
        panel.tick_params(labelleft=bool(panel.get_ylabel()) or panel is lowers[0])
    handles = (
        [line for line in lowers[0].get_lines() if str(line.get_label()).startswith("as it is")] if lowers else []
    )
    legend(figure, [*colour_handles(), *handles])
    save_figure(figure, path)


def draw_class(panel: Axes, diagnosis: Diagnosis) -> None:
    """Draw a few channels of the signal as lines, or all of them if the channels are heads."""
    signal = diagnosis.signals[0]
    panel.set_title(CLASSES[diagnosis.generalization], pad=18)
    name = short_name(f"{Path(diagnosis.model).name}, {KINDS[diagnosis.scheme.kind]}")
    panel.annotate(name, (0.5, 1.04), xycoords="axes fraction", ha="center", fontsize=9.5, color=INK)
    panel.set_xlabel(f"{signal.over} (tokens)")
    dress(panel, diagnosis)
    panel.set_xlim(0, diagnosis.target_length)
    if signal.channel == "head":
        for line in range(len(signal.channels)):
            _line(panel, signal, line)
        if diagnosis.scheme.kind == "alibi":
            panel.set_ylim(LOWEST, 1)
        panel.set_ylabel(f"{signal.quantity}\nof {len(signal.channels)} heads")
        return
    trained = diagnosis.trained_length or diagnosis.target_length
    chosen = _slow_pairs(diagnosis) if signal.channel == "rotary pair" else _waves(panel, signal, trained)
    low, high = panel.get_xlim()
    is_visible = (signal.at >= low) & (signal.at <= high)
    squeezed = diagnosis.signals[1] if signal.channel == "rotary pair" and len(diagnosis.signals) > 1 else None
    for place, line in enumerate(chosen):
        scale = 2.6 * float(np.nanmax(np.abs(signal.values[line, is_visible])))
        _line(panel, signal, line, place, scale)
        if squeezed is not None:
            _line(panel, squeezed, line, place, scale, linewidth=2.2, linestyle=(0, (4, 1)))
    if squeezed is not None:
        text = f"dashed: {short_name(squeezed.method)}"
        panel.annotate(text, (1.0, 1.0), xycoords="axes fraction", ha="right", va="top", fontsize=8.5, color=SHOWN)
    panel.set_ylim(0.5 - LINES, 0.75)
    panel.set_yticks([])
    panel.set_ylabel(f"{signal.quantity}\nof {LINES} {signal.channel}s")


def _line(panel: Axes, signal: Signal, line: int, place: int = 0, scale: float = 1.0, **style: Any) -> None:
    """Draw one channel, in blue if seen in training and in orange otherwise."""
    values = signal.values[line] / scale - place
    for is_unseen, colour in ((False, SHOWN), (True, NEW)):
        inside = signal.unseen[line] == is_unseen
        inside[:-1] |= inside[1:]  # overlap by one column, so that the colours meet
        panel.plot(signal.at, np.where(inside, values, np.nan), color=colour, **{"linewidth": 1.4, **style})


def _slow_pairs(diagnosis: Diagnosis) -> list[int]:
    if "frequencies" not in diagnosis.tables:  # the trained length is unknown
        count = len(diagnosis.signals[0].channels)
        return [round(share * (count - 1)) for share in (0.3, 0.5, 0.7)]
    lines = diagnosis.tables["frequencies"]
    turns = lines[lines.set == lines.set.iloc[0]].turns.to_numpy()
    return [int(np.abs(np.log(turns / share)).argmin()) for share in SHARES]


def _waves(panel: Axes, signal: Signal, trained: int) -> list[int]:
    """Return the dimensions with the largest share of power at one frequency, and zoom the panel to their waves."""
    rows = signal.values[:, signal.at < trained]
    if rows.shape[1] < 2 * (SLOWEST + 1):
        raise InvalidParameterError(
            f"Expected a picture that shows a wave of the {trained} tokens of training, got one up to token "
            f"{signal.at[-1]}, in which they are {rows.shape[1]} of {len(signal.at)} columns. Pass "
            f"target_length={32 * trained}."
        )
    steps = np.vander(np.linspace(-1, 1, rows.shape[1]), 3)
    rows = rows - (steps @ np.linalg.lstsq(steps, rows.T, rcond=None)[0]).T  # subtract the quadratic trend
    power = np.abs(np.fft.rfft(rows * np.hanning(rows.shape[1]), axis=1)) ** 2
    peaks = (power[:, :-2] + power[:, 1:-1] + power[:, 2:])[:, SLOWEST - 1 :]
    chosen = np.argsort(-peaks.max(1) / np.maximum(power.sum(1), 1e-30))[:LINES]
    width = min(trained, round(WAVES * trained / (SLOWEST + peaks[chosen].argmax(1).mean())))
    panel.set_xlim(trained - width, trained + width)
    panel.set_xticks([trained - width, trained, trained + width])
    return [int(line) for line in chosen]


def _name_methods(panel: Axes, diagnosis: Diagnosis) -> None:
    """Label the line of each method in the panel, because models have different methods."""
    lines = diagnosis.tables["losses"]
    styles = method_styles([signal.method for signal in diagnosis.signals[1:]])
    for signal in diagnosis.signals[1:]:
        end = lines[lines.curve == signal.method].iloc[-4:]
        height = end.high.max() if end.high.notna().all() else end.nll.max()
        place: Any = {"ha": "right", "va": "bottom", "fontsize": 8.5, "color": styles[signal.method]["color"]}
        panel.annotate(short_name(signal.method), (diagnosis.target_length, height), **place)
