"""Pictures: perplexity, gain, and passkeys by length; gain by position; models side by side; heat maps.

Each picture is a PNG, 1800 pixels wide, written atomically. Colours, markers, axes, and legends are the same in all.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, LogLocator, MaxNLocator, NullLocator

from ..errors import InvalidParameterError
from ..escaping import visible
from ..evaluation.reading import write_atomically
from ..evaluation.rows import averaged, bootstrap_interval, gain_by_position, stretches
from ..evaluation.windows import CONTROL as TRUNCATED
from .tables import (
    Row,
    by_method,
    control_name,
    control_rows,
    finite_interval,
    format_perplexity,
    legacy_mark,
    lengths_of,
    row_name,
    scheme_name,
    short_name,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..evaluation import Results

# Okabe and Ito's colours without blue and vermilion, which mark seen and unseen positions, plus two equally dark
# ones. Each has a different lightness. The marker repeats the distinction in grey prints. The unpatched model is
# black and its truncated control grey, which makes "before" easy to find.
COLOURS = ("#009E73", "#CC79A7", "#E69F00", "#5D3A9B", "#7CC4EC", "#994F00")
MARKERS = ("o", "s", "^", "D", "v", "p", "h", "P", "<", ">", "d")
BEFORE, CONTROL, GRID, INK = "#000000", "#757575", "#E6E6E6", "#333333"

# The first eleven have different markers. New methods are appended, because a new order would change old pictures.
STYLED = (
    "yarn linear ntk rerope self-extend dual-chunk leaky-rerope dynamic-yarn dynamic-ntk longrope llama3 theta fade "
    "decay resonance log-n string-shift sinks partial nope jet-long cope eabf self-logistic llama4-temperature "
    "alibi-linear alibi-ntk bucket-linear bucket-max-distance sinusoid-linear table-linear table-cubic table-group "
    "table-repeat table-hierarchical dpe lampe"
).split()
"""Methods in the order of their styles."""

DASHES = ("-.", (0, (5, 1.5)), (0, (1, 1.2)))
FILLS = ("full", "none", "left", "right", "top", "bottom")
"""Line styles of compositions, and marker fills of variants of one method in one picture."""

# 9 inches at 200 dpi are 1800 pixels. That is sharp at a README's width of 900, where 9 points are 12 pixels high.
WIDTH, DPI = 9.0, 200
LEGEND_COLUMNS, LEGEND_WIDTH = 6, 120  # maximum columns, and maximum width in letters
HANDLE = 10  # width of the line sample before a name and the gap after it, in letters

NOTE, LETTER = 8, 0.62  # font size of notes in points, and upper bound of their average letter width in font sizes

Style = Mapping[str, Any]


def new_figure(height: float) -> Figure:
    """Return an empty figure of the common width, `height` inches high."""
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06, hspace=0.04)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write the PNG atomically, with math markup off and control characters made visible."""
    for words in figure.findobj(Text):
        words.set_parse_math(False)
        words.set_text(visible(words.get_text()))
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_atomically(path, png.getvalue())


def label_of(name: str) -> str:
    """Return a name as the label of a line. A label that begins with `_` would be left out of legends."""
    return f" {name}" if name.startswith("_") else name


def legend_below(figure: Figure, *panels: Axes) -> None:
    """Draw one legend for all panels, each name once, in as many columns as fit."""
    handles: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(str(label), handle)
    names = [short_name(name) for name in handles]

    def width(columns: int) -> int:  # in letters; matplotlib fills columns in the same way
        return sum(max(map(len, column)) + HANDLE for column in np.array_split(names, columns))

    columns = next((n for n in range(min(LEGEND_COLUMNS, len(names)), 1, -1) if width(n) <= LEGEND_WIDTH), 1)
    place: Any = {"loc": "outside lower center", "ncols": columns, "handlelength": 3.0}  # room for a long dash
    figure.legend(list(handles.values()), names, frameon=False, fontsize=9.5, **place)


