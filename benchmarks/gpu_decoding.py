"""Time of one more token on one GPU, in bfloat16, for a whole model of 1.2 B: step by step, and in a CUDA graph.

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
"""Goal: time of a token against the unpatched model, whose attention runs on PyTorch's SDPA."""

KINDS = {"decode": decoding.decode_rows, "graph": decoding.graph_rows}
AGAINST = (
    ("in a graph", "graph", "plain"),
    ("step by step, as PyTorch picks,", "decode", decoding.CUDNN),
    ("step by step, FlashAttention-2,", "decode", "plain"),
)
"""Mode of reading a token, its kind of row, and the row of the unpatched baseline."""

STEPS = 8
"""Timed steps per repeat."""


def measure(run: Run, tiny: bool, repeats: int, device: str) -> dict[str, Any]:
    """Measure all parts, in order."""
    shrink, methods = setting(tiny)
    rows: list[dict[str, Any]] = []
    for length in LENGTHS[: 1 if tiny else None]:
        sizes = ("tiny" if tiny else "billion", length // shrink, TRAINED // shrink, methods, STEPS * repeats, device)
        for name, rows_of_kind in KINDS.items():
            rows += run.part(f"{name} {length}", lambda of=rows_of_kind, s=sizes: of(*s))
            free(device)
    console().print(rows_table(rows, f"On {run.content['machine']['gpu'] or 'no GPU'}"), "")
    return run.finish(goals(rows, shrink))


def goals(rows: list[dict[str, Any]], shrink: int) -> list[dict[str, Any]]:
    """Return the goals against the unpatched model: in a graph, step by step on PyTorch's choice of kernel, and on the
    fastest kernel."""
    ratios = {(row["what"], row["way"], row["length"]): row["ratios"] for row in rows}
    entries = []
    for length in LENGTHS:
        for mode, kind, baseline in AGAINST:
            for way in METHODS:
                times, baseline_times = (ratios.get((kind, name, length // shrink), []) for name in (way, baseline))
                entries.append(
                    goal(f"a token {mode} at {length:,}: {way}", ratio(times, baseline_times), at_most=AT_MOST)
                )
    return entries


def main() -> None:
    run_on_gpu("gpu_decoding", __doc__, measure)


if __name__ == "__main__":
    main()
