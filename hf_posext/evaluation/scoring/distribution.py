"""Several processes: which of them does what, and how all come to know what each has found.

Work is dealt out whole and its results are gathered, never averaged over processes: sums that are pooled afterwards,
in the order of the documents, are the same to the bit however many processes there were.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ...errors import EvaluationError, InvalidParameterError, PosExtError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


def rank_of(accelerator: Accelerator | None) -> int:
    """The index of this process; 0 without an accelerator."""
    return 0 if accelerator is None else int(accelerator.process_index)


def processes_of(accelerator: Accelerator | None) -> int:
    """Number of processes; 1 without an accelerator.

    Raises:
        InvalidParameterError: the launcher has started more processes than the accelerator has joined, each of which
            would do all of the work.
    """
    if accelerator is None:
        return 1
    started, joined = int(os.environ.get("WORLD_SIZE", 1)), int(accelerator.num_processes)
    if started > joined:
        raise InvalidParameterError(
            f"WORLD_SIZE is {started}, and the accelerator has joined {joined}, so that each process would do all of "
            "the work; pass Accelerator(cpu=True) on a machine without a GPU, or set ACCELERATE_USE_CPU=true"
        )
    return joined


def process_facts(accelerator: Accelerator | None, device: str) -> dict[str, Any]:
    """
    What results say of the processes that measured. Every process has to call it.

    Args:
        accelerator (`Accelerator`, *optional*): of the processes.
        device (`str`): of the model on this process.

    Returns:
        `dict`: `processes`, their number, and `devices`, one for each.
    """
    return {"processes": processes_of(accelerator), "devices": everywhere(lambda: device, accelerator)}


def shares_texts(accelerator: Accelerator | None) -> bool:
    """Return `True` if the processes work on one text together, instead of on a text each.

    Raises:
        InvalidParameterError: some of them would.
    """
    config = getattr(accelerator, "parallelism_config", None)
    if accelerator is None or config is None or config.cp_size == 1:
        return False
    if config.cp_size != accelerator.num_processes:
        raise InvalidParameterError(
            f"cp_size is {config.cp_size} and there are {accelerator.num_processes} processes; an evaluation shares "
            "each text out over all processes or over none: make the two equal, or leave cp_size out"
        )
    return True


def deal(costs: Sequence[float], processes: int) -> list[int]:
    """
    The process of each piece of work: the longest first, each to the process that has least so far.

    Args:
        costs (`Sequence[float]`): of the pieces, in any unit.
        processes (`int`): how many share them.

    Returns:
        `list[int]`: index of a process for each piece; the same on every process. Of equal costs the first goes first.
    """
    loads, owners = [0.0] * processes, [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[piece] = min(range(processes), key=loads.__getitem__)
        loads[owners[piece]] += costs[piece]
    return owners


def everywhere(work: Callable[[], T], accelerator: Accelerator | None) -> list[T]:
    """
    Do a process' share of the work, and learn what all of them have got.

    Every process has to call it. An error is carried to the others before it is raised, so that none of them waits for
    a process that has stopped; Ctrl-C is not, since launchers stop all processes then.

    Args:
        work (`Callable`): what this process does; its result can be pickled.
        accelerator (`Accelerator`, *optional*): of the processes; without one there is only this process.

    Returns:
        `list`: the results of all processes, in their order.

    Raises:
        Exception: of `work`; on the other processes the same if it is a [`PosExtError`], else an [`EvaluationError`].
    """
    if processes_of(accelerator) == 1:
        return [work()]
    result: T | None = None
    ended: Exception | None = None
    try:
        result = work()
    except Exception as error:
        ended = error
    return exchange(result, ended, accelerator)  # type: ignore[arg-type]  # there is a result where nothing ended it


def exchange(result: T, ended: Exception | None, accelerator: Accelerator | None) -> list[T]:
    """
    Results of all processes, in their order, once each has ended its share. Every process has to call it.

    Args:
        result (`Any`): of this process; can be pickled.
        ended (`Exception`, *optional*): why its share ended early.
        accelerator (`Accelerator`, *optional*): of the processes; without one there is only this process.

    Raises:
        Exception: `ended`; on the other processes the same if it is a [`PosExtError`], else an [`EvaluationError`].
    """
    if processes_of(accelerator) == 1:
        if ended is not None:
            raise ended
        return [result]
    from accelerate.utils import gather_object

    known = ended if ended is None or isinstance(ended, PosExtError) else None
    if ended is not None and known is None:
        known = EvaluationError(f"process {rank_of(accelerator)} failed: {type(ended).__name__}: {ended}")
    shares = gather_object([(None if ended else result, known)])
    errors = [error for _, error in shares if error is not None]
    if errors:
        raise ended or errors[0]
    return [share for share, _ in shares]
