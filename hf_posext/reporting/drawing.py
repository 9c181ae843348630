"""Shared parts of pictures: colours, lines with intervals, axes, and saving."""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from ..escaping import visible
from ..evaluation.reading import write_atomically
from ..evaluation.rows import averaged, bootstrap_interval
from .tables import Row, by_method, control_rows, finite_interval, format_perplexity

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
HANDLE = 8  # width of the line sample before a name and the gap after it, in letters

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


def legend_below(figure: Figure, *panels: Axes) -> None:
    """Draw one legend for all panels, each name once, in as many columns as fit."""
    handles: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(str(label), handle)
    names = list(handles)
    fitting = (n for n in range(min(LEGEND_COLUMNS, len(names)), 1, -1) if _legend_width(names, n) <= LEGEND_WIDTH)
    place: Any = {"loc": "outside lower center", "ncols": next(fitting, 1)}
    figure.legend(list(handles.values()), names, frameon=False, fontsize=9.5, **place)


def _legend_width(names: list[str], columns: int) -> int:
    """Return the width of a legend in letters, with columns filled as matplotlib fills them."""
    return sum(max(map(len, column)) + HANDLE for column in np.array_split(names, columns))


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


def draw_line(
    panel: Axes, name: str, rows: Mapping[int, Row], key: str, intervals: Mapping[int, Any], style: Style
) -> None:
    """Draw one line over the lengths with finite values, with error bars for the lengths with an interval."""
    values = {length: row[key] for length, row in rows.items() if row.get(key) is not None and math.isfinite(row[key])}
    # A bootstrap interval can narrowly miss its own estimate, and matplotlib rejects error bars of negative length.
    ends = {length: intervals.get(length) or (value, value) for length, value in values.items()}
    below = [max(value - ends[length][0], 0.0) for length, value in values.items()]
    above = [max(ends[length][1] - value, 0.0) for length, value in values.items()]
    bars = [below, above] if any(intervals.values()) else None
    panel.errorbar(list(values), list(values.values()), yerr=bars, label=name, elinewidth=1.0, capsize=2.5, **style)


def draw_perplexity(panel: Axes, results: Results, styles: Mapping[str, Style], control: str) -> None:
    """Draw the tail perplexity of every method by length, and of the control under a given name."""
    truncated = control_rows(results)
    if truncated:
        values = [row["perplexity_truncated_tail"] for row in truncated.values()]
        line: Style = {"color": CONTROL, "linestyle": "--", "linewidth": 1.9, "marker": "."}
        panel.plot(list(truncated), values, label=control, **line)
    for name, rows in by_method(results).items():
        draw_line(panel, name, rows, "perplexity_tail", _tail_intervals(results, rows), styles[name])
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_perplexity(value).removesuffix(".0")))
    panel.set_ylim(top=1.15 * panel.get_ylim()[1])  # room for the note on the trained length


def draw_gain(panel: Axes, methods: Mapping[str, Mapping[int, Row]], styles: Mapping[str, Style]) -> None:
    """Draw the gain over the control by length, and the line at 1."""
    draw_truncation(panel)
    for name, rows in methods.items():
        intervals = {length: finite_interval(row, "gain_ci95") for length, row in rows.items()}
        draw_line(panel, name, rows, "gain", intervals, styles[name])
    panel.set_ylim(0, max(1.12, panel.get_ylim()[1]))


def draw_truncation(panel: Axes) -> None:
    """Draw the line at a gain of 1, where a method equals truncation."""
    panel.axhline(1.0, color=CONTROL, linestyle="--", linewidth=1.5)
    note(panel, "truncation", 1.0, 1.0, ("axes fraction", "data"), ha="right", va="bottom")


def _tail_intervals(results: Results, rows: Mapping[int, Row]) -> dict[int, list[float] | None]:
    """Return the 95 % interval over documents of the tail perplexity at each length; `None` for one document."""
    intervals = {}
    for length, row in rows.items():
        own = [
            record
            for record in results.per_document
            if (record["method"], record["factor"], record["length"]) == (row["method"], row["factor"], length)
        ]
        sums = [averaged(record, tail=True) for record in own]
        nll, weights = [nll for nll, _ in sums], [weight for _, weight in sums]
        intervals[length] = bootstrap_interval(nll, weights, results.provenance.get("seed", 0))
    return intervals


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
    """Return `True` if a text that begins at `x` fits in the panel, whose size before drawing is approximate."""
    place = panel.transAxes.inverted().transform(panel.transData.transform((x, panel.get_ylim()[0])))[0]
    inches = panel.get_position().width * panel.figure.get_figwidth()  # type: ignore[union-attr]
    return bool(inches * (1 - place) > LETTER * NOTE / 72 * len(text))


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
    panel.set_xlabel("context length (tokens)" if labelled else "")
