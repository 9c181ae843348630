"""Several runs as one: those of one model, measured alike, become one; the others stand side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from ..errors import InvalidParameterError
from ..evaluation.results.results import Results
from .tables import SHORT_CONTEXT, Grid, grids, row_name

if TYPE_CHECKING:
    from collections.abc import Iterable

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
"""What must be the same for two numbers to be comparable."""

SAME_RUN = ("model", "trained_length", *MEASUREMENT, "longppl")

DOCUMENT = ("document", "method", "factor", "length")
PROMPTS = ("method", "factor", "task", "length", "depth")
"""What tells the records of documents, and those of retrieval, apart."""

AGREEMENT = 1e-6
"""Relative difference of NLL that another machine, or another number of threads, may make (float32 sums)."""


def merge_runs(runs: Mapping[str, Results]) -> list[Results]:
    """
    Runs of one model that were measured in the same way, joined; the order is that of the first of each.

    A method that several of them measured (`none`, most often) is kept once, with all that any of them found. What was
    left out is that of all of them, with the name of its run as `run` where not every run has left it out.

    Args:
        runs (`Mapping[str, Results]`): the runs by the name under which errors speak of them.

    Raises:
        InvalidParameterError: a run without rows, or two that give the same method another NLL.
    """
    groups: dict[str, dict[str, Results]] = {}
    for name, run in runs.items():
        if not run.rows:
            raise InvalidParameterError(f"{name} has no rows; measure again, or leave it out")
        key = json.dumps([_setting(run, key) for key in SAME_RUN], sort_keys=True)
        groups.setdefault(key, {})[name] = run
    return [_join(group) for group in groups.values()]


def run_titles(runs: Sequence[Results]) -> list[str]:
    """A short name for each run, no two alike: the model, and by what it differs from other runs of that model."""
    models = [PurePath(str(run.provenance.get("model", "a model"))).name for run in runs]
    titles = []
    for run, model in zip(runs, models, strict=True):
        peers = [other for other, name in zip(runs, models, strict=True) if name == model]
        telling = [f"{key} {_told(run, key)}" for key in SAME_RUN if len({_told(peer, key) for peer in peers}) > 1]
        titles.append(f"{model} ({', '.join(telling)})" if telling else model)
    return [
        title if titles.count(title) == 1 else f"{title} #{titles[:index].count(title) + 1}"
        for index, title in enumerate(titles)
    ]


def differences(runs: Sequence[Results]) -> list[str]:
    """A warning where runs stand in one table that were not measured in the same way; empty where all were."""
    said = []
    for key in MEASUREMENT:
        values = {json.dumps(_setting(run, key), sort_keys=True): _told(run, key) for run in runs}
        if len(values) > 1:
            said.append(f"{key} ({', '.join(values.values())})")
    return [f"Compare within a model, not across: the runs differ in {'; '.join(said)}."] if said else []


def merged_grids(runs: Sequence[Results], titles: Sequence[str]) -> list[Grid]:
    """The grids of all runs, one for each question, with the title of a run above its rows.

    What happens inside the trained length comes first, also where the first run does not tell it; the other questions
    stand in the order in which runs answer them.
    """
    questions: dict[str, list[tuple[str, Grid]]] = {}
    for run, title in zip(runs, titles, strict=True):
        for grid in grids(run):
            questions.setdefault(grid.title, []).append((title, grid))
    answers = []
    for question in sorted(questions, key=lambda title: not title.startswith(SHORT_CONTEXT)):
        found = questions[question]
        lengths = tuple(sorted({length for _, grid in found for length in grid.lengths}))
        rows: list[tuple[str, tuple[str, ...]]] = []
        for title, grid in found:
            rows.append((title, ()))
            for name, cells in grid.rows:
                by_length = dict(zip(grid.lengths, cells, strict=True)) if cells else {}
                rows.append((name, tuple(by_length.get(length, "") for length in lengths) if cells else ()))
        remark = " ".join(f"{title}: {grid.remark}" for title, grid in found if grid.remark)
        answers.append(Grid(question, lengths, tuple(rows), remark))
    return answers


def _join(group: Mapping[str, Results]) -> Results:
    first = next(iter(group.values()))
    rows: dict[Any, tuple[str, dict[str, Any]]] = {}
    for name, run in group.items():
        for row in run.rows:
            key = (row["method"], row["factor"], row["length"])
            other_name, other = rows.setdefault(key, (name, row))
            if not _agree(row, other):
                raise InvalidParameterError(
                    f"{other_name} and {name} contradict each other: {row_name(row)} at {row['length']} tokens has "
                    f"perplexity {other['perplexity']} and {row['perplexity']}; leave one of them out"
                )
            rows[key] = (other_name, _filled(other, row))
    refusals: dict[str, str] = {}
    for run in group.values():
        refusals |= run.provenance.get("not_applicable") or {}
    provenance = {**first.provenance, "not_applicable": refusals, "left_out": _left_out(group)}
    if commands := dict.fromkeys(run.provenance["command"] for run in group.values() if "command" in run.provenance):
        provenance["command"] = "\n".join(commands)
    return Results(
        provenance,
        [row for _, row in rows.values()],
        _unique((record for run in group.values() for record in run.per_document), DOCUMENT),
        _unique((row for run in group.values() for row in run.retrieval), PROMPTS),
    )


def _left_out(group: Mapping[str, Results]) -> list[dict[str, Any]]:
    """What all runs have left out once, the rest with the name of its run: another may have measured it."""
    by_run = {name: run.provenance.get("left_out") or [] for name, run in group.items()}
    told: list[dict[str, Any]] = []
    for name, entries in by_run.items():
        for entry in entries:
            own = entry if all(entry in others for others in by_run.values()) else {**entry, "run": name}
            told += [] if own in told else [own]
    return told


def _agree(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if row["nll_sum"] is None or other["nll_sum"] is None:
        return row["nll_sum"] is other["nll_sum"]
    same_tokens = row["tokens"] == other["tokens"]
    return same_tokens and math.isclose(row["nll_sum"], other["nll_sum"], rel_tol=AGREEMENT)


def _filled(row: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """A row, and where it knows nothing (no passkeys were asked for, or there was no control) what another knows."""
    return {**row, **{key: value for key, value in other.items() if row.get(key) is None}}


def _unique(records: Iterable[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """The records of all runs, those with the same values of the keys once."""
    found: dict[Any, dict[str, Any]] = {}
    for record in records:
        key = tuple(record[key] for key in keys)
        found[key] = _filled(found.get(key, record), record)
    return list(found.values())


def _setting(run: Results, key: str) -> Any:
    """A setting of a run; earlier results contain no `chat`, which was off."""
    value = run.provenance.get(key)
    return bool(value) if key == "chat" else value


def _told(run: Results, key: str) -> str:
    """A setting in a word: of the list of documents, their number."""
    value = _setting(run, key)
    if key == "longppl" and value is not None:
        settings = (f"{name} {value[name]:g}" for name in ("alpha", "beta", "short_length") if name in value)
        return f"by {value['evaluator']} with {', '.join(settings)}"
    return f"{len(value)} documents" if isinstance(value, list) else str(value)
