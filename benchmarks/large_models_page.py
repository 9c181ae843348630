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
    Operations per second on the GPU of `gpu.json`, from two of its rows. Its other rows check the formulas.

    The rate of attention comes from one layer with the heads of an 8 B model at 32,768 tokens. The rate of the
    products with weights comes from the rest of the time of the perplexity of 32,768 tokens under a model of 1.2 B.

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
    (readings,) = [part["rows"]["hf_posext"] for part in parts if part["tokens"] == tokens]
    row: dict[str, Any] = readings
    return row


def checks(gpu: dict[str, Any], chunks: list[dict[str, Any]]) -> list[tuple[str, str, float, float]]:
    """Return name, unit, reading and formula of each measurement that no rate was taken from."""
    rates, lines = Rates(gpu), []
    for tokens in LENGTHS:
        extra = perplexity(gpu, tokens)["extra_mb"]
        lines.append((f"1.2 B in bfloat16, {tokens:,} tokens, {rates.name}", "MB", extra, BILLION.extra(tokens) / 1e6))
    last = LENGTHS[-1]
    took = perplexity(gpu, last)["seconds"], rates.seconds(BILLION, last)
    lines.append((f"1.2 B in bfloat16, {last:,} tokens, {rates.name}", "s", *took))
    (layer,) = [row for row in gpu["parts"][f"prefill {last}"] if row["way"] == "plain"]
    pairs = 2 * last**2 * SHAPES["llama-3-8b"]["hidden_size"] / rates.attention
    lines.append((f"attention of one 8 B layer, {last:,} tokens, {rates.name}", "s", layer["seconds"], pairs))
    for row in chunks:
        if "left_out" not in row:
            how = "whole" if row["chunk"] is None else f"in chunks of {row['chunk']:,}"
            name = f"small model in float32, {row['tokens']:,} tokens, {how}, CPU"
            lines.append((name, "MB", row["extra_mb"], row["formula_mb"]))
    return lines


def check_table(rows: list[tuple[str, str, float, float]]) -> str:
    lines = [
        (name, f"{reading:,.2f} {unit}" if unit == "s" else f"{reading:,.0f} {unit}")
        + (f"{formula:,.2f} {unit}" if unit == "s" else f"{formula:,.0f} {unit}", f"{formula / reading - 1:+.0%}")
        for name, unit, reading, formula in rows
    ]
    return markdown(("", "measured", "formula", "off by"), lines)


def memory_table() -> str:
    """Return the table of GB on one device: the weights, and the additional memory of a forward."""
    lines = []
    for shape in LARGE:
        for tokens in LENGTHS:
            unchunked, chunked, offloaded = (shape.extra(tokens, *how) for how in ((None,), (CHUNK,), (CHUNK, True)))
            shared = (
                shape.extra(tokens // DEVICES)
                + (shape.weights + 2 * shape.weights * DEVICES // shape.layers) // DEVICES
            )
            row = shape.weights, unchunked, chunked, offloaded, shared
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
    """Return the table of seconds for one document: a method, the control at two trained lengths, several devices."""
    lines = []
    for shape in LARGE:
        for tokens in LENGTHS:
            times = (
                rates.seconds(shape, tokens),
                rates.control(shape, tokens, 8192),
                rates.control(shape, tokens, 32_768),
                rates.seconds(shape, tokens) / DEVICES,
            )
            lines.append((shape.name, f"{tokens:,}", *(f"{seconds:.1f}" for seconds in times)))
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