def method_styles(names: Sequence[str]) -> dict[str, Style]:
    """Return the style of each method, the same in every picture.

    Colour and marker depend on the name of the method only, not on its factor or hyper-parameters. A composition has
    those of its first component. Its other components determine the dashes of its line. Variants of one method in one
    picture have different marker fills.

    Args:
        names (`Sequence[str]`): names of rows, such as `"none"`, `"yarn x8"`, or `"rerope(window=384)+fade"`.
    """
    styles: dict[str, Style] = {}
    seen: dict[str, int] = {}
    for name in names:
        plain = re.sub(r"\([^)]*\)| x[\d.e+]+$", "", name)
        variant = seen[plain] = seen.get(plain, -1) + 1
        styles[name] = _style(plain, FILLS[variant % len(FILLS)])
    return styles


def _style(name: str, fill: str) -> Style:
    base, *others = name.split("+")
    place = _place(base)
    colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
    if base in ("none", "truncated"):
        colour, marker = (BEFORE, "X") if base == "none" else (CONTROL, ".")
    edge = {"markeredgecolor": "white", "markeredgewidth": 0.8}
    if fill != "full":
        edge = {"markeredgecolor": colour, "markeredgewidth": 1.2, "markerfacecoloralt": "white"}
    line = {"linestyle": DASHES[sum(map(_place, others)) % len(DASHES)]} if others else {}
    return {"markersize": 6, "linewidth": 1.9, "color": colour, "marker": marker, "fillstyle": fill, **edge, **line}


def _place(name: str) -> int:
    """Return the index of a method's style, computed from the name for methods of other packages."""
    return STYLED.index(name) if name in STYLED else zlib.crc32(name.encode())


STEP, SPREAD = 0.08, 0.4
"""Octaves between the lines of two methods at one length, and at most between those of the first and last."""


def draw_lines(
    panel: Axes, results: Results, key: str, styles: Mapping[str, Style], intervals: Callable[[Row], Any]
) -> None:
    """Draw a line per method over the lengths with finite values, with error bars where `intervals` gives one.

    Each line is shifted a little along the log axis of lengths. At one length error bars then stand side by side.
    """
    methods, lengths = by_method(results), lengths_of(results)
    spread = min([SPREAD, STEP * (len(methods) - 1), *np.diff(np.log2(lengths)) / 2])
    for name, shift in zip(methods, np.linspace(-spread, spread, len(methods)) / 2, strict=True):
        points = [row for row in methods[name].values() if row.get(key) is not None and math.isfinite(row[key])]
        values = np.array([row[key] for row in points])
        ends = [intervals(row) for row in points]
        # A bootstrap interval can narrowly miss its own estimate, and matplotlib rejects bars of negative length.
        low, high = np.array([end or (value, value) for end, value in zip(ends, values, strict=True)]).reshape(-1, 2).T
        bars = [(values - low).clip(0), (high - values).clip(0)] if any(ends) else None
        places = [row["length"] * 2**shift for row in points]
        panel.errorbar(places, values, yerr=bars, label=label_of(name), elinewidth=1.0, capsize=2.5, **styles[name])


class PerplexityLocator(Locator):
    """Locator of ticks on a log axis, which chooses how many there are per power of ten by the range."""

    def __call__(self) -> Any:
        assert self.axis is not None
        return self.tick_values(*self.axis.get_view_interval())

    def tick_values(self, vmin: float, vmax: float) -> Any:
        if vmax < 4 * vmin:  # too narrow for round multiples of powers of ten
            return MaxNLocator(5).tick_values(vmin, vmax)
        return LogLocator(subs=(1.0, 2.0, 3.0, 5.0) if vmax < 300 * vmin else (1.0,)).tick_values(vmin, vmax)


def draw_perplexity(panel: Axes, results: Results, styles: Mapping[str, Style], control: str) -> None:
    """Draw the tail perplexity of every method by length, and of the control under a given name."""
    truncated = control_rows(results)
    if truncated:
        values = [row["perplexity_truncated_tail"] for row in truncated.values()]
        # Above the other lines, because it often coincides with one of them and has gaps to see that one through.
        line: Style = {"color": CONTROL, "linestyle": "--", "linewidth": 1.9, "marker": ".", "zorder": 2.5}
        panel.plot(list(truncated), values, label=control, **line)
    draw_lines(panel, results, "perplexity_tail", styles, partial(_tail_interval, results))
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(PerplexityLocator())
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_perplexity(value).removesuffix(".0")))
    panel.set_ylim(top=1.15 * panel.get_ylim()[1])  # room for the note on the trained length


