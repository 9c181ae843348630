"""Tables, pictures, and reports computed from `Results`."""

from ..packages import require

require("eval")

from .card import before_after, model_card, write_model_card
from .drawing import plot_gain_by_position, plot_perplexity, plot_side_by_side
from .report import (
    differences,
    merge_runs,
    merged_grids,
    push_results,
    render_report,
    results_to_model_index,
    run_titles,
    write_merged_report,
    write_report,
)
from .tables import describe_methods, markdown_table, notes, print_grids, print_tables

__all__ = [
    "before_after",
    "describe_methods",
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
