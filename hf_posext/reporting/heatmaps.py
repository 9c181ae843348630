"""The picture of retrieval: what was found, by depth and length, a panel for each task."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InvalidParameterError
from .drawing import INK, new_figure, save_figure
from .tables import row_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..evaluation import Results

# Cividis rises evenly in lightness and looks the same to red-green colour-blind readers; the numbers say it again.
COLOUR_MAP = "cividis"
DARK = 0.4  # below this accuracy the cell is dark, and its number white
COLUMNS = 3


def file_names(titles: Sequence[str]) -> list[str]:
    """Each title as a part of a file's name, no two alike."""
    plain = [re.sub(r"[^A-Za-z0-9.+-]+", "_", title).strip("_") for title in titles]
    return [f"{one}-{index + 1}" if plain.count(one) > 1 else one for index, one in enumerate(plain)]


def heatmap_files(results: Results, prefix: str = "") -> dict[str, str]:
    """The PNG of each method that was asked to retrieve, by the name that it is shown under, `"yarn x8"`.

    Args:
        results ([`~hf_posext.evaluation.Results`]): rows of one comparison.
        prefix (`str`, *optional*, defaults to `""`): what the names of the files begin with.
    """
    names = list(dict.fromkeys(map(row_name, results.retrieval)))
    return {name: f"{prefix}retrieval_{plain}.png" for name, plain in zip(names, file_names(names), strict=True)}


def write_heatmaps(results: Results, directory: str | Path, prefix: str = "") -> None:
    """Draws a heat map for each method that was asked to retrieve.

    Args:
        results ([`~hf_posext.evaluation.Results`]): rows of one comparison.
        directory (`str` or `Path`): is there.
        prefix (`str`, *optional*, defaults to `""`): what the names of the files begin with.
    """
    trained_length = results.provenance.get("trained_length")
    for name, file in heatmap_files(results, prefix).items():
        rows = [row for row in results.retrieval if row_name(row) == name]
        plot_heatmaps(rows, Path(directory) / file, trained_length=trained_length, title=name)


def plot_heatmaps(
    rows: Sequence[Mapping[str, Any]], path: str | Path, *, trained_length: int | None = None, title: str | None = None
) -> None:
    """Draws accuracy by depth and length, a heat map for each task, of one model under one method.

    Args:
        rows (`Sequence[Mapping]`): of [`~hf_posext.evaluation.questions.retrieval.retrieval`], in any order.
        path (`str` or `Path`): the PNG to write, 1800 pixels wide; replaced in one step.
        trained_length (`int`, *optional*): in tokens; a dotted line parts the lengths above it from the others.
        title (`str`, *optional*): above all panels, as in `"yarn x8"`.

    Raises:
        InvalidParameterError: no rows, or two of the same task, length and depth (of two methods?).
    """
    cells = [(row["task"], row["length"], row["depth"]) for row in rows]
    if not rows or len(set(cells)) < len(cells):
        raise InvalidParameterError(
            f"{len(rows)} rows show {len(set(cells))} cells; give the rows of one retrieval, of one method at a time"
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
    """One task: lengths to the right, depths downwards as in the text."""
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
