"""The pictures: perplexity, gain and passkeys by context length; gain by position; several models side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import FixedLocator, FuncFormatter

from ..evaluation.protocols.control import CONTROL
from ..evaluation.results.positions import gain_by_position, stretches
from .drawing import (
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

ABREAST = 3
"""Models beside each other; more go below."""


def plot_perplexity(results: Results, path: str | Path) -> None:
    """Draws the perplexity of the second half of the text by length, beside the truncation control, the gain over
    that control, and passkey accuracy where it was measured.

    Args:
        results ([`~hf_posext.evaluation.Results`]): rows of one comparison.
        path (`str` or `Path`): the PNG to write, 1800 pixels wide; replaced in one step.
    """
    methods = by_method(results)
    has_passkey = any(row.get("passkey") is not None for row in results.rows)
    small = ([["gain"]] if control_rows(results) else []) + ([["passkey"]] if has_passkey else [])
    figure = new_figure(5.2 if len(small) == 2 else 4.2)
    layout: list[Any] = [["perplexity", *panel] for panel in small] or [["perplexity"]]
    axes = figure.subplot_mosaic(layout, width_ratios=[1.35, 1] if small else None)

    styles = method_styles(list(methods))
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
    """Draws where in the document the longer context pays: the gain over truncation in sixteen stretches of it.

    Args:
        results ([`~hf_posext.evaluation.Results`]): of one comparison that has the control.
        path (`str` or `Path`): the PNG to write, 1800 pixels wide; replaced in one step.
    """
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
    """Draws a column for each run: perplexity of the second half of the text by length above, gain below.

    Args:
        runs (`Sequence[Results]`): one or more.
        titles (`Sequence[str]`): the name of each; the scheme of its model and how that generalizes go below it.
        path (`str` or `Path`): the PNG to write, 1800 pixels wide; replaced in one step.
    """
    styles = method_styles(list(dict.fromkeys(name for run in runs for name in by_method(run))))
    columns = min(ABREAST, len(runs))
    blocks = -(-len(runs) // columns)
    figure = new_figure(5.4 * blocks)
    # Gain rows share their scale, perplexity rows share theirs: what differs between models is what there is to see.
    axes = figure.subplots(2 * blocks, columns, squeeze=False, height_ratios=[1.6, 1] * blocks)
    uppers, lowers = axes[::2].flatten(), axes[1::2].flatten()
    for upper, lower, run, title in zip(uppers, lowers, runs, titles, strict=False):
        draw_perplexity(upper, run, styles, "none, truncated to the trained length")
        draw_gain(lower, by_method(run), styles)
        mark = legacy_mark(run).replace(": ", ":\n")  # three abreast leave no room for more
        upper.set_title(f"{title}\n{scheme_name(run)}\n{mark}".rstrip())
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
