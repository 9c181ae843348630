"""`report`: runs of several models or methods side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .console import say
from .output import output_directory


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RESULTS", help="results.json of each run.")],
    output: Annotated[Path, typer.Option(help="Directory of the report; new or empty.")],
) -> None:
    """Merge the results of several runs into one table, one picture and one report.

    Runs of one model that were measured in the same way become one run. Runs that were measured otherwise (another
    protocol, other documents) stay apart, and the report says so. OUTPUT contains README.md, perplexity.png and
    results.csv of all, and of each model results.json, the gain by position and heat maps. With one model, README.md
    begins with its model-index.
    """
    with output_directory(output):
        from ..evaluation import Results
        from ..evaluation.reading import portable
        from ..reporting import differences, merge_runs, merged_grids, notes, print_grids, run_titles
        from ..reporting import write_merged_report as write

        loaded = {portable(str(path)): Results.load_json(path) for path in runs}
        merged = merge_runs(loaded)
        titles = run_titles(merged)
        readme = write(loaded, output)
        remarks = [f"{title}: {note}" for title, run in zip(titles, merged, strict=True) for note in notes(run)]
        print_grids(merged_grids(merged, titles), [*differences(merged), *remarks])
        say(f"report: {readme}")
