"""Write `docs/benchmarks.md` from its template and the result files, so that no number comes from a keyboard.

python benchmarks/page.py            # write it
python benchmarks/page.py --check    # exit 1 where the committed page is not what these give
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from output import RESULTS, figure

HERE = Path(__file__).resolve().parent
TEMPLATE = HERE / "benchmarks.md.jinja"
PAGE = HERE.parent / "docs" / "benchmarks.md"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(result: dict[str, Any]) -> str:
    where = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    device = where["gpu"] or f"{where['processor']}, {where['cores']} cores, {where['memory_gb']:.0f} GB"
    load = f"load average {where['load_average']:.1f} when it began"
    return f"{where['date']}, {device}; {load}; Python {where['python']}, {versions}; {result['repeats']} repeats"


def goals(result: dict[str, Any]) -> str:
    said = {True: "met", False: "**missed**", None: "not measured"}
    rows = []
    for goal in result["goals"]:
        bound = f"at most {goal['at_most']:g}" if "at_most" in goal else f"at least {goal['at_least']:g}"
        found = figure(goal["found"]) if goal.get("at_most") != 1e-5 else f"{goal['found']:.0e}"
        rows.append((goal["what"], bound, found, said[goal["met"]]))
    return markdown(("", "goal", "found", ""), rows)


def sweep(found: dict[str, Any]) -> str:
    """Ways of one sweep, cheapest first."""
    rows = []
    for name, each in found["rows"].items():
        if "left_out" in each:
            rows.append((name, f"left out: {each['left_out']}", "", "", "", ""))
            continue
        apart = "" if each["deviation"] is None or name == "hf_posext" else f"{each['deviation']:.0e}"
        figures = figure(each["cpu_seconds"]), figure(each["extra_mb"], 0)
        rows.append((name, *figures, figure(each["time_ratio"]), figure(each["memory_ratio"], 1), apart))
    return markdown(("", "CPU s", "extra MB", "x time", "x memory", "NLL apart"), rows)


def rows(result: dict[str, Any], *kinds: str) -> str:
    """What was measured of some kinds, in milliseconds."""
    lines = []
    for each in result["rows"]:
        if each["what"] not in kinds:
            continue
        if "left_out" in each:
            lines.append((each["way"], figure(each.get("length"), 0), f"left out: {each['left_out']}", "", ""))
            continue
        times = figure(1000 * each["cpu_seconds"], 1), figure(each.get("time_ratio"))
        lines.append((f"`{each['way']}`", figure(each.get("length"), 0), *times, figure(each.get("extra_mb"), 0)))
    return markdown(("", "tokens", "CPU ms", "x time", "extra MB"), lines)


def fits(result: dict[str, Any]) -> str:
    """Coefficients of the curves: of time for 1,000 tokens and their square, of memory for none and 1,000."""
    lines = []
    for curve in result["scaling"]:
        (a, b), (c, d) = (curve[key]["coefficients"] for key in ("time_fit", "memory_fit"))
        off = (f"{curve[key]['largest_residual']:.0%}" for key in ("time_fit", "memory_fit"))
        coefficients = f"{1e6 * a:.1f}", f"{1e9 * b:.2f}", f"{c:.0f}", f"{1e3 * d:.1f}"
        lines.append((curve["way"], *coefficients, *off))
    return markdown(("", "ms / k", "ms / k²", "MB", "MB / k", "time off by", "memory off by"), lines)


def render(results: Path = RESULTS) -> str:
    files = {name: results / f"{name}.json" for name in ("perplexity_cpu", "perplexity_gpu", "cpu")}
    given = {
        name: json.loads(path.read_text(encoding="utf-8")) if path.exists() else None for name, path in files.items()
    }
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    environment.globals.update(machine=machine, goals=goals, sweep=sweep, rows=rows, fits=fits)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    text = render(args.results)
    if not args.check:
        PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/benchmarks.md is not what the result files give; run: python benchmarks/page.py")


if __name__ == "__main__":
    main()
