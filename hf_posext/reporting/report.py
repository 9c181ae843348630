"""Reports of one or several comparisons: machine-readable figures, tables, pictures, and text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeVar

from ..decode import Record
from ..errors import InvalidParameterError
from ..escaping import cell, csv_cell, render
from ..evaluation.reading import write_atomically
from ..evaluation.results import Results
from ..evaluation.rows import Row
from ..evaluation.windows import CONTROL, is_legacy
from .drawing import (
    file_names,
    heatmap_files,
    plot_gain_by_position,
    plot_heatmaps,
    plot_perplexity,
    plot_side_by_side,
)
from .tables import (
    NOTHING,
    SHORT_CONTEXT,
    Grid,
    control_name,
    describe_methods,
    grids,
    legacy_mark,
    lengths_of,
    markdown_table,
    notes,
    row_name,
    scheme_name,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from huggingface_hub import EvalResult

METRICS = (
    ("perplexity", "perplexity", "Perplexity"),
    ("perplexity_tail", "perplexity", "Perplexity of the second half"),
    ("bits_per_byte", "bits_per_byte", "Bits per byte"),
    ("gain", "gain", "Gain over the truncated context"),
    ("passkey", "accuracy", "Passkey retrieval"),
)
"""Row key, metric type, and metric name of each value on the Hub."""


def results_to_model_index(results: Results, dataset_name: str | None = None) -> list[EvalResult]:
    """Convert rows to the Hub's evaluation results, which model cards display.

    The dataset configuration contains method, factor, and length, because the Hub groups results by configuration and
    would otherwise merge two lengths. The dataset arguments also contain the protocol. Missing and non-finite values
    are left out.

    [`push_results`] adds the results to a card on the Hub. [`model_card`] puts them into a new card.

    Args:
        results ([`Results`]): results of a comparison or of one model.
        dataset_name (`str`, *optional*): display name, by default the recipe or dataset in the provenance.

    Returns:
        `list[EvalResult]`: one entry per row and metric.
    """
    from huggingface_hub import EvalResult

    source = results.provenance
    dataset = source.get("dataset") or "text"
    if Path(dataset).is_absolute():
        dataset = Path(dataset).name  # cards are public, and a local path can reveal a user name
    entries = []
    for row in results.rows:
        common: dict[str, Any] = {
            "task_type": "text-generation",
            "dataset_type": dataset,
            "dataset_name": dataset_name or source.get("recipe") or dataset,
            "dataset_config": f"{row['method']} x{row['factor']:g}, {row['length']} tokens",
            "dataset_split": source.get("split"),
            "dataset_revision": source.get("revision"),
            "dataset_args": {
                key: row[key] for key in ("method", "factor", "length", "protocol", "documents", "tokens")
            },
        }
        mark = f" ({row['protocol']})" if is_legacy(row["protocol"]) else ""
        entries += [
            EvalResult(**common, metric_type=kind, metric_name=f"{name}{mark}", metric_value=row[key])
            for key, kind, name in METRICS
            if row.get(key) is not None and math.isfinite(row[key])
        ]
    return entries


def push_results(results: Results, repo_id: str, *, overwrite: bool = False, token: str | bool | None = None) -> str:
    """Add results to the card of a model on the Hub, and keep the rest of the card.

    Args:
        results ([`Results`]): results of a comparison or of one model.
        repo_id (`str`): `user/name` of a model with a card.
        overwrite (`bool`, *optional*, defaults to `False`): replace other values of the same measurement on the card
            instead of raising an error.
        token (`str` or `bool`, *optional*): Hub token, by default that of `hf auth login`.

    Returns:
        `str`: URL of the commit.

    Raises:
        ValueError: the card contains another value of the same measurement, and `overwrite` is `False`.
    """
    from huggingface_hub import metadata_update
    from huggingface_hub.repocard_data import eval_results_to_model_index

    index = eval_results_to_model_index(repo_id.rpartition("/")[2], results_to_model_index(results))
    return str(metadata_update(repo_id, {"model-index": index}, overwrite=overwrite, token=token))


MEASUREMENT = (
    "protocol",
    "stride",
    "tail",
    "start",
    "bos",
    "dataset",
    "split",
    "revision",
    "documents",
    "dtype",
    "chat",
)
"""Settings that two runs must share to be comparable."""

ASKED = ("passkeys", "retrieval")
"""Questions, which two runs must share if both have asked any."""

SAME_RUN = ("model", "trained_length", *MEASUREMENT, "longppl")

ROW = ("method", "factor", "length")
DOCUMENT = ("document", *ROW)
PROMPTS = (*ROW, "task", "depth")
"""Keys that identify a row, a document record, and a retrieval row."""

R = TypeVar("R", bound=Record)

AGREEMENT = 1e-6
"""Relative difference of NLL allowed between machines or thread counts, because of float32 sums."""


def merge_runs(runs: Mapping[str, Results]) -> list[Results]:
    """Join the runs of one model with the same settings, in order of first appearance.

    A method measured by several runs, most often `none`, is kept once, with the values of all of them. The omitted
    documents of all runs are kept. An entry contains the name of its run as `run` unless every run omitted it.

    Args:
        runs (`Mapping[str, Results]`): runs by the name used in error messages.

    Raises:
        InvalidParameterError: a run has no rows, or two runs have different NLL or token counts for one method.
    """
    groups: list[dict[str, Results]] = []
    for name, run in runs.items():
        if not run.rows:
            raise InvalidParameterError(f"Expected rows in {name}, got none. Measure again, or leave it out.")
        alike = (
            group for group in groups if not any(_differ([run, *group.values()], key) for key in (*SAME_RUN, *ASKED))
        )
        group = next(alike, None)
        if group is None:
            groups.append(group := {})
        group[name] = run
    return [_join(group) for group in groups]


def _differ(runs: Sequence[Results], key: str) -> bool:
    """Return `True` if a setting of the runs differs. Runs that have asked no questions agree with all others."""
    values = {json.dumps(_setting(run, key), sort_keys=True) for run in runs}
    return len(values - {"null"} if key in ASKED else values) > 1


def run_titles(runs: Sequence[Results]) -> list[str]:
    """Return a short unique name for each run: the model, and the settings that differ from its other runs."""
    models = [PurePath(str(run.provenance.get("model", "a model"))).name for run in runs]
    titles = []
    for run, model in zip(runs, models, strict=True):
        peers = [peer for peer, name in zip(runs, models, strict=True) if name == model]
        settings = [
            f"{key} {_setting_text(run, key)}"
            for key in (*SAME_RUN, *ASKED)
            if _differ(peers, key) and len({_setting_text(peer, key) for peer in peers}) > 1
        ]
        titles.append(f"{model} ({', '.join(settings)})" if settings else model)
    return [
        title if titles.count(title) == 1 else f"{title} #{titles[:index].count(title) + 1}"
        for index, title in enumerate(titles)
    ]


def differences(runs: Sequence[Results]) -> list[str]:
    """Return one warning if the settings of the runs differ; otherwise an empty list."""
    settings = []
    for key in (*MEASUREMENT, *ASKED):
        values = {json.dumps(_setting(run, key), sort_keys=True): _setting_text(run, key) for run in runs}
        if _differ(runs, key):
            texts = list(dict.fromkeys(values.values()))
            settings.append(f"{key} ({', '.join(texts) if len(texts) > 1 else f'{texts[0]} each, not the same'})")
    return [f"Compare within a model, not across: the runs differ in {'; '.join(settings)}."] if settings else []


def merged_grids(runs: Sequence[Results], titles: Sequence[str]) -> list[Grid]:
    """Return the grids of all runs, one per question, with the title of each run above its rows.

    The short-context check comes first, even if the first run does not contain it. The other grids follow in order of
    first appearance.
    """
    questions: dict[str, list[tuple[str, Grid]]] = {}
    for run, title in zip(runs, titles, strict=True):
        for grid in grids(run):
            questions.setdefault(grid.title, []).append((title, grid))
    tables = []
    for question in sorted(questions, key=lambda title: not title.startswith(SHORT_CONTEXT)):
        blocks = questions[question]
        lengths = tuple(sorted({length for _, grid in blocks for length in grid.lengths}))
        rows: list[tuple[str, tuple[str, ...]]] = []
        for title, grid in blocks:
            rows.append((title, ()))
            for name, cells in grid.rows:
                by_length = dict(zip(grid.lengths, cells, strict=False))  # a heading has no cells
                rows.append((name, tuple(by_length.get(length, "") for length in lengths) if cells else ()))
        remark = " ".join(f"{title}: {grid.remark}" for title, grid in blocks if grid.remark)
        tables.append(Grid(question, lengths, tuple(rows), remark))
    return tables


def _join(group: Mapping[str, Results]) -> Results:
    origins: dict[Any, tuple[str, Row]] = {}
    for name, run in group.items():
        for row in run.rows:
            origin, known = origins.setdefault(tuple(row[key] for key in ROW), (name, row))
            if not _agree(row, known):
                raise InvalidParameterError(
                    f"Expected {origin} and {name} to agree on {row_name(row)} at {row['length']} tokens, got "
                    f"perplexity {known['perplexity']} and {row['perplexity']}. Leave one of them out."
                )
    runs = list(group.values())
    refusals: dict[str, str] = {}
    for run in runs:
        refusals |= run.provenance.get("not_applicable") or {}
    provenance = {**runs[0].provenance, "not_applicable": refusals, "left_out": _left_out(group)}
    if commands := dict.fromkeys(run.provenance["command"] for run in runs if "command" in run.provenance):
        provenance["command"] = "\n".join(commands)
    return Results(
        provenance,
        _unique((row for run in runs for row in run.rows), ROW),
        _unique((record for run in runs for record in run.per_document), DOCUMENT),
        _unique((row for run in runs for row in run.retrieval), PROMPTS),
    )


def _left_out(group: Mapping[str, Results]) -> list[dict[str, Any]]:
    """Return the omitted entries of all runs: once if all runs omitted them, otherwise with the name of the run."""
    by_run = {name: run.provenance.get("left_out") or [] for name, run in group.items()}
    named: list[dict[str, Any]] = []
    for name, entries in by_run.items():
        for entry in entries:
            is_common = all(entry in omitted for omitted in by_run.values())
            named_entry = entry if is_common else {**entry, "run": name}
            if named_entry not in named:
                named.append(named_entry)
    return named


def _agree(row: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    if row["nll_sum"] is None or known["nll_sum"] is None:
        return row["nll_sum"] is known["nll_sum"]
    same_tokens = row["tokens"] == known["tokens"]
    return same_tokens and math.isclose(row["nll_sum"], known["nll_sum"], rel_tol=AGREEMENT)


def _unique(records: Iterable[R], keys: Sequence[str]) -> list[R]:
    """Return one record per value of the keys, with missing entries, such as passkeys, filled from its duplicates."""
    merged: dict[Any, R] = {}
    for record in records:
        key = tuple(record[key] for key in keys)
        known = merged.setdefault(key, record)
        missing = {name: value for name, value in record.items() if known.get(name) is None}
        merged[key] = type(known)(known, **missing)
    return list(merged.values())


def _setting(run: Results, key: str) -> Any:
    """Return a setting of a run. Earlier results contain no `chat`, which was off."""
    if key in ASKED:
        return _asked(run, key)
    value = run.provenance.get(key)
    return bool(value) if key == "chat" else value


def _asked(run: Results, key: str) -> str | None:
    """Return the questions of a run in words; `None` without answers. Only answers to the same ones are comparable."""
    seed = f"seed {run.provenance.get('seed')}"
    if key == "passkeys":
        counts = sorted({row["passkey_trials"] for row in run.rows if row.get("passkey") is not None})
        return f"{_listed(counts)} trials, {seed}" if counts else None
    counts = sorted({row["trials"] for row in run.retrieval})
    depths = sorted({row["depth"] for row in run.retrieval if row["depth"] is not None})
    where = f" at depths {_listed(depths)}" if depths else ""
    return f"{_listed(counts)} trials{where}, {seed}" if counts else None


def _listed(values: Sequence[float]) -> str:
    return "/".join(f"{value:g}" for value in values)


def _setting_text(run: Results, key: str) -> str:
    """Return a setting as a short text; for a list of documents, their number."""
    value = _setting(run, key)
    if key == "longppl" and value is not None:
        settings = (f"{name} {value[name]:g}" for name in ("alpha", "beta", "short_length") if name in value)
        return f"by {value['evaluator']} with {', '.join(settings)}"
    return f"{len(value)} document{'s' * (len(value) != 1)}" if isinstance(value, list) else str(value)


def write_report(results: Results, directory: str | Path) -> Path:
    """Write the report of one comparison to a directory.

    The files are `README.md`, `results.json`, `results.csv`, and `perplexity.png`. If the results contain the control
    by position, `gain_by_position.png` is added. If they contain retrieval, `retrieval.csv` and a heat map per method
    are added. Each file is written atomically.

    Args:
        results ([`~hf_posext.evaluation.Results`]): rows of one comparison, possibly of an interrupted run.
        directory (`str` or `Path`): created if missing. Existing files of these names are replaced.

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
    """Return the report of one comparison in markdown."""
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
    """Write several runs side by side: `README.md`, `perplexity.png`, and `results.csv` with all rows.

    Runs of one model with the same settings are merged by [`merge_runs`]. All others stay separate, and the report
    lists the settings in which they differ. For each merged run, `results.json`, `gain_by_position.png`,
    `retrieval.csv`, and heat maps are written under the conditions of [`write_report`]. Their names begin with the
    title of the run if there are several (`tiny-rope_results.json`). If a single run remains, the `README.md` begins
    with its `model-index` and can serve as the model card.

    Args:
        runs (`Mapping[str, Results]`): runs by the name used in the report, such as their file name.
        directory (`str` or `Path`): created if missing. Existing files of these names are replaced.

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
    """Return the names of the files of one run, with `None` for those that its results do not require."""
    return {
        "title": title,
        "results": f"{prefix}results.json",
        "positions": f"{prefix}gain_by_position.png" if has_positions(results) else None,
        "heatmaps": heatmap_files(results, prefix),
        "retrieval": f"{prefix}retrieval.csv" if results.retrieval else None,
    }


def _write_run(results: Results, directory: Path, prefix: str = "") -> None:
    files = run_files(results, prefix)
    results.save_json(directory / files["results"])  # first, so that a full disk cannot lose the results
    if files["positions"]:
        plot_gain_by_position(results, directory / files["positions"])
    if files["retrieval"]:
        results.save_retrieval_csv(directory / files["retrieval"])
    for name, file in files["heatmaps"].items():
        rows = [row for row in results.retrieval if row_name(row) == name]
        trained_length = results.provenance.get("trained_length")
        plot_heatmaps(rows, directory / file, trained_length=trained_length, title=name)


def _front_matter(results: Results) -> str:
    """Return the YAML metadata of a Hub model card: the name of the model and the measured values."""
    from huggingface_hub import ModelCardData

    name = PurePath(str(results.provenance.get("model", "a model"))).name
    return f"---\n{ModelCardData(model_name=name, eval_results=results_to_model_index(results)).to_yaml()}\n---\n\n"


def render_template(template: str, runs: Sequence[Results], **values: Any) -> str:
    """Return a filled-in template of reports of the runs.

    In addition to `values`, templates have `quantities`, the keys of rows of which some row has a value.
    """
    rows = [row for run in runs for row in run.rows]
    return render(
        template,
        "hf_posext.reporting",
        {"table": markdown_table, "cell": _cell},
        quantities={key for row in rows for key, value in row.items() if value is not None},
        documents=", ".join(str(max(row["documents"] for row in run.rows)) for run in runs),
        has_positions=any(has_positions(run) for run in runs),
        has_retrieval=any(run.retrieval for run in runs),
        has_legacy=any(map(legacy_mark, runs)),
        has_short_context=any(run.short_context() for run in runs),
        protocols=dict.fromkeys(row["protocol"] for row in rows),
        **values,
    )


def has_positions(results: Results) -> bool:
    """Return `True` if the control at the longest length has sums by position, which the gain plot requires."""
    longest = lengths_of(results)[-1]
    return any(
        record["method"] == CONTROL and record["length"] == longest and bool(record["position_nll_sums"])
        for record in results.per_document
    )


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested provenance to one level of names, such as `versions.torch`."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _cell(value: Any) -> str:
    """Format a value as the text of one markdown cell."""
    if isinstance(value, Mapping):  # an entry of a list: {"document": "a", "tokens": 10} becomes "a: 10"
        value = ": ".join(map(str, value.values()))
    elif isinstance(value, list | tuple):
        return ", ".join(map(_cell, value)) or NOTHING
    return NOTHING if value is None else cell(str(value))
