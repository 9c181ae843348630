"""Time of one more token with a cache: step by step, and in one graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import torch
from forwards import Row, row
from measure import seconds_in_turn
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from hf_posext import patch_model
from hf_posext.methods import Method
from hf_posext.patching.modes import with_cache

FREE = 256
"""Slots of a static cache for the timed tokens."""

CUDNN = "plain, by cuDNN"
"""Row of the unpatched model on cuDNN, the kernel that PyTorch picks on a GPU.

cuDNN plans each shape anew, and a growing cache has a new shape at each step. FlashAttention-2 takes only a part of
that time, so it is the baseline of all ways."""

Step = Callable[[], torch.Tensor]


def decode_rows(
    shape: str, length: int, trained: int, methods: dict[str, Method], steps: int, device: str = "cpu"
) -> list[Row]:
    """Time one more token of the whole model against the unpatched model, with `length` tokens in a growing cache."""
    runs = {
        name: growing(shape, length, trained, method, device) for name, method in {"plain": None, **methods}.items()
    }
    if device == "cuda":
        runs = {name: picking(run, cudnn=False) for name, run in runs.items()}
        runs[CUDNN] = picking(growing(shape, length, trained, None, device), cudnn=True)
    return decoded("decode", length, runs, steps, device)


def graph_rows(
    shape: str, length: int, trained: int, methods: dict[str, Method], steps: int, device: str = "cpu"
) -> list[Row]:
    """Time one more token with a static cache.

    The step is compiled once and replayed as a CUDA graph, like in `generate`. On a CPU the graph runs without CUDA.
    """
    ways = {"plain": None, **methods}
    return decoded(
        "graph",
        length,
        {name: replayed(shape, length, trained, method, device) for name, method in ways.items()},
        steps,
        device,
    )


def decoded(kind: str, length: int, runs: dict[str, Step], steps: int, device: str) -> list[Row]:
    times = seconds_in_turn(runs, steps, device)
    return [row(kind, name, length, times[name], times["plain"]) for name in runs]


def picking(run: Step, cudnn: bool) -> Step:
    """Return a step that allows or forbids cuDNN for PyTorch's attention."""

    def step() -> torch.Tensor:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        try:
            return run()
        finally:
            torch.backends.cuda.enable_cudnn_sdp(True)

    return step


def growing(shape: str, length: int, trained: int, method: Method | None, device: str) -> Step:
    """Return a function that reads one more token into a growing cache at each call."""
    model, ids = patched(shape, length, trained, method, device)
    return reader(model, model, ids, DynamicCache(config=model.config))


def replayed(shape: str, length: int, trained: int, method: Method | None, device: str) -> Step:
    """Return a function that reads one more token in one graph at each call."""
    model, ids = patched(shape, length, trained, method, device)
    torch._dynamo.config.cache_size_limit = 64  # one graph for each model
    how: dict[str, Any] = {"mode": "reduce-overhead"} if device == "cuda" else {"backend": "eager"}
    forward = torch.compile(model.__call__, fullgraph=True, **how)
    run = reader(model, forward, ids, StaticCache(config=model.config, max_cache_len=length + FREE))
    for _ in range(3):  # compiles, records, replays
        run()
    return run


def patched(
    shape: str, length: int, trained: int, method: Method | None, device: str
) -> tuple[LlamaForCausalLM, torch.Tensor]:
    model = models.llama(shape, 1000, trained, device)
    if method is not None:
        patch_model(model, method, factor=max(2, length // trained))
    return model, models.text(length, 1000)[None].to(device)


def reader(model: LlamaForCausalLM, forward: Any, ids: torch.Tensor, cache: Any) -> Step:
    """Read the text into the cache, and return a function that reads one more token at each call."""
    with torch.no_grad():
        model(ids, logits_to_keep=1, **with_cache(model.forward, cache))
    token, cached = ids[:, :1].clone(), with_cache(model.forward, cache)

    @torch.no_grad()
    def run() -> torch.Tensor:
        logits: torch.Tensor = forward(input_ids=token, **cached).logits
        return logits

    return run
