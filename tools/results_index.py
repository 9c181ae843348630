"""Write `docs/results_index.md`: every committed result file with its command, commit, date and versions.

python tools/results_index.py            # write the page
python tools/results_index.py --check    # exit 1 if the committed page is out of date

A file of an older schema raises an error that names it: numbers that the code cannot read must be measured again.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from pages import ROOT, publish, table

from hf_posext.errors import EvaluationError
from hf_posext.evaluation import Results

PAGE = ROOT / "docs" / "results_index.md"
FOLDERS = ("results", "benchmarks/results")
SCRIPTS = {
    "benchmarks/results/finetune.json": "python benchmarks/finetune.py",
    "benchmarks/results/finetune_candidates.json": "python benchmarks/finetune.py",
    "benchmarks/results/finetune_faded.json": "python benchmarks/finetune.py",
    "benchmarks/results/llama_cpp.json": "python benchmarks/llama_cpp.py",
    "benchmarks/results/llama_cpp_converted.json": "python -m benchmarks.llama_cpp --converter convert_hf_to_gguf.py",
    "benchmarks/results/public_model.json": "python benchmarks/public_model.py",
    "benchmarks/results/server_phases.json": "python benchmarks/server_phases.py",
    "results/encoder-table.json": "python examples/08_encoder_table.py",
    "results/sweep-frequencies.json": "make sweep",
    "results/sweep-late.json": "make sweep",
    "results/sweep-methods.json": "make sweep",
}
"""Commands of the files that do not contain one."""

SCHEMAS = {"benchmarks/results/public_model.json": 1}
"""Schemas of files that are not [`Results`]."""

UNKNOWN = "not recorded"


class Origin(NamedTuple):
    """Origin of a result file. Fields that the file does not record are `None`."""

    file: str
    command: str | None
    commit: str | None
    date: str | None
    versions: str | None


def origin(path: Path, root: Path = ROOT) -> Origin:
    """
    Return the origin of one result file.

    Raises:
        EvaluationError: if the file has an older schema than the code that reads it.
    """
    file = path.relative_to(root).as_posix()
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if file in SCHEMAS:
        if content.get("schema") != SCHEMAS[file]:
            raise EvaluationError(
                f"Expected schema {SCHEMAS[file]} in {file}, got {content.get('schema')}. Measure again."
            )
    elif "schema" in content:
        Results.load_json(path)
    runs = content.get("runs") if "schema" in content else None
    provenance = content.get("provenance") or {}
    machine = content.get("machine") or provenance.get("machine") or {}
    newest: dict[str, Any] = max(runs, key=lambda run: run["date"]) if runs else machine
    stated = {**newest, **provenance}
    # Peers of a benchmark are listed beside the machine's own packages. A sweep has its one version at the top level.
    versions = {**(stated.get("versions") or {}), **(content.get("versions") or {})} or content
    commit = stated.get("commit")
    return Origin(
        file,
        content.get("command") or stated.get("command") or SCRIPTS.get(file),
        commit and commit[:7],
        (stated.get("date") or "")[:10] or None,
        ", ".join(f"{name} {versions[name]}" for name in ("transformers", "torch") if name in versions) or None,
    )


def origins(root: Path = ROOT) -> list[Origin]:
    """Return the origins of all result files, by path."""
    paths = sorted(
        path for folder in FOLDERS for path in (root / folder).rglob("*.json") if ".partial." not in path.name
    )
    return [origin(path, root) for path in paths]


def render(entries: Iterable[Origin]) -> str:
    """Return the page. Ages count from the newest file, so the page changes only with the files."""
    entries = list(entries)
    dates = [datetime.date.fromisoformat(entry.date) for entry in entries if entry.date]
    lines = []
    for entry in entries:
        days = f"{(max(dates) - datetime.date.fromisoformat(entry.date)).days} days" if entry.date else UNKNOWN
        command = f"`{entry.command}`" if entry.command else UNKNOWN
        cells = (f"[{entry.file}](../{entry.file})", command, entry.commit or UNKNOWN, entry.date or UNKNOWN, days)
        lines.append((*cells, entry.versions or UNKNOWN))
    heads = ("file", "command", "commit", "date", "age", "versions")
    return (
        "# Result files\n"
        "The committed result files. A test refuses files of an older schema. Age is counted from the newest file. "
        "Where a branch was rebased after a run, the commit is the one that landed the same change. "
        "`python tools/results_index.py` writes this page.\n\n"
        f"{table(heads, lines, left=6)}\n"
    )


if __name__ == "__main__":
    sys.exit(publish(__doc__, lambda: {PAGE: render(origins())}))
