"""Grids on a terminal, in at most 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..visible import visible
from .tables import Grid, grids, notes

if TYPE_CHECKING:
    from ..evaluation import Results

WIDTH = 80
# Room for "theta x128" or "truncated to 131072"; a longer name is folded over two lines.
NAME_WIDTH = 20
GAP = 3  # spaces between columns, one of which is the rule that rich's box leaves blank
HEAD = "tokens"
"""What stands over the names: it tells what the heads of the other columns are."""


def _plain(text: str) -> str:
    """A text from outside, of which the terminal and rich's markup make nothing."""
    return escape(visible(text))


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
    table.add_column(HEAD, width=name_width, overflow="fold")
    for column in columns:
        table.add_column(str(grid.lengths[column]), justify="right", no_wrap=True)
    for name, cells in grid.rows:
        table.add_row(
            _plain(name), *(_plain(cells[column]) for column in columns if cells), style=None if cells else "bold"
        )
    return table


def print_grids(answers: Sequence[Grid], remarks: Sequence[str], console: Console | None = None) -> None:
    """Prints every grid in at most 80 columns, then the remarks; a grid of many lengths continues below itself.

    Args:
        answers (`Sequence[Grid]`): of one comparison, or of several.
        remarks (`Sequence[str]`): sentences.
        console (`rich.console.Console`, *optional*): where to; standard output if not given.
    """
    console = console or Console(width=WIDTH, highlight=False)
    names = [HEAD, *(name for grid in answers for name, _ in grid.rows)]
    name_width = min(NAME_WIDTH, max(map(len, names)))
    for grid in answers:
        console.print(_plain(grid.title), style="bold")
        for columns in _column_groups(grid, name_width):
            console.print(_rich_table(grid, columns, name_width))
            console.print()
    for remark in remarks:
        console.print(_plain(remark))


def print_tables(results: Results, console: Console | None = None) -> None:
    """Prints the grids and notes of one comparison.

    Args:
        results ([`~hf_posext.evaluation.Results`]): its rows.
        console (`rich.console.Console`, *optional*): where to; standard output if not given.
    """
    print_grids(grids(results), notes(results), console)
