"""Task runner: processes, journal, failures, and progress."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from tqdm.auto import tqdm

from ..errors import NonFiniteError, OutOfMemoryError, PosExtError, first_line
from ..processes import deal, exchange, processes_of, rank_of, shares_texts
from .journal import RunJournal
from .scorer import LISTENER
from .tasks import Outcome, Outcomes, Stage, Task

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

HEARTBEAT = 1.0
"""Seconds between updates of the progress bar's clock, even during a long forward."""


def measure(
    stages: Sequence[Stage],
    *,
    accelerator: Accelerator | None = None,
    journal: RunJournal | None = None,
    on_stage: Callable[[Outcomes], Any] | None = None,
) -> Outcomes:
    """Measure every task of every stage, each on one process.

    All tasks are distributed over the processes by cost. Each process measures its tasks stage by stage. If a task
    fails, because logits are not finite, memory runs out, or another package raises an error, the remaining tasks
    continue. Any other error of this package ends the run on all processes. Tasks in the journal, which is the same on
    every process, are not measured again. Failed tasks are not written to the journal, so a resumed run retries them.

    `on_stage` is called with the outcomes so far after each stage. With several processes it is called once, at the
    end, because only then does each process have all outcomes. Outcomes are in the order of the stages and their
    tasks.
    """
    tasks = [task for stage in stages for task in stage.tasks]
    outcomes = {task: Outcome(journal[task]) for task in tasks if task in journal} if journal is not None else {}
    if outcomes:
        logger.info("%d of %d measurements are in the journal", len(outcomes), len(tasks))
    share = _share([task for task in tasks if task not in outcomes], accelerator)
    processes = processes_of(accelerator)
    ended: Exception | None = None
    try:
        with Progress(share, rank_of(accelerator), processes) as progress:
            for stage in stages:
                todo = [task for task in stage.tasks if task in share]
                if todo:
                    with stage.enter():
                        for task in todo:
                            progress.begin(stage.label, task)
                            try:
                                outcomes[task] = Outcome(stage.measure(task))
                            except Exception as error:
                                outcomes[task] = _failed(task, error)
                            else:
                                if journal is not None:
                                    journal[task] = outcomes[task].value
                            progress.end(task)
                if on_stage is not None and processes == 1:
                    on_stage(outcomes)
    except Exception as error:
        ended = error
    for outcomes_of_process in exchange(outcomes, ended, accelerator):
        outcomes |= outcomes_of_process
    outcomes = {task: outcomes[task] for task in tasks}
    if on_stage is not None and processes > 1:
        on_stage(outcomes)
    return outcomes


def _share(tasks: Sequence[Task], accelerator: Accelerator | None) -> set[Task]:
    """Return the tasks of this process; all tasks if processes share each text."""
    if shares_texts(accelerator):
        return set(tasks)
    owners = deal([task.cost for task in tasks], processes_of(accelerator))
    return {task for task, owner in zip(tasks, owners, strict=True) if owner == rank_of(accelerator)}


def _failed(task: Task, error: Exception) -> Outcome:
    """Return the outcome of a failed task, or raise an error that ends the run."""
    if isinstance(error, NonFiniteError | OutOfMemoryError | torch.OutOfMemoryError):
        logger.error("%s failed: %s", task, error)
        return Outcome(failure=first_line(error))
    if isinstance(error, PosExtError):
        raise error
    logger.error("%s failed", task, exc_info=error)
    return Outcome(failure=f"{type(error).__name__}: {first_line(error)}")


class Progress:
    """Progress bar over the tokens that this process reads, with the current task.

    Tokens are counted at the end of each forward, and at the latest at the end of their task. The clock is updated
    every second, to distinguish a long forward from a hanging process. Only the first process shows a bar, and only on
    a terminal.
    """

    def __init__(self, tasks: set[Task], rank: int, processes: int) -> None:
        total = sum(task.tokens for task in tasks)
        self.bar = tqdm(total=total, unit="tok", unit_scale=True, disable=True if rank else None)
        self.bar.set_postfix_str(f"{processes} process{'es' if processes > 1 else ''}", refresh=False)
        self._limit = 0.0  # tokens including those of the current task
        self._stop = threading.Event()
        self._clock = threading.Thread(target=self._tick, daemon=True)

    def begin(self, label: str, task: Task) -> None:
        """Show the current task."""
        self._limit = self.bar.n + task.tokens
        self.bar.set_description(label if task.document is None else f"{label}, {task.document}")

    def end(self, task: Task) -> None:
        """Count the remaining tokens of a finished or failed task."""
        self.bar.update(self._limit - self.bar.n)

    def __enter__(self) -> Self:
        self._listening = LISTENER.set(self._add)
        if not self.bar.disable:
            self._clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._clock.is_alive():
            self._clock.join()
        LISTENER.reset(self._listening)
        self.bar.close()

    def _add(self, tokens: int) -> None:
        self.bar.update(max(0, min(tokens, self._limit - self.bar.n)))

    def _tick(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            self.bar.refresh()
