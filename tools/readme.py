"""Write `README.md` and generated pages of `docs/` from templates, the registry of methods and committed results.

python tools/readme.py --collect   # first take result files and picture from the last `make demo`
python tools/readme.py             # write the pages
python tools/readme.py --check     # exit 1 if a committed page is out of date
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from methods_page import measured_tables, methods_table
from pages import ROOT, fill, publish, table
from recommend_page import RECOMMEND, recommend_table
from safetensors import safe_open

from hf_posext import Results, list_methods
from hf_posext.evaluation.config import Criterion
from hf_posext.evaluation.rows import CONFIDENCE, RESAMPLES, bootstrap_interval, pooled_perplexity
from hf_posext.reporting import describe_methods, markdown_table
from hf_posext.reporting.tables import (
    by_method,
    control_name,
    control_rows,
    finite_interval,
    format_change,
    format_perplexity,
    grids,
)

sys.path.append(str(ROOT / "benchmarks"))
from public_model_page import HELD_OUT, Cells, load  # type: ignore[import-not-found]
from public_model_page import RESULT as PUBLIC

PUBLIC_LENGTH = 16_384
"""Tokens of the rows in README's first table."""
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = {
    README: "README.md.jinja",
    DOCS / "results.md": "results.md.jinja",
    DOCS / "methods.md": "methods.md.jinja",
    DOCS / "protocols.md": "protocols.md.jinja",
    DOCS / "fading.md": "fading.md.jinja",
}
"""Generated pages and their templates in `tools/`."""
FIRST_METHODS = "linear yarn dynamic-yarn longrope rerope self-extend dual-chunk alibi-linear table-linear".split()
"""Methods that README lists. `docs/methods.md` lists all of them."""
DEMO = ROOT / "reports" / "demo"
RESULTS = ROOT / "results" / "demo"
PICTURE = ROOT / "docs" / "images" / "demo.png"
MODEL = "tiny-rope"
REMAPPING = ROOT / "results" / "remapping" / "tiny-rope.json"
FADING = ROOT / "results" / "fading"


