"""Where people look: tables, the picture, the report. Everything here is computed from `Results`."""

from .merge import differences, merge_runs, merged_grids, run_titles
from .plots import plot_gain_by_position, plot_perplexity, plot_side_by_side
from .report import render_report, write_merged_report, write_report
from .tables import markdown_table, notes, print_grids, print_tables

__all__ = [
    "differences",
    "markdown_table",
    "merge_runs",
    "merged_grids",
    "notes",
    "plot_gain_by_position",
    "plot_perplexity",
    "plot_side_by_side",
    "print_grids",
    "print_tables",
    "render_report",
    "run_titles",
    "write_merged_report",
    "write_report",
]
