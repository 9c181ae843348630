"""What every benchmark prints and writes: a table of 80 columns, and JSON that says where the numbers come from."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("hf_posext", "torch", "transformers", "accelerate", "lm_eval", "longppl")


def machine() -> dict[str, Any]:
    """Where and when, for the JSON."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": os.getloadavg()[0],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def goal(what: str, found: float | None, *, at_most: float | None = None, at_least: float | None = None) -> dict:
    """A goal and whether it is met; `found` is `None` where nothing could be measured."""
    met = None if found is None else found <= at_most if at_most is not None else found >= (at_least or 0.0)
    bound = {"at_most": at_most} if at_most is not None else {"at_least": at_least}
    return {"what": what, **bound, "found": found, "met": met}


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def console(stderr: bool = False) -> Console:
    return Console(width=80, stderr=stderr)


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The first column to the left, the others to the right."""
    found = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, head in enumerate(heads):
        found.add_column(head, justify="right" if number else "left", overflow="fold")
    for row in rows:
        found.add_row(*row)
    return found


def figure(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def goals_table(goals: Sequence[dict[str, Any]]) -> Table:
    said = {True: "yes", False: "NO", None: "not measured"}
    bounds = [f"<= {one['at_most']:g}" if "at_most" in one else f">= {one['at_least']:g}" for one in goals]
    rows = [
        (one["what"], bound, figure(one["found"]), said[one["met"]]) for one, bound in zip(goals, bounds, strict=True)
    ]
    return table("Goals", ("", "goal", "found", "met"), rows)