def collect() -> None:
    """Copy the result files and the picture of the demo to their committed places."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    for run in sorted(DEMO.glob("*/results.json")):
        shutil.copy(run, RESULTS / f"{run.parent.name}.json")
    shutil.copy(DEMO / "perplexity.png", PICTURE)


def tables_of(results: Results) -> str:
    """Return the tables of one comparison, each under its title."""
    return "\n\n".join(f"{grid.title}\n\n{markdown_table(grid)}" for grid in grids(results))


def summary_table(*comparisons: Results) -> str:
    """Return the table of methods, the best first: change inside the trained length, gain at the longest length."""
    length = max(row["length"] for row in comparisons[0].rows)
    trained = comparisons[0].provenance["trained_length"]
    truncated = control_rows(comparisons[0])[length]["perplexity_truncated_tail"]
    control = (control_name(comparisons[0]), "", format_perplexity(truncated), "1", "")
    names: set[str] = set()
    lines: list[tuple[float, tuple[str, ...]]] = []
    for results in comparisons:
        for name, rows in by_method(results).items():
            if name in names:
                continue
            names.add(name)
            row, inside = rows[length], rows[trained]
            trials, share = row["passkey_trials"], row["passkey"]
            interval = finite_interval(row, "gain_ci95")
            gain = f"{row['gain']:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")
            change, perplexity = (
                format_change(inside) if name != "none" else "",
                format_perplexity(row["perplexity_tail"]),
            )
            lines.append((row["gain"], (name, change, perplexity, gain, f"{round(share * trials)} of {trials}")))
    heads = ("", f"change at {trained}", f"perplexity at {length}", "gain over truncation", "passkeys found")
    return table(heads, [control, *(line for _, line in sorted(lines, reverse=True))])


def gains_table(results: Results) -> str:
    """Return the table of gains over truncation, with intervals and passkeys at the longest length."""
    lengths = sorted({row["length"] for row in results.rows})
    passkeys = any(row.get("passkey_trials") for row in results.rows)
    heads = ["method", *(str(length) for length in lengths), *(["passkeys"] if passkeys else [])]
    lines = []
    for name, rows in by_method(results).items():
        cells = [f"{rows[length]['gain']:.4f}" for length in lengths]
        interval = finite_interval(rows[lengths[-1]], "gain_ci95")
        if interval is not None:
            cells[-1] += f" [{interval[0]:.4f}, {interval[1]:.4f}]"
        if passkeys:
            row = rows[lengths[-1]]
            cells.append(f"{round(row['passkey'] * row['passkey_trials'])} of {row['passkey_trials']}")
        lines.append((name, *cells))
    return table(heads, lines)


def measured(name: str) -> str:
    """Return the table of gains from a file in `results/fading`, with the file and its command."""
    file = f"results/fading/{name}.json"
    results = Results.load_json(ROOT / file)
    command = results.provenance["command"]
    return f"{gains_table(results)}\n\nFigures: [`{file}`](../{file}), made by\n\n    {command}"


def against_base(results: Results) -> str:
    """Return the table of the gain of each composition over its base method, with intervals over documents."""
    cells = {(cell["method"], cell["length"], cell["document"]): cell for cell in results.per_document}
    documents = list(dict.fromkeys(document for _, _, document in cells))
    rows = []
    for method, length in dict.fromkeys((method, length) for method, length, _ in cells):
        base, *components = method.split("+")
        if components and "(" not in method:
            pairs = [(cells[base, length, document], cells[method, length, document]) for document in documents]
            saved = [base_cell["tail_nll_sum"] - cell["tail_nll_sum"] for base_cell, cell in pairs]
            tokens = [base_cell["tail_tokens"] for base_cell, _ in pairs]
            low, high = bootstrap_interval(saved, tokens, results.provenance["seed"]) or (math.nan, math.nan)
            rows.append({"method": method, "length": length})
            rows[-1]["gain"] = f"{float(pooled_perplexity(saved, tokens)):.4f} [{low:.4f}, {high:.4f}]"
    return by_length(rows, lambda row: str(row["gain"]))


def by_length(rows: list[dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> str:
    """Return a table of one number per row of results, with a line per method and a column per length."""
    lengths = sorted({row["length"] for row in rows})
    cells = {(row["method"], row["length"]): cell(row) for row in rows}
    methods = dict.fromkeys(row["method"] for row in rows)
    lines = [(f"`{method}`", *(cells[method, length] for length in lengths)) for method in methods]
    return table(("method", *map(str, lengths)), lines)


def million_parameters(model: str) -> str:
    """Return the number of shipped weights, in words."""
    with safe_open(ROOT / "examples" / "tiny" / model / "model.safetensors", framework="numpy") as weights:
        count = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return f"{count / 1e6:.1f} M parameter"


def render(page: Path = README) -> str:
    """Return a page from its template, the registry and the result files."""
    path = RESULTS / f"{MODEL}.json"
    results = Results.load_json(path)
    remapping = Results.load_json(REMAPPING)
    fading = Results.load_json(FADING / "tiny-rope.json")
    public = Cells(load(PUBLIC), HELD_OUT, PUBLIC_LENGTH)
    trained = json.loads((ROOT / "benchmarks" / "results" / "finetune_faded.json").read_text("utf-8"))
    far_mass, alibi = (json.loads((FADING / f"{name}.json").read_text("utf-8")) for name in ("far_mass", "alibi"))
    provenance = results.provenance
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    return fill(
        ROOT / "tools" / PAGES[page],
        picture=PICTURE.relative_to(ROOT).as_posix(),
        model=MODEL,
        trained=provenance["trained_length"],
        documents=len(provenance["documents"]),
        longest=max(row["length"] for row in results.rows),
        public_trained=f"{public.trained:,}",
        public_length=f"{public.length:,}",
        public_table=public.first_table(),
        public_summary=public.summary(),
        summary_table=summary_table(results, fading),
        demo_tables=tables_of(results),
        sentences=describe_methods(results),
        results_path=path.relative_to(ROOT).as_posix(),
        command=provenance["command"],
        remapping_tables=tables_of(remapping),
        remapping_path=REMAPPING.relative_to(ROOT).as_posix(),
        remapping_command=remapping.provenance["command"],
        measured=measured,
        against_base=against_base(fading),
        fading_documents=len(fading.provenance["documents"]),
        start=fading.provenance["start"],
        mass_table=by_length(far_mass["rows"], lambda row: f"{100 * row['far_share']:.1f} %"),
        mass_command=far_mass["command"],
        mass_documents=far_mass["documents"],
        alibi_table=by_length(alibi["rows"], lambda row: f"{row['gain']:.4f}"),
        alibi_command=alibi["command"],
        trained_table=by_length(
            [{"method": name, **row} for name, run in trained["runs"].items() for row in run["rows"]],
            lambda row: f"{row['gain']:.4f}",
        ),
        recommend_table=recommend_table(
            [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RECOMMEND.glob("*.json"))]
        ),
        methods_table=methods_table(),
        measured_tables=measured_tables() if page == DOCS / "methods.md" else "",
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


if __name__ == "__main__":
    sys.exit(publish(__doc__, lambda: {page: render(page) for page in PAGES}, collect=collect))
