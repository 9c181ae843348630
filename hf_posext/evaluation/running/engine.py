"""Runs what there is to measure: over processes, with a journal, and past what fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm.auto import tqdm

from ...errors import NonFiniteError, OutOfMemoryError, PosExtError
from ..scoring.distribution import deal, everywhere, processes_of, rank_of, shares_texts
from .run_journal import RunJournal, key_text

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

Key = tuple[Any, ...]


class Unit(NamedTuple):
    """
    The smallest thing that is measured: one document by one method in one pass, say.

    What it finds depends on nothing that was measured before it, or else the number of processes would show.

    Args:
        key (`tuple`): its name among all units; plain JSON types.
        cost (`float`): how long it takes, relative to the others.
        run (`Callable`): measures, and gives plain JSON types.
    """

    key: Key
    cost: float
    run: Callable[[], Any]


class State(NamedTuple):
    """
    What the model has to be in while some units are measured.

    Args:
        label (`str`): shown by the progress bar.
        enter (`Callable`): gives the context that puts the model into the state, and back.
        units (`list[Unit]`): what is measured in it.
    """

    label: str
    enter: Callable[[], AbstractContextManager[Any]]
    units: list[Unit]


class Outcome(NamedTuple):
    """What became of a unit: its value, or the reason why it has none."""

    value: Any = None
    failure: str | None = None


Outcomes = dict[Key, Outcome]


def measure(
    states: Sequence[State],
    *,
    accelerator: Accelerator | None = None,
    journal: RunJournal | None = None,
    on_state: Callable[[Outcomes], Any] | None = None,
) -> Outcomes:
    """
    Measure every unit of every state, each on one of the processes.

    All units are dealt to the processes by their cost; each process goes through the states in order, with the units
    that it has been dealt. A unit that raises has failed, and the others go on: that is how logits that are not finite
    or a lack of memory end. Any other error of this package ends the run, on all processes.

    Args:
        states (`Sequence[State]`): in the order in which they are measured.
        accelerator (`Accelerator`, *optional*): of the processes; without one there is only this process.
        journal ([`RunJournal`], *optional*): has the units that need not be measured again, the same on every process,
            and gets those that are. Failed ones are not written, so that a run that continues tries them again.
        on_state (`Callable`, *optional*): called with the outcomes so far after each state; of several processes once,
            at the end, since before it none of them knows all.

    Returns:
        `dict[tuple, Outcome]`: all of them by key, in the order of the states and units.

    Raises:
        PosExtError: on every process, where one of them has met an error that no other document can be free of.
    """
    units = [unit for state in states for unit in state.units]
    finished = {} if journal is None else journal.finished
    known = {unit.key: Outcome(finished[key_text(unit.key)]) for unit in units if key_text(unit.key) in finished}
    pending = [unit for unit in units if unit.key not in known]
    owners = deal([unit.cost for unit in pending], processes_of(accelerator))
    own = {unit.key for unit, owner in zip(pending, owners, strict=True) if owner == rank_of(accelerator)}
    if shares_texts(accelerator):
        own = {unit.key for unit in pending}
    if known:
        logger.info("%d of %d measurements are in the journal", len(known), len(units))

    is_alone = processes_of(accelerator) == 1
    tell = on_state if is_alone else None
    shares = everywhere(lambda: _measure_own(states, own, known, journal, rank_of(accelerator), tell), accelerator)
    gathered = {key: outcome for share in shares for key, outcome in share.items()}
    outcomes = {unit.key: gathered[unit.key] for unit in units}
    if on_state is not None and not is_alone:
        on_state(outcomes)
    return outcomes


def _measure_own(
    states: Sequence[State],
    own: set[Key],
    known: Outcomes,
    journal: RunJournal | None,
    rank: int,
    on_state: Callable[[Outcomes], Any] | None,
) -> Outcomes:
    """The outcomes that were known, and those of this process' units."""
    outcomes = dict(known)
    with tqdm(total=len(own), unit="unit", disable=True if rank else None) as progress:
        for state in states:
            progress.set_description(state.label)
            mine = [unit for unit in state.units if unit.key in own]
            if mine:
                with state.enter():
                    for unit in mine:
                        outcomes[unit.key] = _run(unit)
                        if journal is not None and outcomes[unit.key].failure is None:
                            journal.append(unit.key, outcomes[unit.key].value)
                        progress.update()
            if on_state is not None:
                on_state(outcomes)
    return outcomes


def _run(unit: Unit) -> Outcome:
    try:
        return Outcome(unit.run())
    except (NonFiniteError, OutOfMemoryError, torch.OutOfMemoryError) as error:
        logger.error("%s failed: %s", key_text(unit.key), error)
        return Outcome(failure=_first_line(error))
    except PosExtError:
        raise
    except Exception as error:
        logger.exception("%s failed", key_text(unit.key))
        return Outcome(failure=f"{type(error).__name__}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
