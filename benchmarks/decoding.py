"""One more token with a cache: step by step, and in one graph."""

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
"""Slots of a static cache for the tokens that are timed."""

CUDNN = "plain, by cuDNN"
"""Kernel that PyTorch picks for the unpatched model on a GPU. cuDNN plans each shape anew, and a cache that grows has
another at each step: by FlashAttention-2 it takes a part of that time, and all ways
are measured against that."""

Step = Callable[[], torch.Tensor]


def decode_rows(
    shape: str, length: int, trained: int, chosen: dict[str, Method], steps: int, device: str = "cpu"
) -> list[Row]:
    """One more token of the whole model with `length` tokens in a cache that grows, against the unpatched model."""
    runs = {
        name: growing(shape, length, trained, method, device) for name, method in {"plain": None, **chosen}.items()
    }
    if device == "cuda":
        runs = {name: picking(run, cudnn=False) for name, run in runs.items()}
        runs[CUDNN] = picking(growing(shape, length, trained, None, device), cudnn=True)
    return decoded("decode", length, runs, steps, device)


def graph_rows(
    shape: str, length: int, trained: int, chosen: dict[str, Method], steps: int, device: str = "cpu"
) -> list[Row]:
    """The same with a static cache, compiled once and replayed as a CUDA graph, as `generate` does; on a CPU the graph
    is run as it is."""
    ways = {"plain": None, **chosen}
    return decoded(
        "graph",
        length,
        {name: replayed(shape, length, trained, one, device) for name, one in ways.items()},
        steps,
        device,
    )


def decoded(what: str, length: int, runs: dict[str, Step], steps: int, device: str) -> list[Row]:
    times = seconds_in_turn(runs, steps, device)
    return [row(what, name, length, times[name], times["plain"]) for name in runs]


def picking(run: Step, cudnn: bool) -> Step:
    """A step in which PyTorch's attention may run on cuDNN, or not."""

    def step() -> torch.Tensor:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        try:
            return run()
        finally:
            torch.backends.cuda.enable_cudnn_sdp(True)

    return step


def growing(shape: str, length: int, trained: int, method: Method | None, device: str) -> Step:
    """Each call reads one more token."""
    model, ids = patched(shape, length, trained, method, device)
    return reader(model, model, ids, DynamicCache(config=model.config))


def replayed(shape: str, length: int, trained: int, method: Method | None, device: str) -> Step:
    """The same in one graph."""
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
    """Reads the text into the cache, then a token at each call."""
    with torch.no_grad():
        model(ids, logits_to_keep=1, **with_cache(model.forward, cache))
    token, given = ids[:, :1].clone(), with_cache(model.forward, cache)

    @torch.no_grad()
    def run() -> torch.Tensor:
        logits: torch.Tensor = forward(input_ids=token, **given).logits
        return logits

    return run
