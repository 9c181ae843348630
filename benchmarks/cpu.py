"""Cost of a patch on one CPU core, for frequency methods and for methods that remap positions inside attention.

python benchmarks/cpu.py          # about 12 minutes and 12 GB; prints a table and writes JSON to results/
python benchmarks/cpu.py --tiny   # the same steps in seconds, on models too small for meaningful times
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import costs
import decoding
import forwards
import torch
from measure import ratio
from output import RESULTS, Run, console, goal, goals_table, rows_table

FREQUENCY, PREFILL, DECODE, FADING, IMPORT, PATCH, PROBE = 1.02, 1.20, 1.20, 1.03, 0.150, 0.100, 0.500
"""Upper bounds. Ratios of time: a forward with other frequencies to the unpatched forward, an attention layer over a
text and a decoding step to SDPA, and both of these with a fade or a decay to the same without it. Seconds: imports,
`patch_model` with other frequencies, and `patch_model` with a probe of the code."""

SHORT = 128
"""Tokens of a forward with other frequencies. The cost of choosing frequencies shows most in short forwards, and other
load on the machine affects short turns alike."""


def measure(run: Run, tiny: bool, repeats: int) -> dict[str, Any]:
    """Measure all parts, in order."""
    torch.set_num_threads(1)
    attention, model, layer, billion = ["tiny"] * 4 if tiny else ["attention", "small", "layer", "billion"]
    rows: list[dict[str, Any]] = []
    rows += run.part("import", lambda: costs.import_rows(repeats))
    rows += run.part("patch_model", lambda: costs.patch_rows(billion, ("yarn", "self-extend")))
    rows += run.part(
        "forward",
        lambda: forwards.forward_rows(
            layer, SHORT, SHORT // 8, forwards.frequency_methods(layer, SHORT), 1 if tiny else 8 * repeats
        ),
    )
    lengths = (512,) if tiny else (4096, 8192)
    for length in lengths:
        sizes = length, length // forwards.FACTOR, forwards.cpu_methods(length)
        rows += run.part(f"prefill {length}", lambda s=sizes: forwards.prefill_rows(attention, *s, repeats))
        rows += run.part(f"memory {length}", lambda n=length: forwards.memory_rows(attention, n, 1))
        rows += run.part(f"decode {length}", lambda s=sizes: decoding.decode_rows(model, *s, 32 * repeats))
    sizes = lengths[0], lengths[0] // forwards.FACTOR, forwards.cpu_methods(lengths[0])
    rows += run.part("training", lambda: forwards.training_rows(attention, *sizes, repeats))
    console().print(rows_table(rows, "One thread; time of the processor"), "")
    return run.finish(goals(rows))


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare the worst result of each group with its goal."""

    def worst(what: str, **where: Any) -> float:
        ours = [row for row in rows if row["what"] == what and row["way"] not in ("plain", "unpatched")]
        return max(row["time_ratio"] for row in ours if where.items() <= row.items())

    listed = [goal("forward / unpatched: every frequency method", worst("forward"), at_most=FREQUENCY)]
    for what, bound in (("prefill", PREFILL), ("decode", DECODE)):
        for length in sorted({row["length"] for row in rows if row["what"] == what}):
            name = f"{what} / SDPA at {length:,}: every remapping method"
            listed.append(goal(name, worst(what, length=length), at_most=bound))
    for what, name in ((what, name) for what in ("prefill", "decode") for name in forwards.fading(1)):
        bases = [row["ratios"] for row in rows if row["what"] == what and row["way"] == name.split("+")[0]]
        faded = [row["ratios"] for row in rows if row["what"] == what and row["way"] == name]
        ratios = [ratio(*each) or 0.0 for each in zip(faded, bases, strict=True)]
        listed.append(goal(f"{what}: {name} / {name.split('+')[0]}", max(ratios), at_most=FADING))
    for row in rows:
        if row["way"] in costs.IMPORTS:
            listed.append(goal(f"seconds after transformers: {row['way']}", row["seconds"], at_most=IMPORT))
    patching = [row for row in rows if row["what"] == "patch_model"]
    for row in patching:
        bound = PATCH if row["way"] == "yarn" else PROBE
        listed.append(goal(f"seconds of patch_model: {row['way']}", row.get("seconds"), at_most=bound))
    moved = [not row["weights_in_place"] for row in patching if "weights_in_place" in row]
    return [*listed, goal("patches that moved a weight", sum(moved) if moved else None, at_most=0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON; results/cpu.json if not given")
    args = parser.parse_args()
    path = args.output or (None if args.tiny else RESULTS / "cpu.json")
    found = measure(Run("cpu", {"repeats": args.repeats, "tiny": args.tiny}, path), args.tiny, args.repeats)
    console().print(goals_table(found["goals"]))


if __name__ == "__main__":
    main()
