"""Write `docs/benchmarks.md` from its template and the result files, so that no number comes from a keyboard.

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
        found = f"{goal['found']:.0e}" if goal.get("at_most") == 1e-5 and goal["found"] else figure(goal["found"])
        rows.append((goal["what"], f"{kind.replace('_', ' ')} {goal[kind]:g}", found, verdicts[goal["met"]]))
    return markdown(("goal", "bound", "found", ""), rows)


def sweep(found: dict[str, Any]) -> str:
    """Return the ways of one sweep, a line for each."""
    rows = []
    for name, each in found["rows"].items():
        if "left_out" in each:
            rows.append((name, f"left out: {each['left_out']}", "", "", "", "", ""))
            continue
        apart = "" if each["deviation"] is None or name == "hf_posext" else f"{each['deviation']:.0e}"
        figures = figure(each["seconds" if found["device"] == "cuda" else "cpu_seconds"]), figure(each["extra_mb"], 0)
        ratios = figure(each["time_ratio"]), figure(each["memory_ratio"], 1)
        rows.append((name, str(each["readings"]), *figures, *ratios, apart))
    return markdown(("", "readings", "seconds", "extra MB", "x time", "x memory", "NLL apart"), rows)


def rows(result: dict[str, Any], *kinds: str) -> str:
    """Return the measurements of some kinds, in milliseconds."""
    lines = []
    measured = [each for part in result["parts"].values() if isinstance(part, list) for each in part]
    for each in measured:
        if each["what"] not in kinds:
            continue
        length = figure(each.get("length"), 0)
        if "left_out" in each:
            lines.append((each["way"], length, f"left out: {each['left_out']}", "", "", ""))
            continue
        times = figure(1000 * each["seconds"], 1), figure(each.get("time_ratio"))
        error = f"{each['error']:.0e}" if "error" in each else ""
        lines.append((f"`{each['way']}`", length, *times, figure(each.get("extra_mb"), 0), error))
    return markdown(("", "tokens", "ms", "x time", "extra MB", "error"), lines)


def fits(result: dict[str, Any]) -> str:
    """Return the coefficients of the curves: time by 1,000 tokens and their square, memory by none and 1,000."""
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
        least, most = row["ratio_range"]
        speed = figure(row["tokens_per_second"], 1)
        lines.append((f"`{row['method']}`", speed, figure(row["ratio"]), f"{least:.2f} to {most:.2f}"))
    return markdown(("", "tokens/s", "x unpatched", "of single rounds"), lines)


def render(results: Path = RESULTS) -> str:
    given: dict[str, Any] = dict.fromkeys(NAMES)
    for name in NAMES:
        path = results / f"{name}.json"
        if path.exists():
            given[name] = json.loads(path.read_text(encoding="utf-8"))
    filters = {"origin": origin, "goals": goals, "sweep": sweep, "rows": rows, "fits": fits, "throughput": throughput}
    return fill(TEMPLATE, **filters, **given)


if __name__ == "__main__":
    raise SystemExit(publish(__doc__, lambda: {PAGE: render()}))
