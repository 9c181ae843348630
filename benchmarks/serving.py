"""Tokens per second of `hf-posext serve` for tiny-rope: each method against the unpatched model, on the same requests.

The servers of all methods run at once and take turns. Clients send eight prompts of different lengths, most of them
past the trained length, and wait for all answers. Each round has new prompts, which no cache contains.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from output import RESULTS, Run, console, figure, table

sys.path.append(str(Path(__file__).resolve().parent.parent))

from tests.cli.test_serve import MODEL, NOVELS, complete, server

METHODS = ("none", "yarn", "rerope", "rerope+fade", "leaky-rerope+fade", "self-extend", "dual-chunk")
LENGTHS = (6000, 5000, 4000, 3000, 2000, 1500, 1000, 500)
"""Characters of each prompt, about three per token."""


def measure(methods: Sequence[str], lengths: Sequence[int], tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Return seconds of each round but the first, and the ratio of speeds to the first method."""
    novels = [json.loads(line)["text"] for line in NOVELS.read_text(encoding="utf-8").splitlines()]
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    with ExitStack() as stack:
        urls = {method: stack.enter_context(server(MODEL, "--method", method, "--factor", "4")) for method in methods}
        clients = stack.enter_context(ThreadPoolExecutor(len(lengths)))
        for turn in range(rounds + 1):
            start = 3000 + turn * max(lengths)
            prompts = [novels[i % len(novels)][start:][:length] for i, length in enumerate(lengths)]
            order = list(urls.items())
            for method, url in order[turn % len(order) :] + order[: turn % len(order)]:
                began = time.perf_counter()
                answers = list(clients.map(lambda prompt, url=url: complete(url, prompt, tokens), prompts))
                seconds[method].append(time.perf_counter() - began)
                assert all(answers)
    rows = []
    for method, times in seconds.items():
        ratios = [base / seconds_of_round for base, seconds_of_round in zip(seconds[methods[0]], times, strict=True)][
            1:
        ]
        speed = tokens * len(lengths) / statistics.median(times[1:])
        rows.append(
            {"method": method, "seconds": times[1:], "tokens_per_second": speed, "ratio": statistics.median(ratios)}
            | {"ratio_range": [min(ratios), max(ratios)]}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=32, help="New tokens of each request.")
    parser.add_argument("--output", type=Path, default=RESULTS / "serving.json")
    arguments = parser.parse_args()
    run = Run("serving", {"rounds": arguments.rounds, "tokens": arguments.tokens}, arguments.output)
    setting = {"model": MODEL.name, "factor": 4, "characters": LENGTHS, "new_tokens": arguments.tokens}
    run.part("setting", lambda: setting)
    rows = run.part("throughput", lambda: measure(METHODS, LENGTHS, arguments.tokens, arguments.rounds))
    run.finish([])
    cells = [(row["method"], figure(row["tokens_per_second"], 1), figure(row["ratio"])) for row in rows]
    console().print(table("hf-posext serve", ("", "tokens/s", "x unpatched"), cells))


if __name__ == "__main__":
    main()
