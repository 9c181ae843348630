"""One process, or one of several that `accelerate launch` or `torchrun` have started."""

from __future__ import annotations

import datetime
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..errors import InvalidParameterError
from .trackers import track

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from ..evaluation import Results

PATIENCE = datetime.timedelta(days=7)
"""How long a process waits for the others, which may have the longer documents; launchers end all if one dies."""


def rank() -> int:
    """The index of this process among those of its launcher; only the first one writes and prints."""
    return int(os.environ.get("RANK", 0))


def is_launched() -> bool:
    """Whether a launcher of accelerate or torch has started this process."""
    return "WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def join_processes(device: str | None) -> tuple[str, Accelerator | None]:
    """
    Where this process computes, and what it shares the work by.

    Args:
        device (`str`, *optional*): what was asked for.

    Returns:
        `tuple[str, Accelerator | None]`: without a launcher the device that was asked for, or the CPU, and nothing.

    Raises:
        InvalidParameterError: a launcher gives the devices, and one was asked for.
    """
    if not is_launched():
        return device or "cpu", None
    if device not in (None, "cpu"):
        raise InvalidParameterError(
            f"device is {device!r}, and the launcher gives each process its own; leave --device out, or give cpu"
        )
    from accelerate import Accelerator, InitProcessGroupKwargs

    accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    if not accelerator.is_main_process:
        logging.getLogger("hf_posext").setLevel(logging.ERROR)  # the first process says the rest
    return str(accelerator.device), accelerator


def spread(model: PreTrainedModel, accelerator: Accelerator | None) -> PreTrainedModel:
    """The model as a process holds it: whole, or where the launcher asks for context parallelism its share."""
    from ..evaluation.scoring.context_parallel import shard_weights
    from ..evaluation.scoring.distribution import shares_texts

    return shard_weights(model, accelerator) if accelerator is not None and shares_texts(accelerator) else model


def finish(results: Results, output: Path, accelerator: Accelerator | None, log_with: str | None = None) -> None:
    """The first process logs, prints the tables and says where the report is; all part."""
    if log_with is not None:
        track(results, log_with, output, accelerator)
    if accelerator is not None:
        accelerator.end_training()
    if not rank():
        from ..reporting import print_tables

        print_tables(results)
        typer.echo(f"report: {output / 'README.md'}")
