"""The same on one GPU, in bfloat16: attention with the heads of Llama-3-8B, and a whole model of 1.2 B.

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
"""Llama-3's trained length; the window of Self-Extend's paper; chunks of dual-chunk's paper; a group for 128k."""

METHODS = ("self-extend", "rerope", "dual-chunk")
LENGTHS, WHOLE = (8192, 16_384, 32_768, 65_536, 131_072), 32_768
PREFILL = {8192: 1.35, 32_768: 1.10, 131_072: 1.05}
DUAL_CHUNK, PUBLISHED, MODEL, PERPLEXITY = 1.15, 1.8, 1.06, 40.0
"""Goals: time against SDPA with rotation, of dual-chunk at 32k; of the published code against ours at 32k; of the
whole model patched against unpatched at 32k; GiB for the perplexity of 128k tokens."""


def setting(tiny: bool) -> tuple[int, dict[str, Method]]:
    """Divisor of lengths, and the methods, for a model that claims to be trained on `TRAINED` tokens."""
    shrink = 64 if tiny else 1
    every = remapping(WINDOW // shrink, CHUNK // shrink, GROUP // (8 if tiny else 1))
    return shrink, {name: every[name] for name in METHODS}


def measure(run: Run, tiny: bool, repeats: int, device: str) -> dict[str, Any]:
    """All parts, in order."""
    shape, model = ("tiny", "tiny") if tiny else ("llama-3-8b", "billion")
    shrink, chosen = setting(tiny)
    trained = TRAINED // shrink
    rows: list[dict[str, Any]] = []
    for length in LENGTHS[: 3 if tiny else None]:
        sizes = (shape, length // shrink, trained, chosen, repeats, device, ("self-extend",))
        rows += run.part(f"prefill {length}", lambda s=sizes: forwards.prefill_rows(*s))
    rows += run.part("model", lambda: forwards.forward_rows(model, WHOLE // shrink, trained, chosen, repeats, device))
    free(device)  # what follows runs in processes of their own
    sweeps = [sweep.tiny() if tiny else sweep for sweep in GPU_SWEEPS]
    found = [run.part(f"perplexity {n}", lambda one=one: measure_sweep(one, 1)) for n, one in enumerate(sweeps)]
    console().print(rows_table(rows, f"On {run.content['machine']['gpu'] or 'no GPU'}"), "")
    return run.finish(goals(rows, shrink) + perplexity_goals(found))


def goals(rows: list[dict[str, Any]], shrink: int) -> list[dict[str, Any]]:
    def ratio(what: str, way: str, length: int) -> float | None:
        found = [r for r in rows if (r["what"], r["way"], r["length"]) == (what, way, length // shrink)]
        return found[0]["time_ratio"] if found else None

    listed = []
    for length, bound in PREFILL.items():
        for way in ("self-extend", "rerope"):
            listed.append(goal(f"prefill / SDPA at {length:,}: {way}", ratio("prefill", way, length), at_most=bound))
    listed.append(
        goal(f"prefill / SDPA at {WHOLE:,}: dual-chunk", ratio("prefill", "dual-chunk", WHOLE), at_most=DUAL_CHUNK)
    )
    ours, theirs = (ratio("prefill", way, WHOLE) for way in ("self-extend", "self-extend, as published"))
    gained = theirs / ours if ours and theirs else None
    listed.append(goal(f"published / ours at {WHOLE:,}: self-extend", gained, at_least=PUBLISHED))
    for way in METHODS:
        listed.append(goal(f"1.2 B model at {WHOLE:,}: {way}", ratio("forward", way, WHOLE), at_most=MODEL))
    return listed


def perplexity_goals(sweeps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    listed = [one for sweep in sweeps for one in sweep["goals"]]
    last = sweeps[-1]
    return [*listed, goal(f"GiB: {last['name']}", last["rows"]["hf_posext"]["peak_gib"], at_most=PERPLEXITY)]


def run_on_gpu(name: str, description: str | None, measure: Callable[[Run, bool, int, str], dict[str, Any]]) -> None:
    """The command line of a script that measures on a GPU, or, to try its steps, anywhere."""
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
