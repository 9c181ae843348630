"""Cost of patches on one GPU, in bfloat16: attention with the heads of Llama-3-8B, and a whole model of 1.2 B.

python benchmarks/gpu.py                       # 8k to 128k tokens; some 5 minutes and 60 GB of GPU memory
python benchmarks/gpu.py --tiny --device cpu   # the same steps in seconds, anywhere
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forwards
import torch
from layers import remapping
from measure import free
from output import RESULTS, Run, console, goal, goals_table, rows_table
from perplexity import GPU_SWEEPS
from perplexity import measure as measure_sweep

from hf_posext.methods import Method

TRAINED, WINDOW, CHUNK, GROUP = 8192, 1024, 6144, 32
"""Llama-3's trained length; the window of the Self-Extend paper; the chunks of the dual-chunk paper; a group for
128k tokens."""

METHODS = ("self-extend", "rerope", "dual-chunk")
LENGTHS, WHOLE = (8192, 16_384, 32_768, 65_536, 131_072), 32_768
PREFILL = {8192: 1.35, 32_768: 1.10, 131_072: 1.05}
DUAL_CHUNK, PUBLISHED, MODEL, PERPLEXITY = 1.15, 1.8, 1.06, 40.0
"""Goals: time of dual-chunk at 32k against SDPA with rotation; time of the published code at 32k against this package;
time of the whole model at 32k, patched against unpatched; GiB for the perplexity of 128k tokens."""


def setting(tiny: bool) -> tuple[int, dict[str, Method]]:
    """Return the divisor of lengths, and the methods for a model with a trained length of `TRAINED` tokens."""
    shrink = 64 if tiny else 1
    every = remapping(WINDOW // shrink, CHUNK // shrink, GROUP // (8 if tiny else 1))
    return shrink, {name: every[name] for name in METHODS}


def measure(run: Run, tiny: bool, repeats: int, device: str) -> dict[str, Any]:
    """Measure all parts, in order."""
    shape, model = ("tiny", "tiny") if tiny else ("llama-3-8b", "billion")
    shrink, methods = setting(tiny)
    trained = TRAINED // shrink
    rows: list[dict[str, Any]] = []
    for length in LENGTHS[: 3 if tiny else None]:
        sizes = (shape, length // shrink, trained, methods, repeats, device, ("self-extend",))
        rows += run.part(f"prefill {length}", lambda s=sizes: forwards.prefill_rows(*s))
    rows += run.part("model", lambda: forwards.forward_rows(model, WHOLE // shrink, trained, methods, repeats, device))
    free(device)  # the rest runs in processes of its own
    sweeps = [sweep.tiny() if tiny else sweep for sweep in GPU_SWEEPS]
    sweep_results = [
        run.part(f"perplexity {n}", lambda sweep=sweep: measure_sweep(sweep, 1)) for n, sweep in enumerate(sweeps)
    ]
    console().print(rows_table(rows, f"On {run.content['machine']['gpu'] or 'no GPU'}"), "")
    return run.finish(goals(rows, shrink) + perplexity_goals(sweep_results))


def goals(rows: list[dict[str, Any]], shrink: int) -> list[dict[str, Any]]:
    def ratio(kind: str, way: str, length: int) -> float | None:
        matches = [r for r in rows if (r["what"], r["way"], r["length"]) == (kind, way, length // shrink)]
        return matches[0]["time_ratio"] if matches else None

    entries = []
    for length, bound in PREFILL.items():
        for way in ("self-extend", "rerope"):
            entries.append(goal(f"prefill / SDPA at {length:,}: {way}", ratio("prefill", way, length), at_most=bound))
    entries.append(
        goal(f"prefill / SDPA at {WHOLE:,}: dual-chunk", ratio("prefill", "dual-chunk", WHOLE), at_most=DUAL_CHUNK)
    )
    fast, published = (ratio("prefill", way, WHOLE) for way in ("self-extend", "self-extend, as published"))
    gained = published / fast if fast and published else None
    entries.append(goal(f"published / ours at {WHOLE:,}: self-extend", gained, at_least=PUBLISHED))
    for way in METHODS:
        entries.append(goal(f"1.2 B model at {WHOLE:,}: {way}", ratio("forward", way, WHOLE), at_most=MODEL))
    return entries


def perplexity_goals(sweeps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    entries = [entry for sweep in sweeps for entry in sweep["goals"]]
    last = sweeps[-1]
    return [*entries, goal(f"GiB: {last['name']}", last["rows"]["hf_posext"]["peak_gib"], at_most=PERPLEXITY)]


def run_on_gpu(name: str, description: str | None, measure: Callable[[Run, bool, int, str], dict[str, Any]]) -> None:
    """Run a script that measures on a GPU, or tries its steps on a CPU."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help=f"JSON; results/{name}.json if not given")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; to try the steps: --tiny --device cpu")
    path = args.output or (None if args.tiny else RESULTS / f"{name}.json")
    run = Run(name, {"repeats": args.repeats, "tiny": args.tiny, "device": args.device}, path)
    console().print(goals_table(measure(run, args.tiny, args.repeats, args.device)["goals"]))


def main() -> None:
    run_on_gpu("gpu", __doc__, measure)


if __name__ == "__main__":
    main()
