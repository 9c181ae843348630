"""Pictures: perplexity, gain, and passkeys by length; gain by position; models side by side; heat maps.

Each picture is a PNG, 1800 pixels wide, written atomically.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter

from ..errors import InvalidParameterError
from ..evaluation.rows import gain_by_position, stretches
from ..evaluation.windows import CONTROL
from .drawing import (
    INK,
    Style,
    draw_gain,
    draw_line,
    draw_perplexity,
    draw_truncation,
    dress,
    legend_below,
    lengths_as_ticks,
    method_styles,
    new_figure,
    note_trained_length,
    save_figure,
)
from .tables import Row, by_method, control_name, control_rows, legacy_mark, lengths_of, row_name, scheme_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..evaluation import Results

# Cividis rises evenly in lightness and looks the same to red-green colour-blind readers. Numbers repeat each value.
COLOUR_MAP = "cividis"
DARK = 0.4  # accuracy below which a cell is dark and its number white
COLUMNS = 3


def file_names(titles: Sequence[str]) -> list[str]:
    """Return a unique stem of a file name for each title."""
    plain = [re.sub(r"[^A-Za-z0-9.+-]+", "_", title).strip("_") for title in titles]
    return [f"{one}-{index + 1}" if plain.count(one) > 1 else one for index, one in enumerate(plain)]


def heatmap_files(results: Results, prefix: str = "") -> dict[str, str]:
    """Return the name of the heat map of each method with retrieval results, by its row name such as `"yarn x8"`."""
    names = list(dict.fromkeys(map(row_name, results.retrieval)))
    return {name: f"{prefix}retrieval_{plain}.png" for name, plain in zip(names, file_names(names), strict=True)}


def write_heatmaps(results: Results, directory: str | Path, prefix: str = "") -> None:
    """Draw a heat map for each method with retrieval results."""
    trained_length = results.provenance.get("trained_length")
    for name, file in heatmap_files(results, prefix).items():
        rows = [row for row in results.retrieval if row_name(row) == name]
        plot_heatmaps(rows, Path(directory) / file, trained_length=trained_length, title=name)


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
            f"{len(rows)} rows show {len(set(cells))} cells. Pass the rows of one retrieval, of one method at a time."
        )
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    columns = min(COLUMNS, len(tasks))
    blocks = -(-len(tasks) // columns)
    figure = new_figure(3.1 * blocks + 0.3)
    panels = figure.subplots(blocks, columns, squeeze=False).flatten()
    for panel, task in zip(panels, tasks, strict=False):
        image = _draw(panel, [row for row in rows if row["task"] == task], trained_length)
        panel.set_title(task, fontsize=10.5, fontweight="bold", color=INK)
    for panel in panels[len(tasks) :]:
        panel.remove()
    bar = figure.colorbar(image, ax=panels[: len(tasks)].tolist(), ticks=[0, 0.25, 0.5, 0.75, 1], aspect=30)
    bar.ax.set_yticklabels(["0", "25", "50", "75", "100"], fontsize=8.5, color=INK)
    bar.outline.set_visible(False)
    bar.set_label("accuracy (%)", fontsize=9, color=INK)
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold", color=INK)
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


ABREAST, WIDEST = 3, 28
"""Maximum number of models in a row, and width in letters that the scheme below a title must stay under."""


def plot_perplexity(results: Results, path: str | Path) -> None:
    """Draw perplexity, gain, and passkey accuracy by length to a PNG.

    The perplexity is that of the second half of the text, drawn with the truncation control. The panels of the gain
    over the control and of passkeys are drawn only if these were measured.
    """
    methods = by_method(results)
    has_passkey = any(row.get("passkey") is not None for row in results.rows)
    small = ([["gain"]] if control_rows(results) else []) + ([["passkey"]] if has_passkey else [])
    figure = new_figure(5.2 if len(small) == 2 else 4.2)
    layout: list[Any] = [["perplexity", *panel] for panel in small] or [["perplexity"]]
    axes = figure.subplot_mosaic(layout, width_ratios=[1.35, 1] if small else None)

    styles = method_styles([*methods])
    draw_perplexity(axes["perplexity"], results, styles, f"none, {control_name(results)}")
    mark = legacy_mark(results)
    axes["perplexity"].set_title(f"Perplexity\n{mark}" if mark else "Perplexity of the second half of the text")
    axes["perplexity"].set_ylabel(f"perplexity{'' if mark else ' per token'} (log scale; lower is better)")
    if "gain" in axes:
        draw_gain(axes["gain"], methods, styles)
        axes["gain"].set_title("Gain over truncation")
        axes["gain"].set_ylabel("gain (above 1: context pays)")
    if has_passkey:
        _draw_passkey(axes["passkey"], methods, styles)
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
    control = [record for record in at_longest if record["method"] == CONTROL]
    names = dict.fromkeys(row_name(record) for record in at_longest if record["method"] != CONTROL)
    styles = method_styles(list(names))
    figure = new_figure(3.6)
    panel = figure.subplots()
    draw_truncation(panel)
    for name in names:
        own = [record for record in at_longest if row_name(record) == name]
        found = gain_by_position(own, control, results.provenance.get("seed", 0))
        middles = [(stretch.begin + stretch.end) / 2 for stretch in found]
        ends = [stretch.gain_ci95 or (stretch.gain, stretch.gain) for stretch in found]
        low, high = zip(*ends, strict=True)
        panel.fill_between(middles, low, high, color=styles[name]["color"], alpha=0.15, linewidth=0)
        panel.plot(middles, [stretch.gain for stretch in found], label=name, **styles[name])
    panel.set_ylim(0, max(1.12, panel.get_ylim()[1]))
    bounds, _ = stretches(control[0])
    panel.set_xlim(bounds[0], bounds[-1])
    panel.xaxis.set_major_locator(FixedLocator([bounds[0], *lengths_of(results)]))
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
        draw_gain(lower, by_method(run), styles)
        mark = legacy_mark(run).replace(": ", ":\n")  # a column of three has no room for one line
        scheme = scheme_name(run)
        scheme = scheme if len(scheme) < WIDEST else scheme.replace(": ", ":\n")
        upper.set_title(f"{title}\n{scheme}\n{mark}".rstrip())
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


def _draw_passkey(panel: Axes, methods: Mapping[str, Mapping[int, Row]], styles: Mapping[str, Style]) -> None:
    for name, rows in methods.items():
        draw_line(panel, name, rows, "passkey", {}, styles[name])
    panel.set_title("Passkeys retrieved")
    panel.set_ylabel("accuracy (%)")
    panel.set_ylim(-0.06, 1.06)
    panel.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))
