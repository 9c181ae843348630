"""Write `docs/benchmarks.md` from its template and the result files.

python benchmarks/page.py            # write the page
python benchmarks/page.py --check    # exit 1 if the committed page is out of date
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from output import RESULTS, figure

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))

from pages import fill, publish
from pages import table as markdown

HERE = Path(__file__).resolve().parent
TEMPLATE = HERE / "benchmarks.md.jinja"
PAGE = HERE.parent / "docs" / "benchmarks.md"
NAMES = ("perplexity", "cpu", "scaling", "serving", "gpu", "gpu_decoding")


def origin(result: dict[str, Any]) -> str:
    """Return the command, date, machine and versions of a result."""
    where = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    device = where["gpu"] or f"{where['processor']}, {where['cores']} cores, {where['memory_gb']:.0f} GB"
    load = f"load average {where['load_average']:.1f} when it began"
    return f"`{result['command']}`, {where['date']}, on {device}; {load}; Python {where['python']}, {versions}."


def goals(result: dict[str, Any]) -> str:
    verdicts = {True: "met", False: "**missed**", None: "not measured"}
    rows = []
    for goal in result["goals"]:
        kind = "at_most" if "at_most" in goal else "at_least"
        value = f"{goal['found']:.0e}" if goal.get("at_most") == 1e-5 and goal["found"] else figure(goal["found"])
        rows.append((goal["what"], f"{kind.replace('_', ' ')} {goal[kind]:g}", value, verdicts[goal["met"]]))
    return markdown(("goal", "bound", "found", ""), rows)


def sweep(result: dict[str, Any]) -> str:
    """Return the table of one sweep, a line per way."""
    rows = []
    for name, row in result["rows"].items():
        if "left_out" in row:
            rows.append((name, f"left out: {row['left_out']}", "", "", "", "", ""))
            continue
        apart = "" if row["deviation"] is None or name == "hf_posext" else f"{row['deviation']:.0e}"
        figures = figure(row["seconds" if result["device"] == "cuda" else "cpu_seconds"]), figure(row["extra_mb"], 0)
        ratios = figure(row["time_ratio"]), figure(row["memory_ratio"], 1)
        rows.append((name, str(row["readings"]), *figures, *ratios, apart))
    return markdown(("", "readings", "seconds", "extra MB", "x time", "x memory", "NLL apart"), rows)


def rows(result: dict[str, Any], *kinds: str) -> str:
    """Return the table of measurements of the given kinds, in milliseconds."""
    lines = []
    measurements = [row for part in result["parts"].values() if isinstance(part, list) for row in part]
    for row in measurements:
        if row["what"] not in kinds:
            continue
        length = figure(row.get("length"), 0)
        if "left_out" in row:
            lines.append((row["way"], length, f"left out: {row['left_out']}", "", "", ""))
            continue
        times = figure(1000 * row["seconds"], 1), figure(row.get("time_ratio"))
        error = f"{row['error']:.0e}" if "error" in row else ""
        lines.append((f"`{row['way']}`", length, *times, figure(row.get("extra_mb"), 0), error))
    return markdown(("", "tokens", "ms", "x time", "extra MB", "error"), lines)


def fits(result: dict[str, Any]) -> str:
    """Return the table of fits: time per 1,000 tokens and per their square, constant memory and memory per 1,000."""
    lines = []
    for curve in result["parts"].values():
        (a, b), (c, d) = (curve[key]["coefficients"] for key in ("time_fit", "memory_fit"))
        off = (f"{curve[key]['largest_residual']:.0%}" for key in ("time_fit", "memory_fit"))
        coefficients = f"{1e6 * a:.1f}", f"{1e9 * b:.2f}", f"{c:.0f}", f"{1e3 * d:.1f}"
        lines.append((curve["way"], *coefficients, *off))
    return markdown(("", "ms / k", "ms / k²", "MB", "MB / k", "time off by", "memory off by"), lines)


def throughput(result: dict[str, Any]) -> str:
    lines = []
    for row in result["parts"]["throughput"]:
        lowest, highest = row["ratio_range"]
        speed = figure(row["tokens_per_second"], 1)
        lines.append((f"`{row['method']}`", speed, figure(row["ratio"]), f"{lowest:.2f} to {highest:.2f}"))
    return markdown(("", "tokens/s", "x unpatched", "of single rounds"), lines)


def render(results: Path = RESULTS) -> str:
    results_by_name: dict[str, Any] = dict.fromkeys(NAMES)
    for name in NAMES:
        path = results / f"{name}.json"
        if path.exists():
            results_by_name[name] = json.loads(path.read_text(encoding="utf-8"))
    filters = {"origin": origin, "goals": goals, "sweep": sweep, "rows": rows, "fits": fits, "throughput": throughput}
    return fill(TEMPLATE, **filters, **results_by_name)


if __name__ == "__main__":
    raise SystemExit(publish(__doc__, lambda: {PAGE: render()}))
