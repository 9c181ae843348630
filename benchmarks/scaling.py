"""Time and memory by length: attention is quadratic in time, and the rest is linear, patched or not.

python benchmarks/scaling.py          # some 4 minutes and 2 GB; a table, JSON in results/, a picture in docs/images/
python benchmarks/scaling.py --tiny   # the same steps in seconds, on a model too small for meaningful numbers
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import models
import numpy as np
from forwards import FACTOR, trunk
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from measure import Way, read_in_turn
from output import RESULTS, Run, console, figure, goal, goals_table, table
from scipy.optimize import nnls

from hf_posext import patch_model
from hf_posext.evaluation.scorer import TokenScorer

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "scaling.png"
VOCABULARY = 32_000
WAYS = {"forward": None, "forward, yarn": "yarn", "forward, self-extend": "self-extend", "perplexity": None}
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")
"""Colours of Okabe and Ito, which colour-blind readers can distinguish."""

MARKS = "os^D"
FIT = 0.15
"""Goal: largest relative distance of a reading from the curve."""


def measure(run: Run, tiny: bool) -> dict[str, Any]:
    """Return the readings of each way and their fits: seconds = a L + b L^2, and megabytes = c + d L."""
    lengths = (128, 256, 512) if tiny else (1024, 2048, 4096, 8192, 16_384)
    shape = "tiny" if tiny else "small"
    curves = [run.part(name, lambda name=name: curve(name, lengths, shape)) for name in WAYS]
    lines = [
        (result["way"], *(figure(number) for number in result["seconds"]), figure(result["extra_mb"][-1], 0))
        for result in curves
    ]
    heads = ("CPU seconds at", *(f"{length:,}" for length in lengths), "MB at last")
    console().print(table("One thread", heads, lines), "")
    fits = {"time": "a L + b L²", "memory": "c + d L"}
    return run.finish(
        [
            goal(
                f"{kind} off {formula}",
                max(result[f"{kind}_fit"]["largest_residual"] for result in curves),
                at_most=FIT,
            )
            for kind, formula in fits.items()
        ]
    )


def curve(name: str, lengths: Sequence[int], shape: str) -> dict[str, Any]:
    """Return the readings of one way and their fits. Short lengths are read three times."""
    settings = {"shape": shape, "trained": lengths[-1] // FACTOR, "name": name}
    ways = [Way(str(n), job, settings | {"length": n}, once=n > lengths[-1] // 4) for n in lengths]
    readings_of = read_in_turn(ways, 3)
    readings = [readings_of[way.name] for way in ways]
    seconds = [statistics.median(reading.cpu_seconds for reading in of_length) for of_length in readings]
    megabytes = [statistics.median(reading.extra_bytes for reading in of_length) / 1e6 for of_length in readings]
    return {
        "way": name,
        "lengths": list(lengths),
        "seconds": seconds,
        "extra_mb": megabytes,
        "time_fit": fit(lengths, seconds, (1, 2)),
        "memory_fit": fit(lengths, megabytes, (0, 1)),
    }


def job(name: str, length: int, shape: str, trained: int) -> Callable[[], object]:
    """Return a function that runs the trunk over `length` tokens, or computes the NLL of each of them."""
    model = models.llama(shape, VOCABULARY, trained)
    if WAYS[name] is not None:
        patch_model(model, WAYS[name], factor=FACTOR)
    run = TokenScorer(model).token_nll if name == "perplexity" else partial(trunk, model)
    ids = models.text(length, VOCABULARY)[None]
    run(ids[:, :64])
    return lambda: run(ids)


def fit(lengths: Sequence[int], values: Sequence[float], powers: tuple[int, int]) -> dict[str, Any]:
    """Fit non-negative coefficients of two powers of the length by least squares of the relative residuals.

    The result contains the largest relative residual.
    """
    grid = np.array([[float(length) ** power for power in powers] for length in lengths])
    positive = np.maximum(np.array(values), 1e-9)
    coefficients, _ = nnls(grid / positive[:, None], np.ones(len(positive)))
    off = np.abs(grid @ coefficients / positive - 1)
    return {"powers": list(powers), "coefficients": coefficients.tolist(), "largest_residual": float(off.max())}


def plot(curves: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw readings as points and fits as lines, on logarithmic axes."""
    picture = Figure(figsize=(9.5, 4), layout="constrained")
    time_axes, memory_axes = picture.subplots(1, 2)
    sides = (
        (time_axes, "seconds", "time_fit", "processor seconds"),
        (memory_axes, "extra_mb", "memory_fit", "megabytes"),
    )
    for axes, key, fitted, label in sides:
        for result, colour, mark in zip(curves, COLOURS, MARKS, strict=True):
            dense = np.geomspace(result["lengths"][0], result["lengths"][-1], 50)
            terms = zip(result[fitted]["coefficients"], result[fitted]["powers"], strict=True)
            axes.plot(dense, sum(c * dense**p for c, p in terms), color=colour, linewidth=1.2)
            axes.plot(result["lengths"], result[key], mark, color=colour, markersize=5, label=result["way"])
        axes.set(xscale="log", yscale="log", xlabel="length in tokens", ylabel=label)
        axes.set_xticks(curves[0]["lengths"], [f"{n:,}" for n in curves[0]["lengths"]])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    time_axes.set_title("Time: points measured, lines a L + b L²", fontsize=10)
    memory_axes.set_title("Extra memory: points measured, lines c + d L", fontsize=10)
    time_axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON; results/scaling.json if not given")
    parser.add_argument("--picture", type=Path, help="PNG; docs/images/scaling.png if not given")
    args = parser.parse_args()
    path = args.output or (None if args.tiny else RESULTS / "scaling.json")
    result = measure(Run("scaling", {"tiny": args.tiny}, path), args.tiny)
    console().print(goals_table(result["goals"]))
    if args.picture or not args.tiny:
        plot(list(result["parts"].values()), args.picture or PICTURE)


if __name__ == "__main__":
    main()
