"""Write `README.md` and generated pages of `docs/` from templates, the registry of methods and committed results.

python tools/readme.py --collect   # first take result files and picture from the last `make demo`
python tools/readme.py             # write both
python tools/readme.py --check     # exit 1 where what is committed is not what these give
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from recommend_page import RECOMMEND, recommend_table
from safetensors import safe_open

from hf_posext import Results, list_methods
from hf_posext.evaluation.contrast.key_tokens import Criterion
from hf_posext.evaluation.results.statistics import CONFIDENCE, RESAMPLES
from hf_posext.reporting.sentences import describe_methods
from hf_posext.reporting.tables import (
    by_method,
    control_name,
    control_rows,
    finite_interval,
    format_change,
    format_interval,
    format_perplexity,
    grids,
    markdown_table,
)

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = {
    README: "README.md.jinja",
    DOCS / "results.md": "results.md.jinja",
    DOCS / "methods.md": "methods.md.jinja",
    DOCS / "protocols.md": "protocols.md.jinja",
}
"""Generated pages and their templates in `tools/`."""
FIRST_METHODS = "linear yarn dynamic-yarn longrope rerope self-extend dual-chunk alibi-linear table-linear".split()
"""Methods that README names; `docs/methods.md` has them all."""
DEMO = ROOT / "reports" / "demo"
RESULTS = ROOT / "results" / "demo"
PICTURE = ROOT / "docs" / "images" / "demo.png"
MODEL = "tiny-rope"
REMAPPING = ROOT / "results" / "remapping" / "tiny-rope.json"


def collect() -> None:
    """Copy the demo's result files and its picture to where they are committed."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    for run in sorted(DEMO.glob("*/results.json")):
        shutil.copy(run, RESULTS / f"{run.parent.name}.json")
    shutil.copy(DEMO / "perplexity.png", PICTURE)


def methods_table(names: Sequence[str] | None = None) -> str:
    """Table of methods: name, scheme, summary and paper.

    Args:
        names (`Sequence[str]`, *optional*): methods to list; every registered one by default.
    """
    lines = ["| method | extends | what it does | paper |", "|---|---|---|---|"]
    for method in list_methods():
        if names is not None and method.name not in names:
            continue
        extends = "any" if method.name == "none" else ", ".join(method.kinds)
        paper = f"[{method.title}]({method.url})" if method.url else method.title
        lines.append(f"| `{method.name}` | {extends} | {method.summary} | {paper} |")
    return "\n".join(lines)


def tables_of(results: Results) -> str:
    """The tables of one comparison, each under its title."""
    return "\n\n".join(f"{grid.title}\n\n{markdown_table(grid)}" for grid in grids(results))


def summary_table(*comparisons: Results) -> str:
    """One line a method, at the longest length: what it costs inside the trained length, and what it gives there."""
    length = max(row["length"] for row in comparisons[0].rows)
    trained = comparisons[0].provenance["trained_length"]
    lines = [
        f"| | change at {trained} | perplexity at {length} | gain over truncation | pass keys found |",
        "|---|---:|---:|---:|---:|",
        f"| {control_name(comparisons[0])} | | "
        f"{format_perplexity(control_rows(comparisons[0])[length]['perplexity_truncated_tail'])} | 1 | |",
    ]
    known: set[str] = set()
    for results in comparisons:
        for name, rows in by_method(results).items():
            if name in known:
                continue
            known.add(name)
            row, inside = rows[length], rows[trained]
            trials, found = row["passkey_trials"], row["passkey"]
            gain = f"{row['gain']:.2f}{format_interval(finite_interval(row, 'gain_ci95'))}"
            lines.append(
                f"| {name} | {format_change(inside) if name != 'none' else ''} | "
                f"{format_perplexity(row['perplexity_tail'])} | {gain} | {round(found * trials)} of {trials} |"
            )
    return "\n".join(lines)


def million_parameters(model: str) -> str:
    """Size of the shipped weights, in words."""
    with safe_open(ROOT / "examples" / "tiny" / model / "model.safetensors", framework="numpy") as weights:
        count = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return f"{count / 1e6:.1f} M parameter"


def render(page: Path = README) -> str:
    """The page that its template, the registry and the result files give."""
    path = RESULTS / f"{MODEL}.json"
    results = Results.load_json(path)
    remapping = Results.load_json(REMAPPING)
    provenance = results.provenance
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(
        (ROOT / "tools" / PAGES[page]).read_text(encoding="utf-8")
    )
    return template.render(
        picture=PICTURE.relative_to(ROOT).as_posix(),
        model=MODEL,
        trained=provenance["trained_length"],
        documents=len(provenance["documents"]),
        longest=max(row["length"] for row in results.rows),
        summary_table=summary_table(results, remapping),
        demo_tables=tables_of(results),
        sentences=describe_methods(results),
        results_path=path.relative_to(ROOT).as_posix(),
        command=provenance["command"],
        remapping_tables=tables_of(remapping),
        remapping_path=REMAPPING.relative_to(ROOT).as_posix(),
        remapping_command=remapping.provenance["command"],
        recommend_table=recommend_table(
            [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RECOMMEND.glob("*.json"))]
        ),
        methods_table=methods_table(),
        methods_short=methods_table(FIRST_METHODS),
        methods_count=len(list_methods()),
        confidence=f"{100 * CONFIDENCE:g}",
        resamples=f"{RESAMPLES:,}",
        alpha=f"{Criterion().alpha:g}",
        beta=f"{Criterion().beta:g}",
        short_length=Criterion().short_length,
        transformers=next(d for d in dependencies if d.startswith("transformers")).removeprefix("transformers"),
        parameters=million_parameters(MODEL),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", action="store_true", help="take result files and picture from reports/demo")
    parser.add_argument("--check", action="store_true", help="compare with the committed README instead of writing")
    arguments = parser.parse_args()
    if arguments.collect:
        collect()
    if arguments.check:
        return int(any(not page.exists() or page.read_text(encoding="utf-8") != render(page) for page in PAGES))
    for page in PAGES:
        page.write_text(render(page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
