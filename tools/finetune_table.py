"""Write `docs/finetune_results.md` and its picture from the results of `benchmarks/finetune.py`.

python tools/finetune_table.py            # write both; the page lists missing runs
python tools/finetune_table.py --check    # exit 1 if the committed page is out of date
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from pages import ROOT, fill, publish
from pages import table as markdown

from hf_posext.evaluation.rows import bootstrap_interval, pooled_perplexity
from hf_posext.reporting.drawing import (
    BEFORE,
    COLOURS,
    CONTROL,
    GRID,
    INK,
    MARKERS,
    legend_below,
    new_figure,
    note,
    save_figure,
)
from hf_posext.reporting.tables import NOTHING, format_perplexity

RESULTS = ROOT / "benchmarks" / "results" / "finetune.json"
CANDIDATES = ROOT / "benchmarks" / "results" / "finetune_candidates.json"
PAGE = ROOT / "docs" / "finetune_results.md"
PICTURE = ROOT / "docs" / "images" / "finetune.png"
TEMPLATE = ROOT / "tools" / "finetune_results.md.jinja"

METHODS = ("none", "linear", "ntk", "theta", "yarn")
TRAININGS = ("untrained", "lora", "lora-plus", "full", "pose-lora")
"""Methods and trainings of a complete result file, whose runs are named `method/training`."""

FADED = "rerope+fade"
"""Method that is trained by LoRA only, at its own learning rate."""

Run = Mapping[str, Any]


def load(path: Path) -> dict[str, Any]:
    """Load a result file of `benchmarks/finetune.py`.

    Raises:
        ValueError: if it contains no runs.
    """
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if not content.get("runs"):
        raise ValueError(f"Expected runs in {path}, got none. Run benchmarks/finetune.py --output {path}.")
    return content


def longest(run: Run) -> Run:
    """Return the row at the longest length."""
    row: Run = run["rows"][-1]
    return row


def trains_all(run: Run) -> bool:
    return "parameters" in run and run["parameters"]["trained"] == run["parameters"]["model"]


def share_of_full(name: str, runs: Mapping[str, Run]) -> float | None:
    """Return the gain of a run as a share of training all weights, in ln of tail perplexity at the longest length.

    `None` if a run without training or with all weights trained is missing, or if training gained nothing.
    """
    method = name.partition("/")[0]
    start = runs.get(f"{method}/untrained")
    fully_trained = [
        run for name_of_run, run in runs.items() if name_of_run.startswith(f"{method}/") and trains_all(run)
    ]
    if start is None or not fully_trained or runs[name] is start:
        return None
    untrained = longest(start)["perplexity_tail"]
    gained = math.log(untrained / min(longest(run)["perplexity_tail"] for run in fully_trained))
    return math.log(untrained / longest(runs[name])["perplexity_tail"]) / gained if gained > 0 else None


def ratio(run: Run, baseline: Run, seed: int) -> tuple[float, list[float] | None]:
    """Return the ratio of tail perplexities of two runs at the longest length, and its interval paired by document."""
    length = longest(run)["length"]
    records, baseline_records = (
        {r["document"]: r for r in side["per_document"] if r["length"] == length} for side in (run, baseline)
    )
    difference = [records[name]["tail_nll_sum"] - baseline_records[name]["tail_nll_sum"] for name in records]
    tokens = [record["tail_tokens"] for record in records.values()]
    return float(pooled_perplexity(difference, tokens)), bootstrap_interval(difference, tokens, seed)


def percent(value: float) -> str:
    return f"{100 * value:+.1f} %"


def table(content: Mapping[str, Any]) -> str:
    """Return the table of runs, ordered by method and training."""
    runs, trials = content["runs"], content["settings"]["passkey"]
    first, *_, last = content["settings"]["lengths"]
    heads = ["", f"perplexity at {first}", f"change at {first}", f"perplexity at {last}", "gain"]
    heads += [*([f"passkeys at {last}"] if trials else []), "of full", "trained parameters"]
    lines = []
    for name in ordered(runs):
        run, row = runs[name], longest(runs[name])
        share, parameters = share_of_full(name, runs), run.get("parameters")
        cells = [
            name,
            format_perplexity(run["rows"][0]["perplexity_tail"]),
            percent(run["short_context_change"]),
            format_perplexity(row["perplexity_tail"]),
            f"{row['gain']:.3f}",
            *([f"{round(row['passkey'] * trials)} of {trials}"] if trials else []),
            NOTHING if share is None else f"{100 * share:.0f} %",
            f"{parameters['trained']:,} ({parameters['trained'] / parameters['model']:.1%})"
            if parameters
            else NOTHING,
        ]
        lines.append(cells)
    return markdown(heads, lines)


def ordered(runs: Mapping[str, Run]) -> list[str]:
    """Return the names of runs in the order of `METHODS` and `TRAININGS`, then others."""

    def place(name: str) -> tuple[int, int]:
        method, _, training = name.partition("/")
        return (*METHODS, FADED).index(method), TRAININGS.index(training) if training in TRAININGS else len(TRAININGS)

    return sorted(runs, key=place)


def sentences(content: Mapping[str, Any]) -> list[str]:
    """Return sentences on the runs: the best, its gain over truncation, embeddings and norms, and missing runs."""
    runs, length = content["runs"], content["settings"]["lengths"][-1]
    best = min(runs, key=lambda name: longest(runs[name])["perplexity_tail"])
    above = [f"`{name}`" for name in ordered(runs) if longest(runs[name])["gain"] > 1]
    gain = f"The best at {length} tokens is `{best}`, with a gain over truncation of {longest(runs[best])['gain']:.3f}"
    lines = [
        f"{gain}. Above 1, where the longer context helps, are {', '.join(above)}."
        if above
        else f"{gain}. None is above 1, so by perplexity truncating the input is as good or better.",
        *without_gain(content),
        *embeddings_and_norms(content),
    ]
    unmeasured = [f"`{m}/{t}`" for m in METHODS for t in TRAININGS if f"{m}/{t}" not in runs]
    return [*lines, f"Not measured yet: {', '.join(unmeasured)}."] if unmeasured else lines


def without_gain(content: Mapping[str, Any]) -> list[str]:
    """Return a sentence on the methods whose perplexity rose by training all weights."""
    runs, length = content["runs"], content["settings"]["lengths"][-1]
    worse = [
        f"`{name.partition('/')[0]}` ({percent(ratio(runs[name], before, content['settings']['seed'])[0] - 1)})"
        for name in ordered(runs)
        if name.endswith("/full") and (before := runs.get(name.replace("/full", "/untrained")))
        if longest(runs[name])["perplexity_tail"] >= longest(before)["perplexity_tail"]
    ]
    return [f"Training all weights raised the perplexity at {length} of {', '.join(worse)}."] if worse else []


def embeddings_and_norms(content: Mapping[str, Any]) -> list[str]:
    """Return a sentence on LongLoRA's finding: the effect of training embeddings and norms in addition to LoRA."""
    runs, length = content["runs"], content["settings"]["lengths"][-1]
    verdicts: dict[str, list[str]] = {}
    for method in METHODS:
        pair = [runs.get(f"{method}/{training}") for training in ("lora-plus", "lora")]
        if pair[0] is None or pair[1] is None:
            continue
        value, interval = ratio(pair[0], pair[1], content["settings"]["seed"])
        low, high = interval or (value, value)
        verdict = "helps" if high < 1 else "harms" if low > 1 else "makes no difference that these documents show"
        span = f" [{percent(low - 1)}, {percent(high - 1)}]" if interval else ""
        verdicts.setdefault(verdict, []).append(f"`{method}` ({percent(value - 1)}{span})")
    if not verdicts:
        return []
    findings = "; ".join(f"{verdict} with {', '.join(methods)}" for verdict, methods in verdicts.items())
    return [
        "LongLoRA found, with models of billions of parameters, that LoRA needs trained embeddings and norms. "
        f"Here, after {content['settings']['steps']} steps, that {findings}: `lora-plus` against `lora`, perplexity "
        f"at {length} with 95 % intervals paired by document."
    ]


