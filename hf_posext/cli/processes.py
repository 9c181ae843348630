"""Processes: a single one, or several started by `accelerate launch` or `torchrun`."""

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
"""Time that a process waits for others with longer documents. Launchers end all processes if one dies."""


RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables of torch and MPI for the rank of a process and the number of processes, as accelerate reads them."""


def rank() -> int:
    """Return the rank of this process, 0 without a launcher. Only process 0 writes and prints."""
    return _from_launcher(RANKS, 0)


def world_size() -> int:
    """Return the number of processes of the launcher, 1 without a launcher."""
    return _from_launcher(SIZES, 1)


def is_launched() -> bool:
    """Return `True` if a launcher of accelerate, torch or MPI has started this process."""
    return world_size() > 1 or "WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def _from_launcher(names: tuple[str, ...], default: int) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), default)


def join_processes(device: str | None) -> tuple[str, Accelerator | None]:
    """Return the device of this process, and the `Accelerator` that shares work among the processes of a launcher.

    Processes of a launcher compute on the CPU if there is no other device, even without `ACCELERATE_USE_CPU`. Without
    a launcher, the accelerator is `None`, and the device is the requested one, or the CPU.

    Raises:
        InvalidParameterError: a device other than the CPU is requested although the launcher assigns devices, or
            accelerate has not joined all processes of the launcher.
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
        logging.getLogger("hf_posext").setLevel(logging.ERROR)  # only the first process prints warnings
    return str(accelerator.device), accelerator


def _has_device() -> bool:
    """Return `True` if torch has a device other than the CPU, which accelerate would use."""
    import torch

    return torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available()


def spread(model: PreTrainedModel, accelerator: Accelerator | None) -> PreTrainedModel:
    """Return the model of this process: whole, or sharded if the launcher requests context parallelism."""
    from ..evaluation.parallel import shard_weights, shares_texts

    return shard_weights(model, accelerator) if accelerator is not None and shares_texts(accelerator) else model


def finish(results: Results, output: Path, accelerator: Accelerator | None, log_with: str | None = None) -> None:
    """Log the results, print the tables and the path of the report, and leave the group of processes.

    Only the first process logs and prints.
    """
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
