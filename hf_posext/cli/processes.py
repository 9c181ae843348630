"""Processes of a launcher (`accelerate launch`, `torchrun`), or a single one."""

from __future__ import annotations

import datetime
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidParameterError
from .console import say
from .trackers import track

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from ..evaluation import Results

PATIENCE = datetime.timedelta(days=7)
"""Time that a process waits for the others, which may have the longer documents; launchers end all if one dies."""


RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Names that torch and the kinds of MPI have for the index of a process and their number, as accelerate reads them."""


def rank() -> int:
    """Return the index of this process in its launcher. Only the first one writes and prints."""
    return _from_launcher(RANKS, 0)


def world_size() -> int:
    """Return the number of the launcher's processes; 1 without a launcher."""
    return _from_launcher(SIZES, 1)


def is_launched() -> bool:
    """Return `True` if a launcher of accelerate, torch or MPI has started this process."""
    return world_size() > 1 or "WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def _from_launcher(names: tuple[str, ...], default: int) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), default)


def join_processes(device: str | None) -> tuple[str, Accelerator | None]:
    """Return the device of this process, and the accelerator it shares with the launcher's other processes.

    Processes of a launcher compute on CPUs where there is no accelerator device, also without `ACCELERATE_USE_CPU`.
    Without a launcher there is no accelerator, and the device is the one that was asked for, or the CPU.

    Raises:
        InvalidParameterError: a launcher gives the devices, and one was asked for; or accelerate has not joined all
            processes of the launcher.
    """
    if not is_launched():
        return device or "cpu", None
    if device not in (None, "cpu"):
        raise InvalidParameterError(
            f"device is {device!r}, and the launcher gives each process its own. Leave --device out, or give cpu."
        )
    from accelerate import Accelerator, InitProcessGroupKwargs

    on_cpu = device == "cpu" or not _has_device()
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    joined = accelerator.process_index, accelerator.num_processes
    if joined != (rank(), world_size()):
        raise InvalidParameterError(
            f"the launcher started process {rank()} of {world_size()}, and accelerate made it {joined[0]} of "
            f"{joined[1]}, so that work would be done twice. Start processes by accelerate launch or torchrun, or one "
            "process without a launcher."
        )
    if not accelerator.is_main_process:
        logging.getLogger("hf_posext").setLevel(logging.ERROR)  # the first process says the rest
    return str(accelerator.device), accelerator


def _has_device() -> bool:
    """Return `True` if there is a device other than the CPU, as accelerate would take one."""
    import torch

    return torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available()


def spread(model: PreTrainedModel, accelerator: Accelerator | None) -> PreTrainedModel:
    """Return the whole model, or this process's shard if the launcher requests context parallelism."""
    from ..evaluation.parallel import shard_weights, shares_texts

    return shard_weights(model, accelerator) if accelerator is not None and shares_texts(accelerator) else model


def finish(results: Results, output: Path, accelerator: Accelerator | None, log_with: str | None = None) -> None:
    """Log, print the tables, and name the report on the first process; then end all processes."""
    if log_with is not None:
        track(results, log_with, output, accelerator)
    if accelerator is not None:
        accelerator.end_training()
    if not rank():
        from ..reporting import print_tables

        print_tables(results)
        say(f"measured by {_processes(results)}, in {results.provenance['dtype']}")
        say(f"report: {output / 'README.md'}")


def _processes(results: Results) -> str:
    """Return the number of processes and their devices, as in "2 processes on cuda:0, cuda:1"."""
    count, devices = results.provenance["processes"], results.provenance["devices"]
    return f"{count} process{'es' if count > 1 else ''} on {', '.join(dict.fromkeys(devices))}"
