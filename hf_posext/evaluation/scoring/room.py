"""Memory that runs out: half as much is tried at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Self

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

logger = logging.getLogger(__name__)


def ran_out(error: Exception) -> bool:
    """Return `True` if an error says that memory has run out, on whichever device."""
    return isinstance(error, torch.OutOfMemoryError) or bool(should_reduce_batch_size(error))


def halved(what: str, amount: int, reason: str) -> int:
    """Half of an amount. Says so, and gives back what the device holds for nobody.

    To be called where the error is out of scope: its frames hold the tensors that did not fit.
    """
    clear_device_cache(garbage_collection=True)
    logger.warning("out of memory, so %s go from %d to %d: %s", what, amount, amount // 2, reason)
    return amount // 2


def first_line(error: Exception) -> str:
    """First line of an error, without the advice that follows."""
    return str(error).strip().split("\n", 1)[0]


class Part:
    """
    Some items of a range, and whether memory ran out over them: inside `with part:` that error ends the block only.

    Args:
        begin (`int`): first item.
        end (`int`): one past the last.
        gives_way (`bool`): whether fewer items can be tried; else the error passes.

    Attributes:
        reason (`str`, *optional*): what the error said, once memory has run out.
    """

    def __init__(self, begin: int, end: int, gives_way: bool) -> None:
        self.begin, self.end, self.gives_way = begin, end, gives_way
        self.reason: str | None = None

    @property
    def size(self) -> int:
        """Number of items."""
        return self.end - self.begin

    @property
    def items(self) -> slice:
        """The items as an index."""
        return slice(self.begin, self.end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not self.gives_way or not isinstance(error, RuntimeError) or not ran_out(error):
            return False
        self.reason = first_line(error)  # and not the error: its frames hold the tensors that did not fit
        return True


class Room:
    """
    Divides ranges into parts, each with as many items as there is room for.

    ```python
    for part in room.parts(range(len(rows)), cost=length):
        with part:  # again, for a shorter part, where memory runs out
            out[part.items] = work(rows[part.items])
    ```

    Args:
        what (`str`): what the items are, for the log.
        amount (`int`): how much fits at once, in units that items cost; halved where memory runs out, and so it stays.
        gives_way (`bool`, *optional*, defaults to `True`): whether memory may run out; else that error passes.
    """

    def __init__(self, what: str, amount: int, gives_way: bool = True) -> None:
        self.what = what
        self.amount = amount
        self.gives_way = gives_way

    def parts(self, items: range, cost: int, otherwise: Callable[[str], None] | None = None) -> Iterator[Part]:
        """
        The parts of a range, one after another; one over which memory ran out comes again, shorter.

        Args:
            items (`range`): in steps of 1.
            cost (`int`): of one item.
            otherwise (`Callable[[str], None]`, *optional*): makes room in another way where a single item does not
                fit, given what the error said, or raises. Without it that error passes.
        """
        begin = items.start
        while begin < items.stop:
            size = min(max(1, self.amount // cost), items.stop - begin)
            part = Part(begin, begin + size, self.gives_way and (size > 1 or otherwise is not None))
            yield part
            if part.reason is None:
                begin += size
            elif size > 1:
                self.amount = halved(self.what, size, part.reason) * cost
            elif otherwise is not None:
                otherwise(part.reason)
