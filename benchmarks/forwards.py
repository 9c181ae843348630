"""What a patch costs in the forward: frequency methods, and positions that are remapped inside attention.

Ways take turns in one process, on the same weights at the same addresses; what else the machine does hits all alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import models
import torch
from measure import Way, cpu_seconds, ratio, read_in_turn, seconds_in_turn
from torch.nn.functional import softmax
from transformers import DynamicCache, LlamaForCausalLM

from hf_posext import patch_model
from hf_posext.methods import FrequencyMethod, methods
from hf_posext.patching import detect_scheme, late_rotation
from hf_posext.patching.banded_attention import Branch, belongs

FACTOR = 8
"""All models claim to be trained on an eighth of what they read."""

REMAPPING = ("self-extend", "rerope", "leaky-rerope", "dual-chunk", "string-shift")
PUBLISHED = ("self-extend", "rerope")
"""Methods whose published code scores all pairs once for each kind of position, and selects."""

Row = dict[str, Any]


def frequency_rows(length: int, shape: str, repeats: int) -> list[Row]:
    """A forward of the whole model, patched against unpatched; first the noise: unpatched against unpatched."""
    model = models.llama(shape, 1000, trained=length // FACTOR)
    ids = models.text(length, 1000)[None]
    scheme = detect_scheme(model)
    chosen = {name: method for name, method in methods().items() if issubclass(method, FrequencyMethod)}
    run = partial(trunk, model, ids)
    run()  # to warm up
    rows = []
    for name, method in [("unpatched", None), *chosen.items()]:
        times: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(repeats):
            for patching in (False, True) if turn % 2 else (True, False):
                with (
                    patch_model(model, method.example(scheme), factor=FACTOR) if method and patching else nullcontext()
                ):
                    times[patching].append(cpu_seconds(run))
        rows.append(row("forward", name, length, times[True], times[False]))
    return rows


@torch.inference_mode()
def trunk(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    return model.model(ids, use_cache=False).last_hidden_state


def row(what: str, name: str, length: int, times: list[float], others: list[float], **more: Any) -> Row:
    """Times of a way against those of another in the same turn."""
    pairs = [a / b for a, b in zip(times, others, strict=True)]
    seconds = statistics.median(times)
    found = {"what": what, "way": name, "length": length, "cpu_seconds": seconds, "time_ratio": ratio(times, others)}
    return found | {"time_ratios": pairs} | more


def patched(shape: str, length: int, method: str | None) -> LlamaForCausalLM:
    model = models.llama(shape, 1000, trained=length // FACTOR)
    if method is not None:
        patch_model(model, methods()[method].example(detect_scheme(model)), factor=FACTOR)
    return model


def prefill(shape: str, length: int, method: str | None) -> Callable[[], torch.Tensor]:
    """The trunk of a model over a text."""
    model, ids = patched(shape, length, method), models.text(length, 1000)[None]
    trunk(model, ids[:, :64])
    return partial(trunk, model, ids)


def prefill_rows(length: int, shape: str, repeats: int) -> list[Row]:
    """A model of little else than attention, with each remapping method, against the same unpatched (SDPA)."""
    runs = {name: prefill(shape, length, None if name == "plain" else name) for name in ("plain", *REMAPPING)}
    times = seconds_in_turn(runs, repeats)
    return [row("prefill", name, length, times[name], times["plain"]) for name in runs]


def decode_rows(length: int, shape: str, steps: int) -> list[Row]:
    """One more token of the whole model with `length` tokens in its cache, against the unpatched model."""
    runs = {name: decoder(shape, length, None if name == "plain" else name) for name in ("plain", *REMAPPING)}
    times = seconds_in_turn(runs, steps)
    return [row("decode", name, length, times[name], times["plain"]) for name in runs]


def decoder(shape: str, length: int, method: str | None) -> Callable[[], torch.Tensor]:
    """Each call reads one more token."""
    model = patched(shape, length, method)
    cache = DynamicCache(config=model.config)
    ids = models.text(length, 1000)[None]
    with torch.inference_mode():
        model(ids, past_key_values=cache, logits_to_keep=1)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        logits: torch.Tensor = model(ids[:, :1], past_key_values=cache).logits
        return logits

    return run


def dense_rows(length: int, shape: str, repeats: int) -> list[Row]:
    """The same with the formula as published: all pairs scored for each part, then selected. Time, and memory."""
    settings = {"shape": shape, "length": length}
    needs = 5 * 4 * models.SHAPES[shape]["num_attention_heads"] * length**2 + 10**9
    ways = [Way("plain", prefill, settings | {"method": None})]
    ways += [Way(name, prefill, settings | {"method": name}) for name in PUBLISHED]
    ways += [Way(f"{name}, dense", dense_prefill, settings | {"method": name}, needs) for name in PUBLISHED]
    found = read_in_turn(ways, repeats)
    plain = found["plain"]
    rows = []
    for name, readings in found.items():
        if isinstance(readings, str) or isinstance(plain, str):
            rows.append({"what": "child", "way": name, "length": length, "left_out": readings})
            continue
        memory, plain_memory = ([one.extra_bytes for one in each] for each in (readings, plain))
        more = {"extra_mb": statistics.median(memory) / 1e6, "memory_ratio": ratio(memory, plain_memory)}
        ours = found[name.removesuffix(", dense")]
        more["deviation"] = float((readings[0].value - ours[0].value).abs().max())
        times, plain_times = ([one.cpu_seconds for one in each] for each in (readings, plain))
        rows.append(row("child", name, length, times, plain_times, **more))
    return rows


def dense_prefill(shape: str, length: int, method: str) -> Callable[[], torch.Tensor]:
    """The same model, where nothing but the attention over rotated states is another function."""
    late_rotation.banded_attention = dense_attention
    return prefill(shape, length, method)


def dense_attention(
    branches: list[Branch],
    value: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    *,
    scaling: float,
    **kwargs: Any,
) -> torch.Tensor:
    """Self-Extend and ReRoPE as in their published eager code: matrices of length x length, and `torch.where`."""
    groups = branches[0].query.shape[1] // value.shape[1]
    causal = query_positions[:, None, :, None] >= key_positions[:, None, None, :]
    scores = None
    for branch in reversed(branches):
        score = branch.query @ branch.key.repeat_interleave(groups, 1).transpose(-1, -2) * scaling
        if scores is None:
            scores = score
        else:
            scores = torch.where(belongs(branch.part, query_positions, key_positions)[:, None], score, scores)
        del score
    scores = scores.masked_fill_(~causal, torch.finfo(scores.dtype).min)
    weights = softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous()
