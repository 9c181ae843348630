"""One more token on one GPU, in bfloat16, of a whole model of 1.2 B: step by step, and in a CUDA graph.

python benchmarks/gpu_decoding.py                       # 32k and 128k tokens; some 5 minutes and 60 GB of GPU memory
python benchmarks/gpu_decoding.py --tiny --device cpu   # the same steps in seconds, anywhere
"""

from __future__ import annotations

from typing import Any

import decoding
from gpu import METHODS, TRAINED, run_on_gpu, setting
from measure import free, ratio
from output import Run, console, goal, rows_table

LENGTHS = (32_768, 131_072)
AT_MOST = 1.10
"""Time of a token, against the unpatched model whose attention runs on PyTorch's SDPA."""

KINDS = {"decode": decoding.decode_rows, "graph": decoding.graph_rows}
AGAINST = (
    ("in a graph", "graph", "plain"),
    ("step by step, as PyTorch picks,", "decode", decoding.CUDNN),
    ("step by step, FlashAttention-2,", "decode", "plain"),
)
"""Way in which a token is read, and kernel by which the unpatched model attends."""

STEPS = 8
"""Timed for each of the repeats."""


def measure(run: Run, tiny: bool, repeats: int, device: str) -> dict[str, Any]:
    """All parts, in order."""
    shrink, chosen = setting(tiny)
    rows: list[dict[str, Any]] = []
    for length in LENGTHS[: 1 if tiny else None]:
        sizes = ("tiny" if tiny else "billion", length // shrink, TRAINED // shrink, chosen, STEPS * repeats, device)
        for name, measured in KINDS.items():
            rows += run.part(f"{name} {length}", lambda of=measured, s=sizes: of(*s))
            free(device)
    console().print(rows_table(rows, f"On {run.content['machine']['gpu'] or 'no GPU'}"), "")
    return run.finish(goals(rows, shrink))


def goals(rows: list[dict[str, Any]], shrink: int) -> list[dict[str, Any]]:
    """Against the unpatched model: in a graph; step by step as PyTorch picks its kernel; and on the fastest kernel."""
    ratios = {(row["what"], row["way"], row["length"]): row["ratios"] for row in rows}
    listed = []
    for length in LENGTHS:
        for said, kind, other in AGAINST:
            for way in METHODS:
                ours, theirs = (ratios.get((kind, one, length // shrink), []) for one in (way, other))
                listed.append(goal(f"a token {said} at {length:,}: {way}", ratio(ours, theirs), at_most=AT_MOST))
    return listed


def main() -> None:
    run_on_gpu("gpu_decoding", __doc__, measure)


if __name__ == "__main__":
    main()