def draw_gain(panel: Axes, results: Results, styles: Mapping[str, Style]) -> None:
    """Draw the gain over the control by length, and the line at 1."""
    draw_truncation(panel)
    draw_lines(panel, results, "gain", styles, lambda row: finite_interval(row, "gain_ci95"))
    panel.set_ylim(0, max(1.12, panel.get_ylim()[1]))


def draw_truncation(panel: Axes) -> None:
    """Draw the line at a gain of 1, where a method equals truncation."""
    panel.axhline(1.0, color=CONTROL, linestyle="--", linewidth=1.5)
    note(panel, "truncation", 1.0, 1.0, ("axes fraction", "data"), ha="right", va="bottom")


def _tail_interval(results: Results, row: Row) -> list[float] | None:
    """Return the 95 % interval over documents of the tail perplexity of a row; `None` for one document."""
    keys = ("method", "factor", "length")
    records = [record for record in results.per_document if all(record[key] == row[key] for key in keys)]
    sums = [averaged(record, tail=True) for record in records]
    nll, weights = [nll for nll, _ in sums], [weight for _, weight in sums]
    return bootstrap_interval(nll, weights, results.provenance.get("seed", 0))


def note(
    panel: Axes, text: str, x: float, y: float, coordinates: tuple[str, str], ha: Any = "left", va: Any = "top"
) -> None:
    """Write a text beside a line, or on its other side if the panel has no room."""
    right = 0
    if coordinates[0] == "data" and ha == "left" and not _has_room(panel, text, x):
        ha, right = "right", -3
    offset = (3 if ha == "left" else right, -3 if va == "top" else 3)
    place = {"xycoords": coordinates, "xytext": offset, "textcoords": "offset points"}
    panel.annotate(text, (x, y), **place, ha=ha, va=va, fontsize=NOTE, color=INK)  # type: ignore[arg-type]


def _has_room(panel: Axes, text: str, x: float) -> bool:
    """Return `True` if a text that begins at `x` fits in the panel."""
    place = panel.transAxes.inverted().transform(panel.transData.transform((x, panel.get_ylim()[0])))[0]
    return bool((1 - place) * _letters(panel) > len(text))


def _letters(panel: Axes) -> float:
    """Return the letters that fit the width of a panel, whose size before drawing is approximate."""
    inches = panel.get_position().width * panel.figure.get_figwidth()  # type: ignore[union-attr]
    return float(inches / (LETTER * NOTE / 72))


def upright_if_crowded(panel: Axes, lengths: Sequence[int]) -> None:
    """Turn the labels of lengths upright if they do not fit side by side."""
    if len(lengths) * (max(len(str(length)) for length in lengths) + 1) > _letters(panel):
        panel.tick_params(axis="x", labelrotation=90)


def note_trained_length(panel: Axes, results: Results) -> None:
    """Label the line of the trained length, if the axis contains it."""
    trained = results.provenance.get("trained_length")
    low, high = panel.get_xlim()
    if trained and low <= trained <= high:
        note(panel, f"trained length {trained}", trained, 1.0, ("data", "axes fraction"))


def dress(panel: Axes, results: Results) -> None:
    """Draw the grid and the line of the trained length, common to all panels of results."""
    trained = results.provenance.get("trained_length")
    if trained:
        panel.axvline(trained, color=INK, linewidth=1.0, linestyle=":", zorder=0)
    panel.grid(axis="y", color=GRID, linewidth=0.8)
    dress_axes(panel)


def dress_axes(panel: Axes) -> None:
    """Set fonts and colours, draw lines above the grid, and remove the top and right frame."""
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8.5, colors=INK)
    panel.title.set(fontsize=10.5, fontweight="bold", color=INK)
    panel.yaxis.label.set(fontsize=9, color=INK)
    panel.xaxis.label.set(fontsize=9, color=INK)


