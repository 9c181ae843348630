"""The picture of a comparison: perplexity, gain over truncation and pass keys, by context length."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from ..evaluation.statistics import bootstrap_interval
from .files import write_atomically
from .tables import Row, by_method, control_name, control_rows, format_perplexity, lengths_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..evaluation import Results

# Okabe and Ito's colours, which colour-blind readers tell apart; the marker says it a second time. The unpatched
# model is black and its truncated control grey, so that the eye finds "before" at once.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BEFORE, CONTROL, GRID, INK = "#000000", "#757575", "#E6E6E6", "#333333"

# 9 inches at 200 dots are 1800 pixels: sharp at the width of a README (900), where 9 points are 12 pixels high.
WIDTH, HEIGHT, DPI = 9.0, 5.2, 200

Style = Mapping[str, Any]


def plot_perplexity(results: Results, path: str | Path) -> None:
    """Draws the perplexity of the second half of the text by length, beside the truncation control, the gain over
    that control, and pass-key accuracy where it was measured.

    Args:
        results ([`~hf_posext.evaluation.Results`]): rows of one comparison.
        path (`str` or `Path`): the PNG to write, 1800 pixels wide; replaced in one step.
    """
    methods, control = by_method(results), control_rows(results)
    has_passkey = any(row.get("passkey") is not None for row in results.rows)
    small = ([["gain"]] if control else []) + ([["passkey"]] if has_passkey else [])
    figure = Figure(
        figsize=(WIDTH, HEIGHT if len(small) == 2 else 4.2),
        dpi=DPI,
        layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06, hspace=0.04),
    )
    FigureCanvasAgg(figure)
    layout: list[Any] = [["perplexity", *panel] for panel in small] or [["perplexity"]]
    axes = figure.subplot_mosaic(layout, width_ratios=[1.35, 1] if small else None)

    styles = _styles(list(methods))
    _draw_perplexity(axes["perplexity"], results, styles)
    trained_length = results.provenance.get("trained_length")
    if trained_length:
        _note(axes["perplexity"], f"trained length {trained_length}", trained_length, 1.0, ("data", "axes fraction"))
    if control:
        _draw_gain(axes["gain"], methods, styles)
    if has_passkey:
        _draw_passkey(axes["passkey"], methods, styles)
    for name, panel in axes.items():
        is_lowest = name in (layout[-1][0], layout[-1][-1])
        _dress(panel, lengths_of(results), trained_length, is_lowest)

    handles, labels = axes["perplexity"].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False, fontsize=9.5)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_atomically(path, png.getvalue())


def _styles(names: list[str]) -> dict[str, Style]:
    """A colour and a marker for each method; their numbers are coprime, so that a pair returns after 42 methods."""
    shared = {"markersize": 6, "linewidth": 1.9, "markeredgecolor": "white", "markeredgewidth": 0.8, "capsize": 2.5}
    patched = [name for name in names if name != "none"]
    styles: dict[str, Style] = {
        name: {**shared, "color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, name in enumerate(patched)
    }
    return {"none": {**shared, "color": BEFORE, "marker": "X"}, **styles}


def _draw(
    panel: Axes, name: str, rows: Mapping[int, Row], key: str, intervals: Mapping[int, Any], style: Style
) -> None:
    """One line over the lengths at which the value is finite, with bars where there is an interval."""
    values = {length: row[key] for length, row in rows.items() if row.get(key) is not None and math.isfinite(row[key])}
    # A bootstrap interval can miss its own estimate by a hair, and matplotlib refuses a bar of negative length.
    ends = {length: intervals.get(length) or (value, value) for length, value in values.items()}
    below = [max(value - ends[length][0], 0.0) for length, value in values.items()]
    above = [max(ends[length][1] - value, 0.0) for length, value in values.items()]
    bars = [below, above] if any(intervals.values()) else None
    panel.errorbar(list(values), list(values.values()), yerr=bars, label=name, elinewidth=1.0, **style)


def _tail_intervals(results: Results, rows: Mapping[int, Row]) -> dict[int, list[float] | None]:
    """95 % intervals of the tail perplexity by length, over documents; rows have those of the whole perplexity."""
    intervals = {}
    for length, row in rows.items():
        own = [
            record
            for record in results.per_document
            if (record["method"], record["factor"], record["length"]) == (row["method"], row["factor"], length)
        ]
        nll, tokens = [record["tail_nll_sum"] for record in own], [record["tail_tokens"] for record in own]
        intervals[length] = bootstrap_interval(nll, tokens, results.provenance.get("seed", 0))
    return intervals


def _draw_perplexity(panel: Axes, results: Results, styles: Mapping[str, Style]) -> None:
    control = control_rows(results)
    if control:
        values = [row["perplexity_truncated_tail"] for row in control.values()]
        line: Style = {"color": CONTROL, "linestyle": "--", "linewidth": 1.9, "marker": "."}
        panel.plot(list(control), values, label=f"none, {control_name(results)}", **line)
    for name, rows in by_method(results).items():
        _draw(panel, name, rows, "perplexity_tail", _tail_intervals(results, rows), styles[name])
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_perplexity(value).removesuffix(".0")))
    panel.set_ylim(top=1.15 * panel.get_ylim()[1])  # room for the words beside the trained length
    panel.set_title("Perplexity of the second half of the text")
    panel.set_ylabel("perplexity per token (log scale; lower is better)")


def _draw_gain(panel: Axes, methods: Mapping[str, Mapping[int, Row]], styles: Mapping[str, Style]) -> None:
    panel.axhline(1.0, color=CONTROL, linestyle="--", linewidth=1.5)
    for name, rows in methods.items():
        intervals = {length: row.get("gain_ci95") for length, row in rows.items()}
        _draw(panel, name, rows, "gain", intervals, styles[name])
    panel.set_title("Gain over truncation")
    panel.set_ylabel("gain (above 1: context pays)")
    panel.set_ylim(0, max(1.12, panel.get_ylim()[1]))
    _note(panel, "truncation", 1.0, 1.0, ("axes fraction", "data"), ha="right", va="bottom")


def _draw_passkey(panel: Axes, methods: Mapping[str, Mapping[int, Row]], styles: Mapping[str, Style]) -> None:
    for name, rows in methods.items():
        _draw(panel, name, rows, "passkey", {}, styles[name])
    panel.set_title("Pass keys retrieved")
    panel.set_ylabel("accuracy (%)")
    panel.set_ylim(-0.06, 1.06)
    panel.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))


def _note(
    panel: Axes, text: str, x: float, y: float, coordinates: tuple[str, str], ha: Any = "left", va: Any = "top"
) -> None:
    """Words beside a line, a little off it."""
    offset = (3 if ha == "left" else 0, -3 if va == "top" else 3)
    place = {"xycoords": coordinates, "xytext": offset, "textcoords": "offset points"}
    panel.annotate(text, (x, y), **place, ha=ha, va=va, fontsize=8, color=INK)  # type: ignore[arg-type]


def _dress(panel: Axes, lengths: tuple[int, ...], trained_length: int | None, is_lowest: bool) -> None:
    """What all panels share: the lengths as ticks on a log2 axis, and where training ended."""
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator(list(lengths)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    panel.xaxis.set_minor_locator(NullLocator())
    shown = [*lengths, *([trained_length] if trained_length else [])]
    panel.set_xlim(min(shown) / 1.2, max(shown) * 1.2)
    if is_lowest:
        panel.set_xlabel("context length (tokens)", color=INK)
    else:
        panel.tick_params(labelbottom=False)
    if trained_length:
        panel.axvline(trained_length, color=INK, linewidth=1.0, linestyle=":", zorder=0)
    panel.grid(axis="y", color=GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8.5, colors=INK)
    panel.title.set(fontsize=10.5, fontweight="bold", color=INK)
    panel.yaxis.label.set(fontsize=9, color=INK)
    panel.xaxis.label.set(fontsize=9)
