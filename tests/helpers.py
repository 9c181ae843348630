"""Helpers for the tests of all rooms: the shipped models, rows with padding, and Python in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from .conftest import EXAMPLES

ROOT = EXAMPLES.parent
TINY = EXAMPLES / "tiny" / "tiny-rope"
NOVELS = EXAMPLES / "data" / "heldout.jsonl"
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
"""Words of Python that run the script or module behind them in two processes."""


def shipped_model(name: str = "tiny-rope") -> Any:
    """Return a shipped model in float32."""
    return AutoModelForCausalLM.from_pretrained(EXAMPLES / "tiny" / name, dtype=torch.float32)


def shipped_tokenizer(name: str = "tiny-rope") -> Any:
    return AutoTokenizer.from_pretrained(EXAMPLES / "tiny" / name)


def padded(*rows: torch.Tensor, side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows `(1, tokens)` that token 0 pads to the longest one, as one batch, and their attention mask."""
    longest = max(row.shape[1] for row in rows)

    def pad(row: torch.Tensor) -> torch.Tensor:
        size = longest - row.shape[1]
        return functional.pad(row, (size, 0) if side == "left" else (0, size))

    return torch.cat([pad(row) for row in rows]), torch.cat([pad(torch.ones_like(row)) for row in rows])


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Return the positions of the tokens of each row, which padding does not count for."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def run_python(*words: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, with this package and one thread. The test fails unless it exits with 0.

    Args:
        words (`object`): arguments of Python, as in `("-c", code)`.
        cwd (`Path`, *optional*): working directory. Defaults to the root of the repository.
        environment (`str`): further environment variables.
    """
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *map(str, words)]
    process = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return process
