"""Cost of a patch in the forward: frequency methods, and positions that are remapped inside attention.

Ways take turns in one process, on the same weights or states. Other load on the machine affects all of them alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import models
import published
import torch
from layers import Layer, remapping
from measure import Reading, Way, ratio, read_in_turn, seconds, seconds_in_turn
from transformers import LlamaForCausalLM

from hf_posext import patch_model
from hf_posext.methods import Decay, Fade, FrequencyMethod, Method, methods
from hf_posext.patching import detect_scheme

FACTOR = 8
"""Length of a text divided by the trained length of its model."""

AT_ONCE = 2**18
"""Tokens that a GPU processes per call, over consecutive layers. With fewer it waits for the host."""

EAGER = ("self-extend", "rerope")
"""Methods whose published code scores all pairs once for each kind of position and selects from the scores."""

Row = dict[str, Any]


def row(kind: str, way: str, length: int, times: list[float], baseline_times: list[float], **columns: Any) -> Row:
    """Return a row with the times of a way and their ratios to those of a baseline in the same turn."""
    ratios = [a / b for a, b in zip(times, baseline_times, strict=False)]
    entry = {"what": kind, "way": way, "length": length, "seconds": statistics.median(times), "ratios": ratios}
    return entry | {"time_ratio": ratio(times, baseline_times)} | columns


def cpu_methods(length: int) -> dict[str, Method]:
    """Return the remapping methods with windows of a sixteenth of the text, half of the trained length."""
    window = length // 16
    base = remapping(window=window, chunk=3 * length // 32, group=16)
    return base | {name: base["rerope"] + fades for name, fades in fading(window).items()}


def fading(reference: int) -> dict[str, Method]:
    """Return the methods that lower the logits of far keys, by their name on top of `rerope`."""
    return {"rerope+fade": Fade(reference=reference), "rerope+decay": Decay(start=reference)}


def frequency_methods(shape: str, length: int) -> dict[str, Method]:
    scheme = detect_scheme(models.llama(shape, 1000, length // FACTOR))
    return {name: cls.example(scheme) for name, cls in methods().items() if issubclass(cls, FrequencyMethod)}


def forward_rows(
    shape: str, length: int, trained: int, contenders: dict[str, Method], repeats: int, device: str = "cpu"
) -> list[Row]:
    """Time a forward of the whole model, patched against unpatched. The first row shows the noise."""
    model = models.llama(shape, 1000, trained, device)
    run = partial(trunk, model, models.text(length, 1000)[None].to(device))
    run()  # to warm up
    rows = []
    for name, method in [("unpatched", None), *contenders.items()]:
        times: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(repeats):
            for patching in (False, True) if turn % 2 else (True, False):
                patch = patch_model(model, method, factor=FACTOR) if method and patching else nullcontext()
                with patch:
                    if device == "cuda":  # kernels are planned for each shape
                        run()
                    times[patching].append(seconds(run, device))
        rows.append(row("forward", name, length, times[True], times[False]))
    return rows


@torch.inference_mode()
def trunk(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = model.model(ids, use_cache=False).last_hidden_state
    return hidden


def prefill_rows(
    shape: str,
    length: int,
    trained: int,
    contenders: dict[str, Method],
    repeats: int,
    device: str = "cpu",
    flash: Sequence[str] = (),
) -> list[Row]:
    """Time rotation and attention of a layer over a text against the unpatched layer (SDPA), with the error of each.

    `flash` lists the methods whose published code for FlashAttention is timed as well.
    """
    depth = max(1, AT_ONCE // length) if device == "cuda" else 1
    layers = plain_and(contenders, shape, length, trained, device=device, depth=depth)
    for name in flash:
        layers[f"{name}, as published"] = Layer(
            shape, length, trained, contenders[name], published.flash, device, depth
        )
    seconds_of = seconds_in_turn(layers, repeats, device)
    times = {name: [seconds / depth for seconds in all_seconds] for name, all_seconds in seconds_of.items()}
    return [
        row("prefill", name, length, times[name], times["plain"], error=layer.error())
        for name, layer in layers.items()
    ]


def plain_and(contenders: dict[str, Method], shape: str, length: int, trained: int, **where: Any) -> dict[str, Layer]:
    ways = {"plain": None, **contenders}
    return {name: Layer(shape, length, trained, method, **where) for name, method in ways.items()}


def training_rows(shape: str, length: int, trained: int, contenders: dict[str, Method], repeats: int) -> list[Row]:
    """Time forward and backward of rotation and attention of a layer against the unpatched layer (SDPA)."""
    layers = plain_and(contenders, shape, length, trained)
    times = seconds_in_turn({name: layer.train for name, layer in layers.items()}, repeats)
    return [row("training", name, length, times[name], times["plain"]) for name in layers]


def memory_rows(shape: str, length: int, repeats: int) -> list[Row]:
    """Measure time and peak memory of a layer in a process of its own, beside the published code."""
    settings = {"shape": shape, "length": length}
    needs = 5 * 4 * models.SHAPES[shape]["num_attention_heads"] * length**2 + 10**9
    ways = [Way("plain", layer_job, settings | {"name": None, "eager": False})]
    ways += [Way(name, layer_job, settings | {"name": name, "eager": False}) for name in EAGER]
    ways += [
        Way(f"{name}, as published", layer_job, settings | {"name": name, "eager": True}, needs) for name in EAGER
    ]
    readings_of = read_in_turn(ways, repeats)
    plain = readings_of["plain"]
    rows = []
    for way, readings in readings_of.items():
        if isinstance(readings, str) or isinstance(plain, str):
            rows.append({"what": "memory", "way": way, "length": length, "left_out": readings})
            continue
        fast = readings_of[way.removesuffix(", as published")]
        rows.append(memory_row(way, length, readings, plain, fast))
    return rows


def memory_row(way: str, length: int, readings: list[Reading], plain: list[Reading], fast: list[Reading] | str) -> Row:
    memory, plain_memory = (
        [float(reading.extra_bytes) for reading in readings_of_way] for readings_of_way in (readings, plain)
    )
    columns: Row = {"extra_mb": statistics.median(memory) / 1e6, "memory_ratio": ratio(memory, plain_memory)}
    if not isinstance(fast, str):
        columns["apart"] = float((readings[0].value - fast[0].value).abs().max())
    return row(
        "memory",
        way,
        length,
        *([reading.cpu_seconds for reading in readings_of_way] for readings_of_way in (readings, plain)),
        **columns,
    )


def layer_job(shape: str, length: int, name: str | None, eager: bool) -> Callable[[], torch.Tensor]:
    """Return a function that computes a sample of the output of a layer; see `measure.Job`."""
    method = cpu_methods(length)[name] if name else None
    layer = Layer(shape, length, length // FACTOR, method, published.eager if eager else None)
    return lambda: layer()[:: max(1, length // 64)].clone()
