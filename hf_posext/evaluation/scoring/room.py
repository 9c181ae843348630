"""What to do where memory runs out: half as much at once."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

logger = logging.getLogger(__name__)


def ran_out(error: Exception) -> bool:
    """Whether an error says that memory has run out, on whichever device."""
    return isinstance(error, torch.OutOfMemoryError) or bool(should_reduce_batch_size(error))


def halved(what: str, amount: int, reason: str) -> int:
    """Half of an amount. Says so, and gives back what the device holds for nobody.

    To be called where the error is out of scope: its frames hold the tensors that did not fit.
    """
    clear_device_cache(garbage_collection=True)
    logger.warning("out of memory, so %s go from %d to %d: %s", what, amount, amount // 2, reason)
    return amount // 2


def first_line(error: Exception) -> str:
    """What an error says, without the advice that follows."""
    return str(error).strip().split("\n", 1)[0]


class Room:
    """
    Does items of a range, as many at once as there is room for.

    Args:
        what (`str`): what the items are, for the log.
        amount (`int`): how much fits at once, in units that items cost; halved where memory runs out, and so it stays.
    """

    def __init__(self, what: str, amount: int) -> None:
        self.what = what
        self.amount = amount

    def run(self, work: Callable[[int, int], None], items: range, cost: int) -> None:
        """
        Call `work(begin, end)` for one part of a range after the other.

        Args:
            work (`Callable[[int, int], None]`): may be called again, for a shorter part, when it ran out of memory.
            items (`range`): in steps of 1.
            cost (`int`): of one item.

        Raises:
            RuntimeError: of `work`, where not even one item fits.
        """
        begin = items.start
        while begin < items.stop:
            size = min(max(1, self.amount // cost), items.stop - begin)
            try:
                work(begin, begin + size)
            except RuntimeError as error:
                if size == 1 or not ran_out(error):
                    raise
                reason = first_line(error)
            else:
                begin += size
                continue
            self.amount = halved(self.what, size, reason) * cost
