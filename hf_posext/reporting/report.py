"""The report of a comparison: figures for machines, a table, a picture and words for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .files import write_atomically
from .plots import plot_perplexity
from .sentences import describe_methods
from .tables import NOTHING, control_name, control_rows, grids, markdown_table

if TYPE_CHECKING:
    from ..evaluation import Results

PROTOCOLS = {
    "prefix": "each document is read once, from its first scored token to the longest length, and the value at a "
    "length L is over the first L tokens. A token is conditioned on all tokens before it. Where positions depend on "
    "the length of the input, each length is read afresh.",
    "sliding": "a window of L tokens moves over the document by the stride, and scores the tokens that no earlier "
    "window has scored; each is counted once.",
}


def write_report(results: Results, directory: str | Path) -> Path:
    """Writes `results.json`, `results.csv`, `perplexity.png` and `README.md`, each in one step.

    Args:
        results ([`~hf_posext.evaluation.Results`]): rows of one comparison; may be of a run that was interrupted.
        directory (`str` or `Path`): made if it does not exist; files of those names are replaced.

    Returns:
        `Path`: the `README.md`.

    Raises:
        OSError: the directory cannot be written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # Figures first: they are what a full disk must not cost.
    results.save_json(directory / "results.json")
    results.save_csv(directory / "results.csv")
    plot_perplexity(results, directory / "perplexity.png")
    readme = directory / "README.md"
    write_atomically(readme, render_report(results).encode())
    return readme


def render_report(results: Results) -> str:
    """The text of the report, in markdown.

    Args:
        results ([`~hf_posext.evaluation.Results`]): rows of one comparison.
    """
    # Markdown, not HTML: a name cannot break out of a table cell (see `_cell`), and there is nothing else to escape.
    environment = Environment(
        loader=PackageLoader("hf_posext.reporting", "."), undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters.update(table=markdown_table, cell=_cell)
    provenance = dict(results.provenance)
    used = dict.fromkeys(row["protocol"] for row in results.rows)
    return environment.get_template("report.md.jinja").render(
        model=provenance.get("model", "a model"),
        sentences=describe_methods(results),
        grids=grids(results),
        documents=max(row["documents"] for row in results.rows),
        has_control=bool(control_rows(results)),
        has_passkey=any(row.get("passkey") is not None for row in results.rows),
        control=control_name(results),
        trained_length=provenance.get("trained_length"),
        protocols={protocol: PROTOCOLS.get(protocol, "see its documentation.") for protocol in used},
        command=provenance.pop("command", None),
        provenance=_flatten(provenance),
    )


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested provenance (versions, say) as one level of names: `versions.torch`."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _cell(value: Any) -> str:
    """A value as the text of one markdown cell: on one line, its pipes escaped."""
    if isinstance(value, Mapping):  # of a list of them: {"document": "a", "tokens": 10} is "a: 10"
        value = ": ".join(map(str, value.values()))
    elif isinstance(value, list | tuple):
        return ", ".join(map(_cell, value)) or NOTHING
    return NOTHING if value is None else " ".join(str(value).split()).replace("|", r"\|")
