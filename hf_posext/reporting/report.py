"""The report of a comparison: figures for machines, a table, a picture and words for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..evaluation.protocols.control import CONTROL
from ..evaluation.texts.files import write_atomically
from ..visible import csv_cell
from . import markdown
from .heatmaps import file_names, heatmap_files, write_heatmaps
from .merge import differences, merge_runs, merged_grids, run_titles
from .model_index import results_to_model_index
from .plots import plot_gain_by_position, plot_perplexity, plot_side_by_side
from .sentences import describe_methods
from .tables import (
    NOTHING,
    control_name,
    control_rows,
    grids,
    legacy_mark,
    lengths_of,
    markdown_table,
    notes,
    scheme_name,
)

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
    _write_run(results, directory)
    results.save_csv(directory / "results.csv")
    plot_perplexity(results, directory / "perplexity.png")
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
        written=[run_files(results)],
        notes=notes(results),
        control=control_name(results),
        trained_length=provenance.get("trained_length"),
        command=provenance.pop("command", None),
        provenance=flatten(provenance),
    )


def write_merged_report(runs: Mapping[str, Results], directory: str | Path) -> Path:
    """Writes several runs side by side: `README.md`, `perplexity.png`, and `results.csv` with the rows of all.

    Runs of one model that were measured in the same way become one; all others stay apart, and the report says by
    what they differ. What became one is written as [`write_report`] writes one: `results.json`,
    `gain_by_position.png`, `retrieval.csv`, heat maps, whose names begin with that of the model where there are
    several (`tiny-rope_results.json`). Where all became one, the `README.md` begins with its `model-index` and can be
    the card of that model.

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
    prefixes = [""] if len(merged) == 1 else [f"{name}_" for name in file_names(titles)]
    for run, prefix in zip(merged, prefixes, strict=True):
        _write_run(run, directory, prefix)
    frames = [run.to_frame().assign(model=title) for run, title in zip(merged, titles, strict=True)]
    table = pandas.concat([frame.dropna(axis="columns", how="all") for frame in frames])
    columns = [*frames[0].columns, *(name for name in table.columns if name not in frames[0].columns)]
    table = table.reindex(columns=["model", *(name for name in columns if name != "model")])
    write_atomically(directory / "results.csv", table.map(csv_cell).to_csv(index=False))
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
        written=[run_files(*each) for each in zip(merged, prefixes, titles, strict=True)],
        files={name: run.provenance for name, run in runs.items()},
        control="truncated",
        trained_length=None,
    )
    return write_atomically(directory / "README.md", f"{_front_matter(merged[0])}{text}" if len(merged) == 1 else text)


def run_files(results: Results, prefix: str = "", title: str = "") -> dict[str, Any]:
    """The files that a report has of one run, beside those of all runs together."""
    return {
        "title": title,
        "results": f"{prefix}results.json",
        "positions": f"{prefix}gain_by_position.png" if has_positions(results) else None,
        "heatmaps": heatmap_files(results, prefix),
        "retrieval": f"{prefix}retrieval.csv" if results.retrieval else None,
    }


def _write_run(results: Results, directory: Path, prefix: str = "") -> None:
    files = run_files(results, prefix)
    results.save_json(directory / files["results"])  # first: it is what a full disk must not cost
    if files["positions"]:
        plot_gain_by_position(results, directory / files["positions"])
    if files["retrieval"]:
        results.save_retrieval_csv(directory / files["retrieval"])
        write_heatmaps(results, directory, prefix)


def _front_matter(results: Results) -> str:
    """What the Hub reads of the card of a model: its name and what was measured."""
    from huggingface_hub import ModelCardData

    name = PurePath(str(results.provenance.get("model", "a model"))).name
    return f"---\n{ModelCardData(model_name=name, eval_results=results_to_model_index(results)).to_yaml()}\n---\n\n"


def render_template(template: str, runs: Sequence[Results], **values: Any) -> str:
    # Markdown, not HTML: what is from outside goes through the filters of `markdown`.
    environment = Environment(
        loader=PackageLoader("hf_posext.reporting", "."), undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters.update(
        table=markdown_table,
        cell=_cell,
        text=markdown.inline,
        alt=markdown.alt,
        code=markdown.code,
        console=markdown.console,
    )
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
    longest = lengths_of(results)[-1]
    return any(
        record["method"] == CONTROL and record["length"] == longest and bool(record["position_nll_sums"])
        for record in results.per_document
    )


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
    """A value as the text of one markdown cell."""
    if isinstance(value, Mapping):  # of a list of them: {"document": "a", "tokens": 10} is "a: 10"
        value = ": ".join(map(str, value.values()))
    elif isinstance(value, list | tuple):
        return ", ".join(map(_cell, value)) or NOTHING
    return NOTHING if value is None else markdown.cell(str(value))
