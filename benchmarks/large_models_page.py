"""Write `docs/large_models.md` from the formulas of `large_models.py` and the result files that check them.

python benchmarks/large_models_page.py            # write the page
python benchmarks/large_models_page.py --check    # exit 1 if the committed page is out of date
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from large_models import LARGE, Shape
from models import SHAPES, config
from output import RESULTS
from page import fill, markdown, publish

HERE = Path(__file__).resolve().parent
TEMPLATE = HERE / "large_models.md.jinja"
PAGE = HERE.parent / "docs" / "large_models.md"
LENGTHS = (32_768, 131_072)
CHUNK = 2048
DEVICES = 8
"""Processes of the context-parallel columns."""

BILLION = Shape.of("1.2 B", config("billion", 128_256), LARGE[0].parameters)


class Rates:
    """
    Operations a second on the GPU of `gpu.json`, read from two of its rows; its other rows check the formulas.

    Attention is that of one layer with the heads of an 8 B model at 32,768 tokens. The products with weights are what
    is left of the perplexity of 32,768 tokens under a model of 1.2 B.

    Args:
        gpu (`dict`): content of `benchmarks/results/gpu.json`.
    """

    def __init__(self, gpu: dict[str, Any]) -> None:
        self.name = gpu["machine"]["gpu"]
        tokens = LENGTHS[0]
        (layer,) = [row for row in gpu["parts"][f"prefill {tokens}"] if row["way"] == "plain"]
        self.attention = 2 * tokens**2 * SHAPES["llama-3-8b"]["hidden_size"] / layer["seconds"]
        products, pairs = BILLION.operations(tokens)
        self.linear = products / (perplexity(gpu, tokens)["seconds"] - pairs / self.attention)

    def seconds(self, shape: Shape, tokens: int) -> float:
        return shape.seconds(tokens, self.linear, self.attention)

    def control(self, shape: Shape, tokens: int, trained: int) -> float:
        return shape.control_seconds(tokens, trained, self.linear, self.attention)


def perplexity(gpu: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Return the reading of hf_posext for one document under the model of 1.2 B."""
    parts = [part for name, part in gpu["parts"].items() if name.startswith("perplexity")]
    (found,) = [part["rows"]["hf_posext"] for part in parts if part["tokens"] == tokens]
    row: dict[str, Any] = found
    return row


def checks(gpu: dict[str, Any], chunks: list[dict[str, Any]]) -> list[tuple[str, str, float, float]]:
    """Return what was measured, its unit, the reading and the formula, for rows that no rate was read from."""
    rates, found = Rates(gpu), []
    for tokens in LENGTHS:
        extra = perplexity(gpu, tokens)["extra_mb"]
        found.append((f"1.2 B in bfloat16, {tokens:,} tokens, {rates.name}", "MB", extra, BILLION.extra(tokens) / 1e6))
    last = LENGTHS[-1]
    took = perplexity(gpu, last)["seconds"], rates.seconds(BILLION, last)
    found.append((f"1.2 B in bfloat16, {last:,} tokens, {rates.name}", "s", *took))
    (layer,) = [row for row in gpu["parts"][f"prefill {last}"] if row["way"] == "plain"]
    pairs = 2 * last**2 * SHAPES["llama-3-8b"]["hidden_size"] / rates.attention
    found.append((f"attention of one 8 B layer, {last:,} tokens, {rates.name}", "s", layer["seconds"], pairs))
    for row in chunks:
        if "left_out" not in row:
            how = "whole" if row["chunk"] is None else f"in chunks of {row['chunk']:,}"
            what = f"small model in float32, {row['tokens']:,} tokens, {how}, CPU"
            found.append((what, "MB", row["extra_mb"], row["formula_mb"]))
    return found


def check_table(rows: list[tuple[str, str, float, float]]) -> str:
    lines = [
        (what, f"{read:,.2f} {unit}" if unit == "s" else f"{read:,.0f} {unit}")
        + (f"{told:,.2f} {unit}" if unit == "s" else f"{told:,.0f} {unit}", f"{told / read - 1:+.0%}")
        for what, unit, read, told in rows
    ]
    return markdown(("", "measured", "formula", "off by"), lines)


def memory_table() -> str:
    """Return GB on one device: the weights, and the memory of a forward beside them."""
    lines = []
    for shape in LARGE:
        for tokens in LENGTHS:
            whole, chunked, offloaded = (shape.extra(tokens, *how) for how in ((None,), (CHUNK,), (CHUNK, True)))
            shared = (
                shape.extra(tokens // DEVICES)
                + (shape.weights + 2 * shape.weights * DEVICES // shape.layers) // DEVICES
            )
            row = shape.weights, whole, chunked, offloaded, shared
            lines.append((shape.name, f"{tokens:,}", *(f"{size / 1e9:.1f}" for size in row)))
    heads = (
        "model",
        "tokens",
        "weights",
        "+ whole",
        f"+ chunks of {CHUNK:,}",
        "+ chunks, offloaded",
        f"in all, each of {DEVICES}",
    )
    return markdown(heads, lines)


def time_table(rates: Rates) -> str:
    """Return seconds for one document: a method, the control at two trained lengths, a method on several devices."""
    lines = []
    for shape in LARGE:
        for tokens in LENGTHS:
            times = (
                rates.seconds(shape, tokens),
                rates.control(shape, tokens, 8192),
                rates.control(shape, tokens, 32_768),
                rates.seconds(shape, tokens) / DEVICES,
            )
            lines.append((shape.name, f"{tokens:,}", *(f"{each:.1f}" for each in times)))
    heads = ("model", "tokens", "a method", "control at 8,192", "control at 32,768", f"a method, {DEVICES} devices")
    return markdown(heads, lines)


def render(results: Path = RESULTS) -> str:
    gpu, cpu, chunks = (
        json.loads((results / f"{name}.json").read_text(encoding="utf-8")) for name in ("gpu", "cpu", "large_models")
    )
    rates = Rates(gpu)
    patches = {row["way"]: row for part in cpu["parts"].values() for row in part if row["what"] == "patch_model"}
    return fill(
        TEMPLATE,
        rates=rates,
        patches=patches,
        gpu=gpu,
        chunk=CHUNK,
        devices=DEVICES,
        chunks=chunks["parts"]["chunks"],
        check_table=check_table(checks(gpu, chunks["parts"]["chunks"])),
        memory_table=memory_table(),
        time_table=time_table(rates),
        shapes={shape.name: shape for shape in LARGE},
    )


if __name__ == "__main__":
    raise SystemExit(publish(__doc__, lambda: {PAGE: render()}))