def plot(content: Mapping[str, Any], path: Path = PICTURE) -> None:
    """Draw gain at the longest length and change at the trained length, a dot per run and a line per method."""
    runs, lengths = content["runs"], content["settings"]["lengths"]
    methods = [method for method in (*METHODS, FADED) if any(name.startswith(f"{method}/") for name in runs)]
    figure = new_figure(1.4 + 0.8 * len(methods))
    panels = figure.subplots(1, 2, sharey=True)
    colours, markers = (BEFORE, *COLOURS), ("X", *MARKERS)
    for index, training in enumerate(TRAININGS):
        # the name of a training may end in its learning rate
        trained = {name.partition("-lr")[0]: run for name, run in runs.items()}
        trained_runs = {row: run for row, m in enumerate(methods) if (run := trained.get(f"{m}/{training}"))}
        heights = [row + 0.16 * (index - 2) for row in trained_runs]  # side by side if they are equal
        style: dict[str, Any] = {"linestyle": "none", "markersize": 7, "markeredgecolor": "white"}
        style |= {"color": colours[index], "marker": markers[index], "label": training}
        panels[0].plot([longest(run)["gain"] for run in trained_runs.values()], heights, **style)
        panels[1].plot([1 + run["short_context_change"] for run in trained_runs.values()], heights, **style)
    for panel, words, side, ticks in (
        (panels[0], "truncation", "right", (0.2, 0.3, 0.5, 0.7, 1)),
        (panels[1], "untouched model", "left", (0.9, 1, 1.1, 1.2, 1.5, 2, 3, 5)),
    ):
        panel.axvline(1.0, color=CONTROL, linestyle="--", linewidth=1.3)
        note(panel, words, 1.0, 1.0, ("data", "axes fraction"), ha=side)
        panel.set_xscale("log")
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_locator(FixedLocator(ticks))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.grid(axis="x", color=GRID, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8.5, colors=INK)
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].set_ylim(len(methods) - 0.4, -0.8)
    panels[0].set_ylabel("method", fontsize=9, color=INK)
    for panel, title, label in (
        (panels[0], f"Gain over truncation at {lengths[-1]} tokens", "gain (log scale; above 1: context pays)"),
        (
            panels[1],
            f"What it costs at {lengths[0]} tokens",
            "perplexity / the untouched model's (log scale; lower is better)",
        ),
    ):
        panel.set_title(title, fontsize=10.5, fontweight="bold", color=INK)
        panel.set_xlabel(label, fontsize=9, color=INK)
    legend_below(figure, panels[0])
    save_figure(figure, path)


