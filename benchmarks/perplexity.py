"""Cost of the perplexity of one long document beside its peers: same model, same tokens, same windows.

    python benchmarks/perplexity.py          # some 7 minutes and 14 GB; a table, and JSON in results/
    python benchmarks/perplexity.py --tiny   # the same steps in seconds, on a model too small for meaningful numbers

The peers lm_eval and longppl are optional: pip install -r benchmarks/requirements.txt
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from measure import Reading, Way, ratio, read_in_turn
from output import RESULTS, Run, console, figure, goal, goals_table, table
from peers import job

OURS = "hf_posext"
REPEATED = (OURS, "floor")
"""Ways that are read in every turn. The others differ so much that one reading is enough."""

COPIES = {"full logits": 2, "evaluate": 3, "longppl": 2, "docs recipe": 2, "lm_eval": 2}
"""Number of float32 matrices of length x vocabulary in memory at the peak of each way."""


@dataclass(frozen=True)
class Sweep:
    """
    Perplexity of one document at several lengths, by ways that return the same numbers.

    Args:
        protocol (`str`): `"prefix"`, `"sliding"` or `"rolling"`.
        vocabulary (`int`): vocabulary size of the model.
        tokens (`int`): length of the document.
        lengths (`tuple[int, ...]`): context lengths.
        ways (`tuple[str, ...]`): names in `peers.WAYS`, in addition to this package.
        goals (`dict`): by way, the least ratios of its time and of its extra memory to those of this package. For
            `"floor"`, the largest ratio of this package's time to its own.
        stride (`int`, *optional*): stride of sliding windows.
        shape (`str`): a name in `models.SHAPES`.
        device (`str`): `"cpu"` or `"cuda"`.
    """

    protocol: str
    vocabulary: int
    tokens: int
    lengths: tuple[int, ...]
    ways: tuple[str, ...]
    goals: dict[str, tuple[float, ...]]
    stride: int | None = None
    shape: str = "small"
    device: str = "cpu"

    @property
    def name(self) -> str:
        span = f"{self.lengths[0]}..{self.lengths[-1]}" if len(self.lengths) > 1 else f"{self.lengths[0]}"
        return f"{self.protocol} {span}, vocabulary {self.vocabulary:,}"

    def tiny(self) -> Sweep:
        lengths = (32, 48, 64)[-len(self.lengths) :]
        stride = self.stride and 16
        return replace(self, vocabulary=300, tokens=64, lengths=lengths, stride=stride, shape="tiny", device="cpu")

    def way(self, name: str) -> Way:
        task = {"protocol": self.protocol, "lengths": list(self.lengths), "stride": self.stride}
        settings = {"way": name, "task": task, "shape": self.shape, "vocabulary": self.vocabulary}
        settings |= {"tokens": self.tokens, "device": self.device}
        needs = 4 * self.vocabulary * (COPIES.get(name, 0) * self.lengths[-1] + 2 * 256) + 10**9
        return Way(name, job, settings, needs, once=name not in REPEATED)


PEERS = ("floor", "full logits", "evaluate", "longppl")
FLOOR = {"floor": (1.10,)}
CPU_SWEEPS = (
    Sweep("prefix", 32_000, 16_384, (512, 1024, 2048, 4096, 8192, 16_384), PEERS, {**FLOOR, "full logits": (1.7, 15)}),
    Sweep("prefix", 128_256, 8192, (512, 1024, 2048, 4096, 8192), PEERS[:2], {**FLOOR, "full logits": (2.5, 20)}),
    Sweep("sliding", 32_000, 4096, (512, 1024, 2048), ("docs recipe",), {}, stride=256),
    Sweep("rolling", 32_000, 4096, (512, 1024, 2048), ("lm_eval",), {}),
    Sweep("rolling", 128_256, 4096, (512, 1024, 2048), ("lm_eval",), {}),
)
GPU_SWEEPS = tuple(
    Sweep("prefix", 128_256, length, (length,), PEERS[:2], {}, shape="billion", device="cuda")
    for length in (32_768, 131_072)
)


def measure(sweep: Sweep, repeats: int) -> dict[str, Any]:
    """Return a row per way, and the goals."""
    readings_of = read_in_turn([sweep.way(name) for name in (OURS, *sweep.ways)], repeats)
    time = "seconds" if sweep.device == "cuda" else "cpu_seconds"
    own_readings = readings_of[OURS]
    if isinstance(own_readings, str):
        raise SystemExit(f"{sweep.name}: {own_readings}")
    rows = {name: row(readings, own_readings, time) for name, readings in readings_of.items()}
    result = {"name": sweep.name, **asdict(sweep), "rows": rows, "goals": goals(sweep, rows)}
    console().print(sweep_table(result), "")
    return result


def row(readings: list[Reading] | str, baseline: list[Reading], time: str) -> dict[str, Any]:
    """Return the medians of a way, its ratios to the baseline in the same turn, and the deviation of its NLL."""
    if isinstance(readings, str):
        return {"left_out": readings}
    times, baseline_times = (
        [getattr(reading, time) for reading in readings_of_way] for readings_of_way in (readings, baseline)
    )
    pairs = zip(readings[0].value, baseline[0].value, strict=bool(readings[0].value))
    return {
        "readings": len(readings),
        "cpu_seconds": statistics.median(reading.cpu_seconds for reading in readings),
        "seconds": statistics.median(reading.seconds for reading in readings),
        "extra_mb": statistics.median(reading.extra_bytes for reading in readings) / 1e6,
        "peak_gib": statistics.median(reading.peak_bytes for reading in readings) / 2**30,
        "time_ratio": ratio(times, baseline_times),
        "time_ratios": [a / b for a, b in zip(times, baseline_times, strict=False)],
        "memory_ratio": ratio(
            [reading.extra_bytes for reading in readings], [reading.extra_bytes for reading in baseline]
        ),
        "nll": readings[0].value,
        "deviation": max((abs(a - b) for a, b in pairs), default=None),
    }


def goals(sweep: Sweep, rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    entries = []
    for name, bounds in sweep.goals.items():
        row = rows[name]
        if name == "floor":
            entries.append(goal(f"time / floor: {sweep.name}", 1 / row["time_ratio"], at_most=bounds[0]))
            continue
        for quantity, key, bound in (("time", "time_ratio", bounds[0]), ("memory", "memory_ratio", bounds[1])):
            entries.append(goal(f"{quantity} of {name}: {sweep.name}", row.get(key), at_least=bound))
    peers = [row for name, row in rows.items() if name != OURS]
    apart = [row["deviation"] for row in peers if row.get("deviation") is not None]
    return [*entries, goal(f"NLL apart: {sweep.name}", max(apart, default=None), at_most=1e-5)]


def sweep_table(result: dict[str, Any]) -> Any:
    lines = []
    for name, row in result["rows"].items():
        if "left_out" in row:
            lines.append((name, row["left_out"]))
            continue
        far = "-" if row["deviation"] is None else f"{row['deviation']:.0e}"
        times = (figure(row["cpu_seconds"]), figure(row["seconds"]), figure(row["extra_mb"], 0))
        lines.append((name, *times, figure(row["time_ratio"]), figure(row["memory_ratio"], 1), far))
    heads = ("", "CPU s", "clock s", "extra MB", "x time", "x memory", "NLL apart")
    return table(result["name"], heads, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON; results/perplexity.json if not given")
    args = parser.parse_args()
    path = args.output or (None if args.tiny else RESULTS / "perplexity.json")
    run = Run("perplexity", {"repeats": args.repeats, "tiny": args.tiny}, path)
    sweeps = [sweep.tiny() if args.tiny else sweep for sweep in CPU_SWEEPS]
    results = [
        run.part(str(number), lambda sweep=sweep: measure(sweep, args.repeats)) for number, sweep in enumerate(sweeps)
    ]
    run.finish([goal for sweep in results for goal in sweep["goals"]])
    console().print(goals_table(run.content["goals"]))


if __name__ == "__main__":
    main()
