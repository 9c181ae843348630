"""Results as text: the same grids on a terminal (rich, at most 80 columns) and in markdown.

A *grid* is one question asked of every method at every length: how high is the perplexity, does the longer context
pay (`gain`), are pass keys found. The truncation control is a row of the first grid: the same tokens, scored by the
unpatched model with its context cut to the trained length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..evaluation.selection import by_reason

if TYPE_CHECKING:
    from ..evaluation import Results

WIDTH = 80
NOTHING = "-"
# Room for "theta x128" or "truncated to 131072"; a longer name is folded over two lines.
NAME_WIDTH = 20
GAP = 3  # spaces between columns, one of which is the rule that rich's box leaves blank

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Grid:
    """One question, answered for every method at every length.

    Args:
        title (`str`): What is shown, in words.
        lengths (`tuple[int, ...]`): Context lengths in tokens, ascending: the columns.
        rows (`tuple[tuple[str, tuple[str, ...]], ...]`): The name of each row and its cells, one per length; no cells
            where the row is a heading of those below it.
    """

    title: str
    lengths: tuple[int, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


SCHEMES = {
    "rotary": "RoPE",
    "learned": "learned table",
    "alibi": "ALiBi",
    "relative": "relative buckets",
    "sinusoidal": "sinusoids",
    "none": "no positions",
}
"""What readers call the kinds of positional schemes."""


def scheme_name(results: Results) -> str:
    """The scheme of the model and what it does past its trained length, `"RoPE: interpolation"`."""
    kind, generalization = results.provenance.get("kind"), results.provenance.get("generalization")
    words = "no generalization" if generalization == "none" else generalization
    return "unknown scheme" if kind is None else f"{SCHEMES.get(kind, kind)}: {words}"


def row_name(row: Row) -> str:
    """The name under which a row is shown: the method, and the factor where it has one (`"yarn x8"`)."""
    factor = row.get("factor")
    if row["method"] == "none" or factor is None:
        return str(row["method"])
    return f"{row['method']} x{factor:g}"


def by_method(results: Results) -> dict[str, dict[int, Row]]:
    """The rows by the name they are shown under, in the order of measurement, then by length, ascending."""
    methods: dict[str, dict[int, Row]] = {}
    for row in results.rows:
        methods.setdefault(row_name(row), {})[row["length"]] = row
    return {name: dict(sorted(rows.items())) for name, rows in methods.items()}


def lengths_of(results: Results) -> tuple[int, ...]:
    """Every length measured, ascending."""
    return tuple(sorted({row["length"] for row in results.rows}))


def control_rows(results: Results) -> dict[int, Row]:
    """By length, a row that carries the truncation control; the control is the same for every method."""
    found = {row["length"]: row for row in results.rows if row.get("perplexity_truncated_tail") is not None}
    return dict(sorted(found.items()))


def control_name(results: Results) -> str:
    """The name of the control, with the trained length where it is known."""
    trained = results.provenance.get("trained_length")
    return "truncated" if trained is None else f"truncated to {trained}"


def format_perplexity(value: float | None) -> str:
    """Three significant digits, more only where a whole number has more."""
    if value is None:
        return NOTHING
    if value >= 1e6:
        return f"{value:.1e}"
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def finite_interval(row: Row, key: str) -> tuple[float, float] | None:
    """The interval of a row, if it has one with two finite ends (an infinite one is read from JSON as `None`)."""
    ends = [end for end in row.get(key) or () if end is not None and math.isfinite(end)]
    return (ends[0], ends[1]) if len(ends) == 2 else None


def format_interval(interval: Sequence[float] | None) -> str:
    """A 95 % interval of a ratio, `" [0.87, 0.91]"`, or nothing."""
    return "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"


def format_change(row: Row) -> str:
    """A change with its interval in per cent, `"+9.5 % [+9.0, +10.1]"`."""
    if row.get("change") is None:
        return NOTHING
    interval = finite_interval(row, "change_ci95")
    ends = "" if interval is None else f" [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"
    return f"{100 * row['change']:+.1f} %{ends}"


def notes(results: Results) -> list[str]:
    """What the tables do not show, in words: methods that were left out, a short-context check that could not be.

    Args:
        results ([`~hf_posext.evaluation.Results`]): rows of one comparison.
    """
    refusals = by_reason(results.provenance.get("not_applicable") or {})
    said = [f"Left out: {', '.join(names)} ({reason})." for reason, names in refusals.items()]
    trained = results.provenance.get("trained_length")
    if trained and not results.short_context() and any(row["method"] != "none" for row in results.rows):
        is_measured = lengths_of(results)[0] <= trained
        missing = "`none` is not among the methods" if is_measured else f"no length up to {trained} was measured"
        said.append(f"No short-context check: {missing}.")
    return said


def _perplexity_cell(row: Row | None, suffix: str = "") -> str:
    if row is None:
        return NOTHING
    return f"{format_perplexity(row[f'perplexity{suffix}'])} ({format_perplexity(row[f'perplexity{suffix}_tail'])})"


def _gain_cell(row: Row | None, with_interval: bool) -> str:
    if row is None or row.get("gain") is None:
        return NOTHING
    return f"{row['gain']:.2f}" + (format_interval(finite_interval(row, "gain_ci95")) if with_interval else "")


def _passkey_cell(row: Row | None) -> str:
    return NOTHING if row is None or row.get("passkey") is None else f"{100 * row['passkey']:.0f} %"


def grids(results: Results) -> list[Grid]:
    """Every question the results can answer: first what happens inside the trained length, then perplexity at every
    length, gain and pass keys where they were measured.

    Args:
        results ([`~hf_posext.evaluation.Results`]): Rows of one comparison.
    """
    lengths, methods, control = lengths_of(results), by_method(results), control_rows(results)

    def rows_of(cell: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
        return tuple((name, tuple(cell(rows.get(length)) for length in lengths)) for name, rows in methods.items())

    perplexity = rows_of(_perplexity_cell)
    if control:
        cells = tuple(_perplexity_cell(control.get(length), "_truncated") for length in lengths)
        perplexity = ((control_name(results), cells), *perplexity)
    answers = [Grid("Perplexity per token (second half of the text in brackets)", lengths, perplexity)]
    short_context = results.short_context()
    if short_context:
        changes = tuple((row_name(row), (format_change(row),)) for row in short_context)
        title = "Short-context check: change of perplexity inside the trained length"
        answers.insert(0, Grid(title, (short_context[0]["length"],), changes))
    if control:
        # The interval stands at the longest length only: four of them do not fit 80 columns.
        gain = rows_of(lambda row: _gain_cell(row, with_interval=row is not None and row["length"] == lengths[-1]))
        title = "Gain over truncation, second half (above 1: the longer context pays)"
        answers.append(Grid(title, lengths, gain))
    if any(row.get("passkey") is not None for row in results.rows):
        trials = next((f", {row['passkey_trials']} trials" for row in results.rows if row.get("passkey_trials")), "")
        answers.append(Grid(f"Pass keys retrieved (greedy decoding{trials})", lengths, rows_of(_passkey_cell)))
    return answers


def _column_groups(grid: Grid, name_width: int) -> list[list[int]]:
    """Splits the columns of a grid into groups that fit the terminal beside the names."""
    groups: list[list[int]] = [[]]
    used = name_width
    for column, length in enumerate(grid.lengths):
        width = GAP + max(len(str(length)), *(len(cells[column]) for _, cells in grid.rows if cells))
        if groups[-1] and used + width > WIDTH:
            groups.append([])
            used = name_width
        groups[-1].append(column)
        used += width
    return groups


def _rich_table(grid: Grid, columns: list[int], name_width: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, GAP - 1), pad_edge=False, show_edge=False)
    table.add_column("tokens", width=name_width, overflow="fold")
    for column in columns:
        table.add_column(str(grid.lengths[column]), justify="right", no_wrap=True)
    for name, cells in grid.rows:
        table.add_row(escape(name), *(cells[column] for column in columns if cells), style=None if cells else "bold")
    return table


def print_grids(answers: Sequence[Grid], remarks: Sequence[str], console: Console | None = None) -> None:
    """Prints every grid in at most 80 columns, then the remarks; a grid of many lengths continues below itself.

    Args:
        answers (`Sequence[Grid]`): of one comparison, or of several.
        remarks (`Sequence[str]`): sentences.
        console (`rich.console.Console`, *optional*): where to; standard output if not given.
    """
    console = console or Console(width=WIDTH, highlight=False)
    name_width = min(NAME_WIDTH, max(len(name) for grid in answers for name, _ in grid.rows))
    for grid in answers:
        console.print(grid.title, style="bold")
        for columns in _column_groups(grid, name_width):
            console.print(_rich_table(grid, columns, name_width))
            console.print()
    for remark in remarks:
        console.print(escape(remark))


def print_tables(results: Results, console: Console | None = None) -> None:
    """Prints the grids and notes of one comparison.

    Args:
        results ([`~hf_posext.evaluation.Results`]): its rows.
        console (`rich.console.Console`, *optional*): where to; standard output if not given.
    """
    print_grids(grids(results), notes(results), console)


def markdown_table(grid: Grid) -> str:
    """The grid as a GitHub markdown table, without its title; headings inside it are bold."""
    header = ["tokens", *map(str, grid.lengths)]
    blank = [""] * len(grid.lengths)
    body = [[name, *cells] if cells else [f"**{name}**", *blank] for name, cells in grid.rows]
    lines = [header, ["---", *["---:"] * len(grid.lengths)], *body]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
