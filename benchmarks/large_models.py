"""Cost of the perplexity of one document on a large model: formulas of memory and time, and their checks.

    python benchmarks/large_models.py    # reads a small model whole and in chunks: minutes of one core

`docs/large_models.md` is written from these formulas by `large_models_page.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import torch
from measure import Way, read_in_turn
from output import RESULTS, Run, console, figure, table

from hf_posext.evaluation.scorer import LOGITS_BYTES, LOGITS_ROWS, Memory, TokenScorer
from hf_posext.evaluation.windows import control_windows

CHUNKS = (None, 4096, 1024)
VOCABULARY, TOKENS = 32_000, 16_384


@dataclass(frozen=True)
class Shape:
    """
    Sizes of a decoder that determine the cost of a forward.

    Args:
        name (`str`): of the model.
        parameters (`int`): of the weights that a token is multiplied by, including the head.
        layers, width, inner (`int`): number of layers, hidden size, intermediate size of the MLP.
        queries (`int`): channels of all query heads.
        keys (`int`): channels of all key heads. Values have as many.
        vocabulary (`int`): rows of the head.
        bytes (`int`): size of a weight and of an activation; 2 in bfloat16.
    """

    name: str
    parameters: int
    layers: int
    width: int
    inner: int
    queries: int
    keys: int
    vocabulary: int
    bytes: int = 2

    @classmethod
    def of(cls, name: str, config: Any, parameters: int, bytes: int = 2) -> Shape:
        """Return the sizes that a Llama-like config contains."""
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = head * config.num_attention_heads, head * config.num_key_value_heads
        sizes = config.num_hidden_layers, config.hidden_size, config.intermediate_size
        return cls(name, parameters, *sizes, *heads, config.vocab_size, bytes)

    @property
    def weights(self) -> int:
        """Bytes of the weights."""
        return self.bytes * self.parameters

    def activations(self, tokens: int) -> int:
        """Return the bytes at the peak of a layer: three tensors of the MLP's size and four of the hidden size."""
        return self.bytes * tokens * (3 * self.inner + 4 * self.width)

    def cache(self, tokens: int) -> int:
        """Return the bytes of a KV cache."""
        return self.bytes * tokens * self.layers * 2 * self.keys

    def logits(self) -> int:
        """Return the bytes of the slice of logits in memory at a time, in float32."""
        rows = max(1, min(LOGITS_ROWS, LOGITS_BYTES // (4 * self.vocabulary)))
        return 4 * rows * self.vocabulary

    def masked(self, chunk: int, tokens: int) -> int:
        """Return the bytes of attention over a chunk that follows others.

        transformers makes a mask, which PyTorch converts to a bias. With a mask PyTorch also repeats keys and values
        for all query heads.
        """
        return (1 + self.bytes) * chunk * tokens + 2 * self.bytes * tokens * self.queries

    def extra(self, tokens: int, chunk: int | None = None, offloaded: bool = False) -> int:
        """Return the bytes that a forward needs in addition to the weights.

        The hidden states stay while the head runs. The activations of the layers are free by then. Chunks add the
        cache, and a second copy of a layer's keys and values while a chunk is appended to them. An offloaded cache has
        two layers on the device.
        """
        size = min(tokens, chunk or tokens)
        peak = max(self.activations(size), self.bytes * size * self.width + self.logits())
        if size == tokens:
            return peak
        layer = self.cache(tokens) // self.layers
        return peak + self.masked(size, tokens) + (3 * layer if offloaded else self.cache(tokens) + layer)

    def operations(self, tokens: int) -> tuple[int, int]:
        """Return the floating-point operations of the products with weights, and of causal attention."""
        return 2 * self.parameters * tokens, 2 * tokens * tokens * self.queries * self.layers

    def seconds(self, tokens: int, linear: float, attention: float) -> float:
        """Return the seconds of one forward, given the operations per second of each kind."""
        products, pairs = self.operations(tokens)
        return products / linear + pairs / attention

    def control_seconds(self, tokens: int, trained: int, linear: float, attention: float) -> float:
        """Return the seconds of the control: one window of the trained length, then one for every eighth of it."""
        windows = control_windows(tokens, trained)
        return windows * self.seconds(min(tokens, trained), linear, attention)


LARGE = (
    Shape("Llama-3.2-1B", 1_235_814_400, 16, 2048, 8192, 2048, 512, 128_256),
    Shape("Llama-3.1-8B", 8_030_261_248, 32, 4096, 14_336, 4096, 1024, 128_256),
    Shape("Qwen3-8B", 8_190_735_360, 36, 4096, 12_288, 4096, 1024, 151_936),
    Shape("Llama-3.1-70B", 70_553_706_496, 80, 8192, 28_672, 8192, 1024, 128_256),
)
"""Large models, with their parameters as counted by transformers.

The count includes the input embedding of untied models, which no token is multiplied by: 7 % of an 8 B model."""


def job(shape: str, vocabulary: int, tokens: int, chunk: int | None) -> Callable[[], list[float]]:
    """Return a function that computes the mean NLL of a random text under a random model; see `measure.Job`."""
    model, row = models.llama(shape, vocabulary), models.text(tokens, vocabulary)[None]
    TokenScorer(model, Memory(chunk and 32)).token_nll(row[:, :64])

    def run() -> list[float]:
        return [float(TokenScorer(model, Memory(chunk)).token_nll(row).double().mean())]

    return run


def measure(shape: str, vocabulary: int, tokens: int, chunks: tuple[int | None, ...]) -> list[dict[str, Any]]:
    """Measure time and memory of one document, whole and in chunks, beside the memory that the formulas give."""
    sizes = {"shape": shape, "vocabulary": vocabulary, "tokens": tokens}
    ways = [Way(str(chunk), job, {**sizes, "chunk": chunk}) for chunk in chunks]
    readings_of = read_in_turn(ways, 1)
    parameters = sum(weight.numel() for weight in models.llama(shape, vocabulary).parameters())
    small = Shape.of(shape, models.config(shape, vocabulary), parameters, bytes=torch.float32.itemsize)
    rows: list[dict[str, Any]] = []
    for chunk in chunks:
        readings = readings_of[str(chunk)]
        if isinstance(readings, str):
            rows.append({**sizes, "chunk": chunk, "left_out": readings})
            continue
        (reading,) = readings
        measurement = {
            "cpu_seconds": reading.cpu_seconds,
            "extra_mb": reading.extra_bytes / 1e6,
            "nll": reading.value[0],
        }
        rows.append({**sizes, "chunk": chunk, **measurement, "formula_mb": small.extra(tokens, chunk) / 1e6})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON; results/large_models.json if not given")
    args = parser.parse_args()
    path = args.output or (None if args.tiny else RESULTS / "large_models.json")
    run = Run("large_models", {"tiny": args.tiny}, path)
    sizes: tuple[Any, ...] = ("tiny", 300, 256, (None, 64)) if args.tiny else ("small", VOCABULARY, TOKENS, CHUNKS)
    rows = run.part("chunks", lambda: measure(*sizes))
    run.finish([])
    keys = ("cpu_seconds", "extra_mb", "formula_mb")
    lines = [(str(row["chunk"]), *(figure(row.get(key), 1) for key in keys), f"{row.get('nll')}") for row in rows]
    console().print(table("Whole and in chunks", ("chunk", "CPU s", "extra MB", "formula MB", "NLL"), lines))


if __name__ == "__main__":
    main()
