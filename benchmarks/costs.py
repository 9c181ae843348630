"""Costs before any forward: importing the package, and patching a model."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import models
import torch
from measure import Way, read_in_child, seconds
from transformers import LlamaForCausalLM

from hf_posext import patch_model

BASELINE = "from transformers import AutoTokenizer, LlamaForCausalLM"
IMPORTS = ("import hf_posext", "from hf_posext import patch_model", "from hf_posext import compare")
TIMED = """
import time
start = time.process_time()
{first}
middle = time.process_time()
{second}
print(middle - start, time.process_time() - middle)
"""

Row = dict[str, Any]


def import_rows(repeats: int) -> list[Row]:
    """Time each import in a fresh interpreter that has already imported transformers and one of its models."""
    seconds_of: dict[str, list[float]] = {BASELINE: [], **{statement: [] for statement in IMPORTS}}
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
    }  # as installed
    for turn in range(repeats + 1):
        for statement in IMPORTS:
            code = TIMED.format(first=BASELINE, second=statement)
            process = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, check=True, text=True, env=environment
            )
            first, second = map(float, process.stdout.split())
            if turn:  # the first turn writes the byte code
                seconds_of[BASELINE].append(first)
                seconds_of[statement].append(second)
    baseline = statistics.median(seconds_of[BASELINE])
    rows = []
    for statement, times in seconds_of.items():
        median = statistics.median(times)
        rows.append({"what": "import", "way": statement, "seconds": median, "time_ratio": median / baseline})
    return rows


def patch_rows(shape: str, methods: tuple[str, ...]) -> list[Row]:
    """Time `patch_model` and check that it copies no weights."""
    rows = []
    for method in methods:
        way = Way(method, patching, {"shape": shape, "method": method}, needs=7 * 10**9 if shape == "billion" else 0)
        reading = read_in_child(way)
        row: Row = {"what": "patch_model", "way": method}
        if isinstance(reading, str):
            rows.append(row | {"left_out": reading})
            continue
        rows.append(row | {"extra_mb": reading.extra_bytes / 1e6} | reading.value)
    return rows


def patching(shape: str, method: str) -> Callable[[], Row]:
    """Return a function that patches a model and undoes the patch. Imports of the first use are not counted."""
    small = models.llama("tiny", 100)
    patch_model(small, method, factor=8).undo()
    model = filled(shape)
    weights = [parameter.data_ptr() for parameter in model.parameters()]

    def run() -> Row:
        patches = []
        elapsed = seconds(lambda: patches.append(patch_model(model, method, factor=8)))
        in_place = weights == [parameter.data_ptr() for parameter in model.parameters()]
        return {
            "seconds": elapsed,
            "undo_seconds": seconds(patches[0].undo),
            "parameters": model.num_parameters(),
            "weights_in_place": in_place,
        }

    return run


def filled(shape: str) -> LlamaForCausalLM:
    """Return a model whose weights repeat a block of random numbers. Drawing a billion numbers takes a minute."""
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(models.config(shape, 128_256, trained=8192), dtype=torch.float32)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    block = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)) / 50
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        if parameter.ndim == 1:
            flat.fill_(1)
            continue
        for begin in range(0, len(flat), len(block)):
            flat[begin : begin + len(block)] = block[: len(flat) - begin]
    return model.eval()
