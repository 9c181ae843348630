"""What a patch costs on one CPU core: frequency methods nothing, remapped positions little more than attention.

python benchmarks/cpu.py          # some 10 minutes and 10 GB; one table, JSON in results/, a picture in docs/
python benchmarks/cpu.py --tiny   # the same steps in a minute, on models that show nothing
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import costs
import forwards
import torch
from output import RESULTS, console, figure, goal, goals_table, machine, table, write
from rich.progress import track
from scaling import plot, scaling

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "scaling.png"

FREQUENCY, PREFILL, DECODE, IMPORT, PATCH = 0.02, 1.35, 1.25, 0.150, 0.100
"""Goals: a forward with other frequencies is as fast as without, but for this share; the attention layer over a text,
and a token with a cache, take so many times what SDPA takes; seconds that imports and `patch_model` may take."""


def measure(tiny: bool, repeats: int) -> dict[str, Any]:
    """Rows of all that is measured, in order, and the curves by length."""
    torch.set_num_threads(1)
    layer, model, billion = ("tiny", "tiny", "tiny") if tiny else ("attention", "small", "billion")
    lengths = (512,) if tiny else (4096, 8192)
    steps = [lambda: costs.import_rows(repeats), lambda: costs.patch_rows(billion, ("yarn", "self-extend"))]
    steps += [lambda: forwards.frequency_rows(128 if tiny else 2048, model, 2 * repeats + 1)]
    for length in lengths:
        steps += [
            lambda length=length: forwards.prefill_rows(length, layer, repeats),
            lambda length=length: forwards.dense_rows(length, layer, repeats),
            lambda length=length: forwards.decode_rows(length, model, 8 * repeats),
        ]
    rows = [row for step in track(steps, console=console(stderr=True), transient=True) for row in step()]
    curves = scaling((256, 512) if tiny else (1024, 2048, 4096, 8192, 16_384), model, 1)
    return {"rows": rows, "scaling": curves, "goals": goals(rows)}


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The worst of each group that has a goal."""

    def worst(what: str, key: str = "time_ratio", **where: Any) -> float:
        ours = [row for row in rows if row["what"] == what and row["way"] not in ("plain", "unpatched")]
        return max(row[key] for row in ours if where.items() <= row.items())

    listed = [goal("forward / unpatched: every frequency method", worst("forward"), at_most=1 + FREQUENCY)]
    for what, bound in (("prefill", PREFILL), ("decode", DECODE)):
        for length in sorted({row["length"] for row in rows if row["what"] == what}):
            name = f"{what} / SDPA at {length}: every remapping method"
            listed.append(goal(name, worst(what, length=length), at_most=bound))
    added = max(row["cpu_seconds"] for row in rows if row["way"] in costs.IMPORTS)
    listed.append(goal("seconds that importing adds to transformers", added, at_most=IMPORT))
    patching = [row for row in rows if row["what"] == "patch_model" and row["way"] == "yarn"]
    seconds = next((row["cpu_seconds"] for row in patching if "cpu_seconds" in row), None)
    return [*listed, goal("seconds of patch_model: yarn", seconds, at_most=PATCH)]


def rows_table(rows: list[dict[str, Any]]) -> Any:
    lines = []
    for row in rows:
        name = f"{row['what']}: {row['way']}".replace("from transformers import ", "transformers, ")
        if "left_out" in row:
            lines.append((name, "", str(row["left_out"])))
            continue
        length = figure(row.get("length"), 0)
        times = figure(1000 * row["cpu_seconds"], 1), figure(row.get("time_ratio"))
        lines.append((name, length, *times, figure(row.get("extra_mb"), 0), figure(row.get("memory_ratio"), 1)))
    return table("One thread", ("", "tokens", "CPU ms", "x time", "extra MB", "x mem"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON; results/cpu.json if not given")
    parser.add_argument("--picture", type=Path, help="PNG; docs/images/scaling.png if not given")
    args = parser.parse_args()
    result = {"tiny": args.tiny, "repeats": args.repeats, "machine": machine(), **measure(args.tiny, args.repeats)}
    console().print(rows_table(result["rows"]), "")
    console().print(goals_table(result["goals"]))
    if args.output or not args.tiny:
        write(args.output or RESULTS / "cpu.json", result)
        plot(result["scaling"], args.picture or PICTURE)


if __name__ == "__main__":
    main()
