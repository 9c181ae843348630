"""Cost of a patch in the forward: frequency methods, and positions that are remapped inside attention.

Ways take turns in one process, on the same weights or the same states; what else the machine does hits all alike.
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
"""Models claim to be trained on an eighth of what they read."""

AT_ONCE = 2**18
"""Tokens that a GPU gets at once, in layers one behind the other, so that it need not wait for the host."""

EAGER = ("self-extend", "rerope")
"""Methods whose published code scores all pairs once for each kind of position, and selects."""

Row = dict[str, Any]


def row(what: str, way: str, length: int, times: list[float], others: list[float], **more: Any) -> Row:
    """Times of a way against those of another in the same turn."""
    ratios = [a / b for a, b in zip(times, others, strict=False)]
    found = {"what": what, "way": way, "length": length, "seconds": statistics.median(times), "ratios": ratios}
    return found | {"time_ratio": ratio(times, others)} | more


def cpu_methods(length: int) -> dict[str, Method]:
    """Near regions of a sixteenth of the text, half of what the model claims to be trained on."""
    window = length // 16
    base = remapping(window=window, chunk=3 * length // 32, group=16)
    return base | {name: base["rerope"] + fades for name, fades in fading(window).items()}


def fading(reference: int) -> dict[str, Method]:
    """Methods that lower the logits of far keys, by name on top of `rerope`."""
    return {"rerope+fade": Fade(reference=reference), "rerope+decay": Decay(start=reference)}


def frequency_methods(shape: str, length: int) -> dict[str, Method]:
    scheme = detect_scheme(models.llama(shape, 1000, length // FACTOR))
    return {name: one.example(scheme) for name, one in methods().items() if issubclass(one, FrequencyMethod)}


def forward_rows(
    shape: str, length: int, trained: int, chosen: dict[str, Method], repeats: int, device: str = "cpu"
) -> list[Row]:
    """A forward of the whole model, patched against unpatched; first the noise: unpatched against unpatched."""
    model = models.llama(shape, 1000, trained, device)
    run = partial(trunk, model, models.text(length, 1000)[None].to(device))
    run()  # to warm up
    rows = []
    for name, method in [("unpatched", None), *chosen.items()]:
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
    found: torch.Tensor = model.model(ids, use_cache=False).last_hidden_state
    return found


def prefill_rows(
    shape: str,
    length: int,
    trained: int,
    chosen: dict[str, Method],
    repeats: int,
    device: str = "cpu",
    flash: Sequence[str] = (),
) -> list[Row]:
    """Rotation and attention of a layer over a text, against the same unpatched (SDPA), with the error of each.

    `flash` names the methods whose published code for FlashAttention takes its turn as well.
    """
    depth = max(1, AT_ONCE // length) if device == "cuda" else 1
    layers = plain_and(chosen, shape, length, trained, device=device, depth=depth)
    for name in flash:
        layers[f"{name}, as published"] = Layer(shape, length, trained, chosen[name], published.flash, device, depth)
    found = seconds_in_turn(layers, repeats, device)
    times = {name: [taken / depth for taken in each] for name, each in found.items()}
    return [
        row("prefill", name, length, times[name], times["plain"], error=layer.error())
        for name, layer in layers.items()
    ]


def plain_and(chosen: dict[str, Method], shape: str, length: int, trained: int, **where: Any) -> dict[str, Layer]:
    ways = {"plain": None, **chosen}
    return {name: Layer(shape, length, trained, method, **where) for name, method in ways.items()}


def training_rows(shape: str, length: int, trained: int, chosen: dict[str, Method], repeats: int) -> list[Row]:
    """Forward and backward of rotation and attention of a layer, against the same unpatched (SDPA)."""
    layers = plain_and(chosen, shape, length, trained)
    times = seconds_in_turn({name: layer.train for name, layer in layers.items()}, repeats)
    return [row("training", name, length, times[name], times["plain"]) for name in layers]


def memory_rows(shape: str, length: int, repeats: int) -> list[Row]:
    """The layer again, each in its own process, beside the formula as published: time, and peak of memory."""
    settings = {"shape": shape, "length": length}
    needs = 5 * 4 * models.SHAPES[shape]["num_attention_heads"] * length**2 + 10**9
    ways = [Way("plain", layer_job, settings | {"name": None, "eager": False})]
    ways += [Way(name, layer_job, settings | {"name": name, "eager": False}) for name in EAGER]
    ways += [
        Way(f"{name}, as published", layer_job, settings | {"name": name, "eager": True}, needs) for name in EAGER
    ]
    found = read_in_turn(ways, repeats)
    plain = found["plain"]
    rows = []
    for way, readings in found.items():
        if isinstance(readings, str) or isinstance(plain, str):
            rows.append({"what": "memory", "way": way, "length": length, "left_out": readings})
            continue
        ours = found[way.removesuffix(", as published")]
        rows.append(memory_row(way, length, readings, plain, ours))
    return rows


def memory_row(way: str, length: int, readings: list[Reading], plain: list[Reading], ours: list[Reading] | str) -> Row:
    memory, plain_memory = ([float(one.extra_bytes) for one in each] for each in (readings, plain))
    more: Row = {"extra_mb": statistics.median(memory) / 1e6, "memory_ratio": ratio(memory, plain_memory)}
    if not isinstance(ours, str):
        more["apart"] = float((readings[0].value - ours[0].value).abs().max())
    return row("memory", way, length, *([one.cpu_seconds for one in each] for each in (readings, plain)), **more)


def layer_job(shape: str, length: int, name: str | None, eager: bool) -> Callable[[], torch.Tensor]:
    """Some of the output of a layer; see `measure.Job`."""
    method = cpu_methods(length)[name] if name else None
    layer = Layer(shape, length, length // FACTOR, method, published.eager if eager else None)
    return lambda: layer()[:: max(1, length // 64)].clone()
