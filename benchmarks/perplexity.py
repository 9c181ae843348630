"""Cost of the perplexity of one long document beside its peers: same model, same tokens, same windows.

    python benchmarks/perplexity.py          # some 7 minutes and 14 GB; a table, and JSON in results/
    python benchmarks/perplexity.py --tiny   # the same steps in seconds, on a model that shows nothing

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
"""Ways that are read in every turn; the others, whose distance is large, only in the first."""

COPIES = {"full logits": 2, "evaluate": 3, "longppl": 2, "docs recipe": 2, "lm_eval": 2}
"""Float32 matrices of length x vocabulary that a way holds at its peak."""


@dataclass(frozen=True)
class Sweep:
    """
    The perplexity of one document at some lengths, by ways that give the same numbers.

    Args:
        protocol (`str`): `"prefix"`, `"sliding"` or `"rolling"`.
        vocabulary (`int`): of the model.
        tokens (`int`): of the document.
        lengths (`tuple[int, ...]`): context lengths.
        ways (`tuple[str, ...]`): of `peers.WAYS`, besides ours.
        goals (`dict`): by way: at least so many times our time, and our extra memory; for `"floor"`, our time at most
            so many times its own.
        stride (`int`, *optional*): of sliding windows.
        shape (`str`): of `models.SHAPES`.
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
    """A row for each way, and the goals."""
    found = read_in_turn([sweep.way(name) for name in (OURS, *sweep.ways)], repeats)
    time = "seconds" if sweep.device == "cuda" else "cpu_seconds"
    ours = found[OURS]
    if isinstance(ours, str):
        raise SystemExit(f"{sweep.name}: {ours}")
    rows = {name: row(readings, ours, time) for name, readings in found.items()}
    measured = {"name": sweep.name, **asdict(sweep), "rows": rows, "goals": goals(sweep, rows)}
    console().print(sweep_table(measured), "")
    return measured


def row(readings: list[Reading] | str, ours: list[Reading], time: str) -> dict[str, Any]:
    """Medians of a way, its ratios to ours in the same turn, and how far its NLL is from ours."""
    if isinstance(readings, str):
        return {"left_out": readings}
    times, our_times = ([getattr(one, time) for one in each] for each in (readings, ours))
    pairs = zip(readings[0].value, ours[0].value, strict=bool(readings[0].value))
    return {
        "readings": len(readings),
        "cpu_seconds": statistics.median(one.cpu_seconds for one in readings),
        "seconds": statistics.median(one.seconds for one in readings),
        "extra_mb": statistics.median(one.extra_bytes for one in readings) / 1e6,
        "peak_gib": statistics.median(one.peak_bytes for one in readings) / 2**30,
        "time_ratio": ratio(times, our_times),
        "time_ratios": [a / b for a, b in zip(times, our_times, strict=False)],
        "memory_ratio": ratio([one.extra_bytes for one in readings], [one.extra_bytes for one in ours]),
        "nll": readings[0].value,
        "deviation": max((abs(a - b) for a, b in pairs), default=None),
    }


def goals(sweep: Sweep, rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    listed = []
    for name, bounds in sweep.goals.items():
        found = rows[name]
        if name == "floor":
            listed.append(goal(f"time / floor: {sweep.name}", 1 / found["time_ratio"], at_most=bounds[0]))
            continue
        for what, key, bound in (("time", "time_ratio", bounds[0]), ("memory", "memory_ratio", bounds[1])):
            listed.append(goal(f"{what} of {name}: {sweep.name}", found.get(key), at_least=bound))
    others = [found for name, found in rows.items() if name != OURS]
    apart = [found["deviation"] for found in others if found.get("deviation") is not None]
    return [*listed, goal(f"NLL apart: {sweep.name}", max(apart, default=None), at_most=1e-5)]


def sweep_table(found: dict[str, Any]) -> Any:
    lines = []
    for name, each in found["rows"].items():
        if "left_out" in each:
            lines.append((name, each["left_out"]))
            continue
        far = "-" if each["deviation"] is None else f"{each['deviation']:.0e}"
        times = (figure(each["cpu_seconds"]), figure(each["seconds"]), figure(each["extra_mb"], 0))
        lines.append((name, *times, figure(each["time_ratio"]), figure(each["memory_ratio"], 1), far))
    heads = ("", "CPU s", "clock s", "extra MB", "x time", "x memory", "NLL apart")
    return table(found["name"], heads, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON; results/perplexity.json if not given")
    args = parser.parse_args()
    path = args.output or (None if args.tiny else RESULTS / "perplexity.json")
    run = Run("perplexity", {"repeats": args.repeats, "tiny": args.tiny}, path)
    sweeps = [sweep.tiny() if args.tiny else sweep for sweep in CPU_SWEEPS]
    found = [run.part(str(number), lambda one=one: measure(one, args.repeats)) for number, one in enumerate(sweeps)]
    run.finish([goal for sweep in found for goal in sweep["goals"]])
    console().print(goals_table(run.content["goals"]))


if __name__ == "__main__":
    main()