def command(settings: Mapping[str, Any]) -> str:
    """Return the command of the result file."""
    flags = " ".join(f"--{name} {settings[name]}" for name in ("steps", "batch", "warmup", "passkey", "seed"))
    output = RESULTS.relative_to(ROOT).as_posix()
    return (
        f"python benchmarks/finetune.py --output {output} --work reports/finetune {flags} "
        f"--{'' if settings['bf16'] else 'no-'}bf16"
    )


def render(results: Path = RESULTS, tried: Path = CANDIDATES) -> str:
    """Return the page of the result files. The second file may be missing."""
    content = load(results)
    candidates = load(tried) if tried.is_file() else None
    return fill(
        TEMPLATE,
        settings=content["settings"],
        lengths=content["settings"]["lengths"],
        machine=content["machine"],
        threads=content["machine"]["threads"],
        command=command(content["settings"]),
        sentences=sentences(content),
        table=table(content),
        candidates=candidates,
        candidates_table=candidates and table(candidates),
        results_path=RESULTS.relative_to(ROOT).as_posix(),
        candidates_path=CANDIDATES.relative_to(ROOT).as_posix(),
    )


if __name__ == "__main__":
    sys.exit(publish(__doc__, lambda: {PAGE: render()}, written=lambda: plot(load(RESULTS))))