def lengths_as_ticks(panel: Axes, lengths: tuple[int, ...], trained_length: int | None, *, labelled: bool) -> None:
    """Set the lengths as ticks of a log2 axis, with numbers in the lowest panel of a column."""
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator(list(lengths)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    panel.xaxis.set_minor_locator(NullLocator())
    shown = [*lengths, *([trained_length] if trained_length else [])]
    panel.set_xlim(min(shown) / 1.2, max(shown) * 1.2)
    panel.tick_params(labelbottom=labelled)
    upright_if_crowded(panel, lengths)
    panel.set_xlabel("context length (tokens)" if labelled else "")


ABREAST, LETTERS = 3, 84
"""Maximum number of models in a row, and letters of their titles that fit the width of the picture."""

# Cividis rises evenly in lightness and looks the same to red-green colour-blind readers. Numbers repeat each value.
COLOUR_MAP = "cividis"
DARK = 0.4  # accuracy below which a cell is dark and its number white
COLUMNS, CELLS = 3, 24  # maximum heat maps in a row, and cells that are wide enough for a number
LONGEST_STEM = 100
"""Most characters of a title in a file name, which systems limit to 255 bytes."""


def file_names(titles: Sequence[str]) -> list[str]:
    """Return a stem of a file name for each title, numbered if two would be the same file on some system."""
    stems = [re.sub(r"[^A-Za-z0-9.+-]+", "_", title).strip("_")[:LONGEST_STEM] for title in titles]
    counts = Counter(stem.lower() for stem in stems)
    numbered = [f"{stem}-{index + 1}" for index, stem in enumerate(stems)]
    names = [number if counts[stem.lower()] > 1 else stem for stem, number in zip(stems, numbered, strict=True)]
    return names if len({name.lower() for name in names}) == len(names) else numbered


def heatmap_files(results: Results, prefix: str = "") -> dict[str, str]:
    """Return the name of the heat map of each method with retrieval results, by its row name such as `"yarn x8"`."""
    names = list(dict.fromkeys(map(row_name, results.retrieval)))
    return {name: f"{prefix}retrieval_{plain}.png" for name, plain in zip(names, file_names(names), strict=True)}


def plot_heatmaps(
    rows: Sequence[Mapping[str, Any]], path: str | Path, *, trained_length: int | None = None, title: str | None = None
) -> None:
    """Draw the retrieval accuracy of one method by depth and length to a PNG, with a heat map per task.

    Rows are those of [`retrieval`], in any order. A dotted line separates lengths up to the trained length from longer
    ones.

    Raises:
        InvalidParameterError: there are no rows, or two rows have the same task, length, and depth, for example
            because they are of two methods.
    """
    cells = [(row["task"], row["length"], row["depth"]) for row in rows]
    if not rows or len(set(cells)) < len(cells):
        raise InvalidParameterError(
            f"Expected one row for each cell, got {len(rows)} for {len(set(cells))} cells. Pass the rows of one "
            "retrieval, of one method at a time."
        )
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    columns = max(1, min(COLUMNS, len(tasks), CELLS // len({row["length"] for row in rows})))
    blocks = -(-len(tasks) // columns)
    figure = new_figure(3.1 * blocks + 0.3)
    panels = figure.subplots(blocks, columns, squeeze=False).flatten()
    for panel, task in zip(panels, tasks, strict=False):
        image = _draw(panel, [row for row in rows if row["task"] == task], trained_length)
        panel.set_title(
            textwrap.fill(short_name(task), LETTERS // columns), fontsize=10.5, fontweight="bold", color=INK
        )
    for panel in panels[len(tasks) :]:
        panel.remove()
    bar = figure.colorbar(image, ax=panels[: len(tasks)].tolist(), ticks=[0, 0.25, 0.5, 0.75, 1], aspect=30)
    bar.ax.set_yticklabels(["0", "25", "50", "75", "100"], fontsize=8.5, color=INK)
    bar.outline.set_visible(False)
    bar.set_label("accuracy (%)", fontsize=9, color=INK)
    if title:
        figure.suptitle(textwrap.fill(short_name(title), LETTERS), fontsize=12, fontweight="bold", color=INK)
    save_figure(figure, path)


def _draw(panel: Axes, rows: Sequence[Mapping[str, Any]], trained_length: int | None) -> Any:
    """Draw the heat map of one task, with lengths to the right and depths downwards."""
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows}, key=lambda depth: depth or 0.0)
    grid = np.full((len(depths), len(lengths)), np.nan)
    for row in rows:
        accuracy = np.nan if row["accuracy"] is None else row["accuracy"]
        grid[depths.index(row["depth"]), lengths.index(row["length"])] = accuracy
    image = panel.pcolormesh(grid, cmap=COLOUR_MAP, vmin=0, vmax=1, edgecolors="white", linewidth=1.5)
    for (down, right), accuracy in np.ndenumerate(grid):
        text = "-" if np.isnan(accuracy) else f"{100 * accuracy:.0f}"
        colour = "white" if accuracy < DARK else "black"
        panel.text(right + 0.5, down + 0.5, text, ha="center", va="center", fontsize=8.5, color=colour)
    panel.invert_yaxis()
    panel.set_xticks(np.arange(len(lengths)) + 0.5, [str(length) for length in lengths])
    upright_if_crowded(panel, lengths)
    panel.set_xlabel("length (tokens)", fontsize=9, color=INK)
    has_depth = depths != [None]
    panel.set_yticks(np.arange(len(depths)) + 0.5, [f"{100 * d:.0f} %" for d in depths] if has_depth else [""])
    panel.set_ylabel("depth in the text" if has_depth else "whole text", fontsize=9, color=INK)
    panel.tick_params(labelsize=8.5, colors=INK, length=0)
    panel.spines[:].set_visible(False)
    if trained_length:
        inside = sum(length <= trained_length for length in lengths)
        panel.axvline(inside, color="white", linewidth=4.0, clip_on=False)
        panel.axvline(inside, color=INK, linewidth=1.5, linestyle=":", clip_on=False)
        panel.set_xlabel(f"length (tokens); dots: trained on {trained_length}", fontsize=9, color=INK)
    return image


def _folded(line: str, width: int) -> list[str]:
    """Return the lines of a title, divided after a colon if possible."""
    parts = [line] if len(line) < width else line.replace(": ", ":\n").splitlines()
    return [piece for part in parts for piece in textwrap.wrap(part, width)]


def plot_perplexity(results: Results, path: str | Path) -> None:
    """Draw perplexity, gain, and passkey accuracy by length to a PNG.

    The perplexity is that of the second half of the text, drawn with the truncation control. The panels of the gain
    over the control and of passkeys are drawn only if these were measured.
    """
    has_passkey = any(row.get("passkey") is not None for row in results.rows)
    small = ([["gain"]] if control_rows(results) else []) + ([["passkey"]] if has_passkey else [])
    figure = new_figure(5.2 if len(small) == 2 else 4.2)
    layout: list[Any] = [["perplexity", *panel] for panel in small] or [["perplexity"]]
    axes = figure.subplot_mosaic(layout, width_ratios=[1.35, 1] if small else None)

    styles = method_styles([*by_method(results)])
    draw_perplexity(axes["perplexity"], results, styles, f"none, {control_name(results)}")
    mark = legacy_mark(results)
    axes["perplexity"].set_title(f"Perplexity\n{mark}" if mark else "Perplexity of the second half of the text")
    axes["perplexity"].set_ylabel(f"perplexity{'' if mark else ' per token'} (log scale; lower is better)")
    if "gain" in axes:
        draw_gain(axes["gain"], results, styles)
        axes["gain"].set_title("Gain over truncation")
        axes["gain"].set_ylabel("gain (above 1: context pays)")
    if has_passkey:
        _draw_passkey(axes["passkey"], results, styles)
    for name, panel in axes.items():
        is_lowest = name in (layout[-1][0], layout[-1][-1])
        lengths_as_ticks(panel, lengths_of(results), results.provenance.get("trained_length"), labelled=is_lowest)
        dress(panel, results)
    note_trained_length(axes["perplexity"], results)
    legend_below(figure, axes["perplexity"])
    save_figure(figure, path)


def plot_gain_by_position(results: Results, path: str | Path) -> None:
    """Draw the gain over the control by position in the document to a PNG, in sixteen stretches."""
    longest = lengths_of(results)[-1]
    at_longest = [
        record for record in results.per_document if record["length"] == longest and record["position_nll_sums"]
    ]
    control = [record for record in at_longest if record["method"] == TRUNCATED]
    names = dict.fromkeys(row_name(record) for record in at_longest if record["method"] != TRUNCATED)
    styles = method_styles(list(names))
    figure = new_figure(3.6)
    panel = figure.subplots()
    draw_truncation(panel)
    for name in names:
        records = [record for record in at_longest if row_name(record) == name]
        gains = gain_by_position(records, control, results.provenance.get("seed", 0))
        middles = [(stretch.begin + stretch.end) / 2 for stretch in gains]
        low, high = zip(*(stretch.gain_ci95 or (stretch.gain, stretch.gain) for stretch in gains), strict=True)
        panel.fill_between(middles, low, high, color=styles[name]["color"], alpha=0.15, linewidth=0)
        panel.plot(middles, [stretch.gain for stretch in gains], label=label_of(name), **styles[name])
    panel.set_ylim(0, max(1.12, panel.get_ylim()[1]))
    bounds, _ = stretches(control[0])
    panel.set_xlim(bounds[0], bounds[-1])
    ticks = [longest]
    for tick in reversed((bounds[0], *lengths_of(results)[:-1])):  # on a linear axis, the shortest are crowded
        if ticks[-1] - tick >= (longest - bounds[0]) / 16:
            ticks.append(tick)
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.set_title(f"Gain over truncation by position in the document, at {longest} tokens")
    panel.set_xlabel("position in the document (tokens)")
    panel.set_ylabel("gain (above 1: context pays)")
    dress(panel, results)
    note_trained_length(panel, results)
    legend_below(figure, panel)
    save_figure(figure, path)


def plot_side_by_side(runs: Sequence[Results], titles: Sequence[str], path: str | Path) -> None:
    """Draw a column for each run to a PNG, with the tail perplexity by length above and the gain below.

    The tail is the second half of the text. Each title contains the scheme of the model and its generalization.
    """
    styles = method_styles(list(dict.fromkeys(name for run in runs for name in by_method(run))))
    columns = min(ABREAST, len(runs))
    blocks = -(-len(runs) // columns)
    figure = new_figure(5.4 * blocks)
    # All gain panels share one scale, and all perplexity panels another, which makes models comparable by eye.
    axes = figure.subplots(2 * blocks, columns, squeeze=False, height_ratios=[1.6, 1] * blocks)
    uppers, lowers = axes[::2].flatten(), axes[1::2].flatten()
    for upper, lower, run, title in zip(uppers, lowers, runs, titles, strict=False):
        draw_perplexity(upper, run, styles, "none, truncated to the trained length")
        draw_gain(lower, run, styles)
        lines = [short_name(title), *(line for line in (scheme_name(run), legacy_mark(run)) if line)]
        upper.set_title("\n".join(part for line in lines for part in _folded(line, LETTERS // columns)))
        for panel in (upper, lower):
            lengths_as_ticks(panel, lengths_of(run), run.provenance.get("trained_length"), labelled=panel is lower)
            dress(panel, run)
    for group in (uppers[: len(runs)], lowers[: len(runs)]):
        low, high = zip(*(panel.get_ylim() for panel in group), strict=True)
        for panel in group:
            panel.set_ylim(min(low), max(high))
    for panel in (*uppers[len(runs) :], *lowers[len(runs) :]):
        panel.remove()
    for upper, run in zip(uppers, runs, strict=False):
        note_trained_length(upper, run)
    for upper, lower in zip(axes[::2, 0], axes[1::2, 0], strict=True):
        upper.set_ylabel(f"perplexity{'' if any(map(legacy_mark, runs)) else ', second half'} (log scale)")
        lower.set_ylabel("gain over truncation")
    legend_below(figure, *uppers[: len(runs)])
    save_figure(figure, path)


def _draw_passkey(panel: Axes, results: Results, styles: Mapping[str, Style]) -> None:
    draw_lines(panel, results, "passkey", styles, lambda row: None)
    panel.set_title("Passkeys retrieved")
    panel.set_ylabel("accuracy (%)")
    panel.set_ylim(-0.06, 1.06)
    panel.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))
