"""Where people look: tables, the picture, the report. Everything here is computed from `Results`."""

from ..packages import require

require("eval")

from .before_after import before_after
from .card import model_card, write_model_card
from .merge import differences, merge_runs, merged_grids, run_titles
from .model_index import push_results, results_to_model_index
from .plots import plot_gain_by_position, plot_perplexity, plot_side_by_side
from .report import render_report, write_merged_report, write_report
from .tables import markdown_table, notes
from .terminal import print_grids, print_tables

__all__ = [
    "before_after",
    "differences",
    "markdown_table",
    "merge_runs",
    "merged_grids",
    "model_card",
    "notes",
    "plot_gain_by_position",
    "plot_perplexity",
    "plot_side_by_side",
    "print_grids",
    "print_tables",
    "push_results",
    "render_report",
    "results_to_model_index",
    "run_titles",
    "write_merged_report",
    "write_model_card",
    "write_report",
]
