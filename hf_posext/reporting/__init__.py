"""Where people look: tables, the picture, the report. Everything here is computed from `Results`."""

from .plots import plot_perplexity
from .report import render_report, write_report
from .tables import markdown_table, print_tables

__all__ = ["markdown_table", "plot_perplexity", "print_tables", "render_report", "write_report"]
