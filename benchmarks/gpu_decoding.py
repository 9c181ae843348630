"""One more token on one GPU, in bfloat16, of a whole model of 1.2 B: step by step, and in a CUDA graph.

python benchmarks/gpu_decoding.py                       # 32k and 128k tokens; some 5 minutes and 60 GB of GPU memory
python benchmarks/gpu_decoding.py --tiny --device cpu   # the same steps in seconds, anywhere
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import decoding
import torch
from gpu import METHODS, TRAINED, setting
from measure import free
from output import RESULTS, Run, console, goal, goals_table, rows_table

LENGTHS = (32_768, 131_072)
AT_MOST = 1.10
"""Time of a token, against the unpatched model whose attention runs on PyTorch's SDPA."""

KINDS = {"decode": ("step by step", decoding.decode_rows), "graph": ("in a graph", decoding.graph_rows)}
STEPS = 8
"""Timed for each of the repeats."""


def measure(run: Run, tiny: bool, repeats: int, device: str) -> dict[str, Any]:
    """All parts, in order."""
    shrink, chosen = setting(tiny)
    rows: list[dict[str, Any]] = []
    for length in LENGTHS[: 1 if tiny else None]:
        sizes = ("tiny" if tiny else "billion", length // shrink, TRAINED // shrink, chosen, STEPS * repeats, device)
        for name, (_, measured) in KINDS.items():
            rows += run.part(f"{name} {length}", lambda of=measured, s=sizes: of(*s))
            free(device)
    console().print(rows_table(rows, f"On {run.content['machine']['gpu'] or 'no GPU'}"), "")
    return run.finish(goals(rows, shrink))


def goals(rows: list[dict[str, Any]], shrink: int) -> list[dict[str, Any]]:
    found = {(row["what"], row["way"], row["length"]): row["time_ratio"] for row in rows}
    return [
        goal(f"a token {said} at {length:,}: {way}", found.get((kind, way, length // shrink)), at_most=AT_MOST)
        for length in LENGTHS
        for kind, (said, _) in KINDS.items()
        for way in METHODS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON; results/gpu_decoding.json if not given")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; to try the steps: --tiny --device cpu")
    path = args.output or (None if args.tiny else RESULTS / "gpu_decoding.json")
    run = Run("gpu_decoding", {"repeats": args.repeats, "tiny": args.tiny, "device": args.device}, path)
    console().print(goals_table(measure(run, args.tiny, args.repeats, args.device)["goals"]))


if __name__ == "__main__":
    main()
