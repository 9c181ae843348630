"""Successive halving of a budget: all contenders read a document, the better third of them twice as many, and so on.

Successive halving (Jamieson and Talwalkar, 2016, arXiv 1502.07943) at a rate of three. The unit is a token that goes
through the model: it adds up over documents and methods, knows no machine, and a user can multiply it by a speed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ..errors import InvalidParameterError

RATE = 3
"""One of so many contenders goes on to the next rung, where documents are doubled."""

FINALISTS = 3
"""The winner and two runners-up, so that there is something to say of how sure the choice is."""

CONTROL_DOCUMENTS = 2
"""The control reads a token some seven times over; two documents tell whether it is better at all."""


class Rung(NamedTuple):
    """So many contenders have each read so many documents."""

    contenders: int
    documents: int


class Prices(NamedTuple):
    """
    Tokens that go through the model.

    Args:
        methods (`tuple[int, ...]`): for a document with each of the contenders in force, in their order.
        guard (`int`): beside that for the first document, which is read again to see that one pass tells two lengths.
        short (`int`): for the trained length of a document, unpatched.
        control (`int`): for a document with its context truncated.
        passkeys (`int`): for the pass keys of one method.
    """

    methods: tuple[int, ...]
    guard: int
    short: int
    control: int
    passkeys: int


class Schedule(NamedTuple):
    """
    What a budget pays for. What it leaves goes to pass keys, where they decide something, and to more documents.

    Args:
        rungs (`list[Rung]`): one after another; documents count those of before.
        control (`int`): documents that the control reads at least.
    """

    rungs: list[Rung]
    control: int

    def tokens(self, prices: Prices) -> int:
        """Largest cost, in tokens."""
        first = self.rungs[0].contenders
        dearest = sorted(prices.methods[:first], reverse=True)
        total, before = first * prices.guard, 0
        for rung in self.rungs:
            total += sum(dearest[: rung.contenders]) * (rung.documents - before)
            before = rung.documents
        return total + before * prices.short + self.control * prices.control


def schedule(documents: int, prices: Prices, budget: int) -> Schedule:
    """
    The fullest schedule within a budget.

    It begins with as many documents as can be paid for. Where not even one can be for all contenders, the control
    reads one only, and then the last contenders are given up.

    Args:
        documents (`int`): how many there are.
        prices ([`Prices`]): in tokens, of all contenders.
        budget (`int`): tokens.

    Raises:
        InvalidParameterError: it does not pay for one method and the control on one document.
    """
    contenders = len(prices.methods)
    full = [_halved(contenders, first, documents, CONTROL_DOCUMENTS) for first in range(documents, 0, -1)]
    fewer = [_halved(count, 1, documents, 1) for count in range(contenders, 0, -1)]
    for found in (*full, *fewer):
        if found.tokens(prices) <= budget:
            return found
    least = least_tokens(prices)
    raise InvalidParameterError(
        f"budget is {budget} tokens, and one comparison (a method and the control on one document) takes {least}; "
        f"give {least} or more, or a smaller target_length"
    )


def least_tokens(prices: Prices) -> int:
    """Cost of one comparison: the first contender and the control on one document."""
    return _halved(1, 1, 1, 1).tokens(prices)


def _halved(contenders: int, first: int, documents: int, control: int) -> Schedule:
    rungs = [Rung(contenders, first)]
    while rungs[-1].contenders > FINALISTS:
        fewer = max(FINALISTS, math.ceil(rungs[-1].contenders / RATE))
        rungs.append(Rung(fewer, min(2 * rungs[-1].documents, documents)))
    return Schedule(rungs, min(control, rungs[-1].documents))
