"""Time and memory by length: attention is quadratic in time, and all else linear, patched or not."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import models
import numpy as np
from forwards import FACTOR, trunk
from matplotlib.figure import Figure
from measure import Way, read_in_turn
from scipy.optimize import nnls

from hf_posext import patch_model
from hf_posext.evaluation.scoring.scorer import TokenScorer

VOCABULARY = 32_000
WAYS = {"forward": None, "forward, yarn": "yarn", "forward, self-extend": "self-extend", "perplexity": None}


def scaling(lengths: Sequence[int], shape: str, repeats: int) -> list[dict[str, Any]]:
    """For each way its readings, and a fit of each: seconds = a L + b L^2, and megabytes = c + d L."""
    settings = {"shape": shape, "trained": lengths[-1] // FACTOR}
    curves = []
    for name in WAYS:
        ways = [Way(str(length), job, settings | {"name": name, "length": length}) for length in lengths]
        readings = {int(length): found for length, found in read_in_turn(ways, repeats).items()}
        seconds = [statistics.median(one.cpu_seconds for one in readings[length]) for length in lengths]
        megabytes = [statistics.median(one.extra_bytes for one in readings[length]) / 1e6 for length in lengths]
        curves.append(
            {
                "way": name,
                "lengths": list(lengths),
                "cpu_seconds": seconds,
                "extra_mb": megabytes,
                "time_fit": fit(lengths, seconds, (1, 2)),
                "memory_fit": fit(lengths, megabytes, (0, 1)),
            }
        )
    return curves


def job(name: str, length: int, shape: str, trained: int) -> Callable[[], object]:
    """A forward of the trunk over `length` tokens, or the NLL of each of them."""
    model = models.llama(shape, VOCABULARY, trained=trained)
    if WAYS[name] is not None:
        patch_model(model, WAYS[name], factor=FACTOR)
    run = TokenScorer(model).token_nll if name == "perplexity" else partial(trunk, model)
    ids = models.text(length, VOCABULARY)[None]
    run(ids[:, :64])
    return lambda: run(ids)


def fit(lengths: Sequence[int], values: Sequence[float], powers: tuple[int, int]) -> dict[str, Any]:
    """Coefficients of two powers of the length, none below 0, by least squares of what is off in relation to the
    value; and the largest such."""
    grid = np.array([[float(length) ** power for power in powers] for length in lengths])
    found = np.maximum(np.array(values), 1e-9)
    coefficients, _ = nnls(grid / found[:, None], np.ones(len(found)))
    off = np.abs(grid @ coefficients / found - 1)
    return {"powers": list(powers), "coefficients": coefficients.tolist(), "largest_residual": float(off.max())}


def plot(curves: Sequence[dict[str, Any]], path: Path) -> None:
    """Readings as points, fits as lines, both axes logarithmic."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, key, label in ((left, "cpu_seconds", "processor seconds"), (right, "extra_mb", "peak memory above, MB")):
        for number, curve in enumerate(curves):
            found = curve["time_fit" if key == "cpu_seconds" else "memory_fit"]
            dense = np.geomspace(curve["lengths"][0], curve["lengths"][-1], 50)
            line = sum(c * dense**p for c, p in zip(found["coefficients"], found["powers"], strict=True))
            axes.plot(dense, line, color=f"C{number}", linewidth=1)
            axes.plot(curve["lengths"], curve[key], "o", color=f"C{number}", markersize=4, label=curve["way"])
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axes.set_xticks(curves[0]["lengths"], [f"{n:,}" for n in curves[0]["lengths"]])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
