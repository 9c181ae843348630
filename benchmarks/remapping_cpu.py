"""How long attention takes on the CPU when near and far pairs see different positions, against plain attention.

One attention layer of a Llama (1 sequence, 8 heads, 2 key heads, 64 channels, float32, no gradients), as it is and
with each remapping method: the layer with its projections and rotations, and the attention alone. The ways are timed
in turns, so that whatever else the machine does hits all of them.

    python benchmarks/remapping_cpu.py --length 8192 --output benchmarks/results/remapping_cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

import hf_posext
from hf_posext.methods import DualChunk, Method, ReRoPE, SelfExtend
from hf_posext.patching.banded_attention import Branch, banded_attention
from hf_posext.plan import ExtensionPlan

HEADS, KEY_HEADS, WIDTH = 8, 2, 64


def methods(length: int) -> dict[str, Method]:
    """Near regions of a sixteenth of the input (512 of 8192)."""
    window = max(length // 16, 8)
    return {
        "rerope": ReRoPE(window=window),
        "self-extend": SelfExtend(group=8, window=window),
        "dual-chunk": DualChunk(chunk=window, local=window // 4),
    }


def layer(length: int, method: Method | None) -> tuple[Callable[[], object], ExtensionPlan | None]:
    """One forward of the attention layer, and the plan in force."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=HEADS * WIDTH,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=max(length // 8, 16),
    )
    model = LlamaForCausalLM(config).eval()
    plan = hf_posext.patch_model(model, method, factor=8).plan if method else None
    states, positions = torch.randn(1, length, HEADS * WIDTH), torch.arange(length)[None]
    attention, rotary = model.model.layers[0].self_attn, model.model.rotary_emb

    def run() -> object:
        return attention(states, position_embeddings=rotary(states, positions), attention_mask=None)

    return run, plan


def kernel(length: int, plan: ExtensionPlan | None) -> Callable[[], object]:
    """The attention alone, on states that are rotated already."""
    torch.manual_seed(0)
    query = torch.randn(1, HEADS, length, WIDTH)
    key, value = (torch.randn(1, KEY_HEADS, length, WIDTH) for _ in range(2))
    if plan is None:
        return lambda: scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    at, branches = torch.arange(length)[None], [Branch(part, query, key) for part in plan.parts]
    return lambda: banded_attention(branches, value, at, at, mask=None, aligned=True, scaling=WIDTH**-0.5)


@torch.no_grad()
def measure(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds of each, on the clock and of the processor."""
    found: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "cpu_seconds": []} for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start, cpu = time.perf_counter(), time.process_time()
            run()
            if turn:  # the first is for warming up
                found[name]["seconds"].append(time.perf_counter() - start)
                found[name]["cpu_seconds"].append(time.process_time() - cpu)
    return {name: {kind: statistics.median(each) for kind, each in kinds.items()} for name, kinds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192, help="tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, help="a JSON file for the numbers")
    args = parser.parse_args()
    loads, rows = [os.getloadavg()[0]], []
    layers: dict[str, Callable[[], object]] = {}
    kernels: dict[str, Callable[[], object]] = {}
    for name, method in {"plain": None, **methods(args.length)}.items():
        layers[name], plan = layer(args.length, method)
        kernels[name] = kernel(args.length, plan)
    print(f"{args.length} tokens; on a busy machine, compare the processor's seconds with 1 thread")
    print("threads  what             method        seconds  x plain   cpu seconds  x plain")
    for threads in args.threads:
        torch.set_num_threads(threads)
        for what, runs in (("attention layer", layers), ("attention alone", kernels)):
            found = measure(runs, args.repeats)
            for name, each in found.items():
                times = {f"{kind}_x_plain": value / found["plain"][kind] for kind, value in each.items()}
                rows.append({"threads": threads, "what": what, "method": name, **each, **times})
                print(
                    f"{threads:7}  {what:15}  {name:12} {each['seconds']:8.3f} {times['seconds_x_plain']:8.2f}"
                    f" {each['cpu_seconds']:13.3f} {times['cpu_seconds_x_plain']:8.2f}"
                )
    loads.append(os.getloadavg()[0])
    print(f"load average before and after: {loads[0]:.1f}, {loads[1]:.1f} on {os.cpu_count()} cores")
    if args.output:
        versions = {one.__name__: one.__version__ for one in (torch, transformers, hf_posext)}
        machine = {"processor": platform.machine(), "cores": os.cpu_count(), "load_average": loads}
        settings = {"length": args.length, "repeats": args.repeats}
        result = {"settings": settings, "machine": machine, "versions": versions, "rows": rows}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
