"""The report of a comparison: figures for machines, a table, a picture and words for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..evaluation.texts.files import write_atomically
from .heatmaps import heatmap_files, write_heatmaps
from .merge import differences, merge_runs, merged_grids, run_titles
from .plots import plot_gain_by_position, plot_perplexity, plot_side_by_side
from .sentences import describe_methods
from .tables import NOTHING, control_name, control_rows, grids, legacy_mark, markdown_table, notes, scheme_name

if TYPE_CHECKING:
    from ..evaluation import Results

PROTOCOLS = {
    "prefix": "each document is read once, from its first scored token to the longest length, and the value at a "
    "length L is over the first L tokens. A token is conditioned on all tokens before it. Where positions depend on "
    "the length of the input, each length is read afresh.",
    "sliding": "a window of L tokens moves over the document by the stride, and scores the tokens that no earlier "
    "window has scored; each is counted once. Truncated, a window is read as many tokens at a time as the trained "
    "length has.",
    "rolling": "disjoint windows of L tokens, those of lm-eval: each scores the L tokens after its first, the last "
    "window begins earlier to be as long. Truncated, a window is read as many tokens at a time as the trained length "
    "has.",
    "tail": "each document is read as by `prefix`, and of its first L tokens only the last K count, given all tokens "
    "before them.",
    "legacy-yarn": "legacy, for comparison with old tables: the windows of `sliding`, and the mean over windows of "
    "the mean in each, as YaRN's script has it. The first window weighs as much as any other, and tokens do not weigh "
    "the same.",
    "legacy-longlora": "legacy, for comparison with old tables: all documents in one stream, overlapping windows of L "
    "tokens, all of their tokens scored, and the mean over batches of 32 windows of the mean in each, as LongLoRA's "
    "script has it. Windows cross the borders of documents, and tokens do not weigh the same.",
    "pseudo": "pseudo-perplexity of an encoder. Of the first L tokens of each document, 64 that are spread evenly are "
    "scored, each masked alone and given all others before and after it; truncated, those in a window of the trained "
    "length around it.",
    "seq2seq": "the encoder reads the first L - K tokens of each document, and the decoder is scored on the next "
    "K = min(128, L / 4), each given those before it; truncated, the encoder reads the last tokens of its text, as "
    "many as the trained length.",
}


def write_report(results: Results, directory: str | Path) -> Path:
    """Writes `results.json`, `results.csv`, `perplexity.png`, `gain_by_position.png` where there is a control,
    `retrieval.csv` and a heat map for each method where retrieval was asked for, and `README.md`, each in one step.

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
    if has_positions(results):
        plot_gain_by_position(results, directory / "gain_by_position.png")
    if results.retrieval:
        results.save_retrieval_csv(directory / "retrieval.csv")
        write_heatmaps(results, directory)
    return write_atomically(directory / "README.md", render_report(results))


def render_report(results: Results) -> str:
    """The text of the report, in markdown.

    Args:
        results ([`~hf_posext.evaluation.Results`]): rows of one comparison.
    """
    provenance = dict(results.provenance)
    return render_template(
        "report.md.jinja",
        [results],
        model=provenance.get("model", "a model"),
        sentences=describe_methods(results),
        grids=grids(results),
        heatmaps=heatmap_files(results),
        notes=notes(results),
        control=control_name(results),
        trained_length=provenance.get("trained_length"),
        command=provenance.pop("command", None),
        provenance=flatten(provenance),
    )


def write_merged_report(runs: Mapping[str, Results], directory: str | Path) -> Path:
    """Writes several runs side by side: `README.md`, `perplexity.png`, and `results.csv` with the rows of all.

    Runs of one model that were measured in the same way become one; all others stay apart, and the report says by
    what they differ.

    Args:
        runs (`Mapping[str, Results]`): the runs by the name under which the report speaks of them (their file).
        directory (`str` or `Path`): made if it does not exist; files of those names are replaced.

    Returns:
        `Path`: the `README.md`.

    Raises:
        InvalidParameterError: two runs contradict each other.
        OSError: the directory cannot be written.
    """
    import pandas

    merged = merge_runs(runs)
    titles = run_titles(merged)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    frames = [run.to_frame().assign(model=title) for run, title in zip(merged, titles, strict=True)]
    table = pandas.concat([frame.dropna(axis="columns", how="all") for frame in frames])
    columns = [*frames[0].columns, *(name for name in table.columns if name not in frames[0].columns)]
    table = table.reindex(columns=["model", *(name for name in columns if name != "model")])
    write_atomically(directory / "results.csv", table.to_csv(index=False))
    plot_side_by_side(merged, titles, directory / "perplexity.png")
    text = render_template(
        "merged.md.jinja",
        merged,
        titles=titles,
        schemes=[scheme_name(run) for run in merged],
        sentences=[describe_methods(run) for run in merged],
        notes=[notes(run) for run in merged],
        grids=merged_grids(merged, titles),
        differences=differences(merged),
        files={name: run.provenance for name, run in runs.items()},
        control="truncated",
        trained_length=None,
    )
    return write_atomically(directory / "README.md", text)


def render_template(template: str, runs: Sequence[Results], **values: Any) -> str:
    # Markdown, not HTML: a name cannot break out of a table cell (see `_cell`), and there is nothing else to escape.
    environment = Environment(
        loader=PackageLoader("hf_posext.reporting", "."), undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters.update(table=markdown_table, cell=_cell)
    used = dict.fromkeys(row["protocol"] for run in runs for row in run.rows)
    return environment.get_template(template).render(
        documents=", ".join(str(max(row["documents"] for row in run.rows)) for run in runs),
        has_control=any(control_rows(run) for run in runs),
        has_positions=any(has_positions(run) for run in runs),
        has_longppl=any(row.get("longppl") is not None for run in runs for row in run.rows),
        has_retrieval=any(run.retrieval for run in runs),
        has_passkey=any(row.get("passkey") is not None for run in runs for row in run.rows),
        has_legacy=any(map(legacy_mark, runs)),
        has_bits_per_byte=any(row.get("bits_per_byte") is not None for run in runs for row in run.rows),
        has_short_context=any(run.short_context() for run in runs),
        protocols={protocol: PROTOCOLS.get(protocol, "see its documentation.") for protocol in used},
        **values,
    )


def has_positions(results: Results) -> bool:
    """Whether there is a control, and what was scored is told by stretches of the document, as the gain is then."""
    return bool(control_rows(results)) and any(record["position_nll_sums"] for record in results.per_document)


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested provenance (versions, say) as one level of names: `versions.torch`."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
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
