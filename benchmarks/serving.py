"""Tokens per second of `hf-posext serve` for tiny-rope: each method against the unpatched model, on the same requests.

Clients send all prompts at once, of different lengths and past the trained length, and wait for all of them.

    python -m benchmarks.serving --output benchmarks/results/serving.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import transformers

import hf_posext
from hf_posext.packages import machine
from tests.cli.test_serve import MODEL, NEW, NOVELS, complete, server

METHODS = ("none", "yarn", "rerope", "rerope+fade", "self-extend", "dual-chunk")
LENGTHS = (6000, 5000, 4000, 3000, 2000, 1500, 1000, 500)
"""Characters of each prompt, about three for a token."""


def measure(method: str, prompts: list[str], rounds: int) -> dict[str, Any]:
    """Median seconds of a round. The first two are not counted: the second finds the prompts in the cache."""
    with server(MODEL, "--method", method, "--factor", "4") as url, ThreadPoolExecutor(len(prompts)) as clients:
        seconds = []
        for _ in range(rounds + 2):
            start = time.perf_counter()
            answers = list(clients.map(lambda prompt: complete(url, prompt), prompts))
            seconds.append(time.perf_counter() - start)
    assert all(answers)
    return {"method": method, "seconds": statistics.median(seconds[2:]), "rounds": seconds[2:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    novels = [json.loads(line)["text"] for line in NOVELS.read_text(encoding="utf-8").splitlines()]
    prompts = [novels[i % len(novels)][3000 : 3000 + length] for i, length in enumerate(LENGTHS)]
    rows = [measure(method, prompts, arguments.rounds) for method in METHODS]
    for row in rows:
        row["tokens_per_second"] = NEW * len(prompts) / row["seconds"]
        row["ratio"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        print(f"{row['method']:12} {row['tokens_per_second']:8.1f} tokens/s  {row['ratio']:.3f}")
    facts = {"transformers": transformers.__version__, "hf_posext": hf_posext.__version__, **machine()}
    result = {"model": MODEL.name, "requests": len(prompts), "new_tokens": NEW, "provenance": facts, "rows": rows}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
