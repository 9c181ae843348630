"""Output of all benchmarks: tables of 80 columns, and JSON with the origin of the numbers."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hf_posext import packages

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("hf_posext", "torch", "transformers", "accelerate", "peft", "lm_eval", "longppl")


def machine() -> dict[str, Any]:
    """Return the machine, date and versions for the JSON."""
    return {
        **packages.machine(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: package_version for name in PACKAGES if (package_version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def command(script: str, settings: dict[str, Any]) -> str:
    """Return the command line of a script, such as `benchmarks/cpu.py`, without flags that are off or not given."""
    flags = {key: value for key, value in settings.items() if value is not None and value is not False}
    return f"python {script}" + "".join(
        f" --{key}" + ("" if value is True else f" {value}") for key, value in flags.items()
    )


def goal(name: str, value: float | None, *, at_most: float | None = None, at_least: float | None = None) -> dict:
    """Return a goal and whether it is met. `value` is `None` if nothing could be measured."""
    met = None if value is None else value <= at_most if at_most is not None else value >= (at_least or 0.0)
    bound = {"at_most": at_most} if at_most is not None else {"at_least": at_least}
    return {"what": name, **bound, "found": value, "met": met}


class Run:
    """
    Result that is written part by part. A killed run continues after its last finished part.

    Args:
        name (`str`): name of the script and of its result file.
        settings (`dict`): flags of the run. It continues only from parts with the same flags, commit and versions.
        path (`Path`, *optional*): the result file. Nothing is written without one.
    """

    def __init__(self, name: str, settings: dict[str, Any], path: Path | None) -> None:
        self.path = path
        self.content = {"command": command(f"benchmarks/{name}.py", settings), "machine": machine(), "parts": {}}
        if self._partial is not None and self._partial.exists():
            before = json.loads(self._partial.read_text(encoding="utf-8"))
            if self._key(before) == self._key(self.content):
                self.content = before

    @property
    def _partial(self) -> Path | None:
        return self.path and self.path.with_suffix(".partial.json")

    def _key(self, content: dict[str, Any]) -> Any:
        return content["command"], content["machine"]["commit"], content["machine"]["versions"]

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the result of a part, from the partial file if an earlier run has finished it."""
        if name not in self.content["parts"]:
            self.content["parts"][name] = make()
            if self._partial is not None:
                self._write(self._partial)
        return self.content["parts"][name]

    def finish(self, goals: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Write the complete result, with its goals."""
        self.content["goals"] = list(goals)
        if self.path is not None and self._partial is not None:
            self._write(self.path)
            self._partial.unlink(missing_ok=True)
        return self.content

    def _write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".tmp")
        fresh.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        fresh.replace(path)


def console(stderr: bool = False) -> Console:
    return Console(width=80, stderr=stderr)


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table whose first column is aligned to the left and the others to the right."""
    layout = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, head in enumerate(heads):
        layout.add_column(head, justify="right" if number else "left", overflow="fold")
    for row in rows:
        layout.add_row(*row)
    return layout


def figure(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def rows_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """Return the measurements of layers, models and imports as a table."""
    lines = []
    for row in rows:
        name = f"{row['what']}: {row['way']}".replace("from transformers import ", "transformers, ")
        length = figure(row.get("length"), 0)
        if "left_out" in row:
            lines.append((name, length, str(row["left_out"])))
            continue
        error = f"{row['error']:.0e}" if "error" in row else "-"
        figures = figure(1000 * row["seconds"], 1), figure(row.get("time_ratio"))
        lines.append((name, length, *figures, figure(row.get("extra_mb"), 0), error))
    return table(title, ("", "tokens", "ms", "x time", "extra MB", "error"), lines)


def goals_table(goals: Sequence[dict[str, Any]]) -> Table:
    verdicts = {True: "yes", False: "NO", None: "not measured"}
    bounds = [f"<= {entry['at_most']:g}" if "at_most" in entry else f">= {entry['at_least']:g}" for entry in goals]
    rows = [
        (entry["what"], bound, figure(entry["found"]), verdicts[entry["met"]])
        for entry, bound in zip(goals, bounds, strict=True)
    ]
    return table("Goals", ("", "goal", "found", "met"), rows)
