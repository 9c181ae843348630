"""Where a series leaves its level for good: one statistic, for the rows of a table and for the loss by position."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

TOLERANCE = 0.1
"""Nats per token, 10 % of perplexity: a smaller rise is not called a departure."""

BLOCK = 64
"""Tokens of a document whose mean is one observation. Next to each other, tokens are not independent; stretches of
this length nearly are, once the loss of the same tokens in a short context is taken off."""

SIGMAS = 4.0
"""Standard errors by which the rise must differ from zero. It is tested where it looks largest, at one of some thirty
independent places in a usual text, which three would not stand."""

ONSET = 0.25
"""Nats at most that the loss must have risen where it is said to depart: half-way up a steep rise is its place,
half-way up a slow one would be late."""

FEWEST = 4
"""Blocks that tell how much they vary."""

RESAMPLES = 999


@dataclass(frozen=True)
class Departure:
    """Where the loss departs.

    Args:
        token (`int`): index of the first token that is predicted worse.
        interval (`tuple[int, int]`, *optional*): 95 % of what other documents like these would give; `None` of one.
        rise (`float`): mean from there to the end, over the level, in nats per token.
    """

    token: int
    interval: tuple[int, int] | None
    rise: float


def last_stretch(values: np.ndarray) -> int | None:
    """The first index of the stretch, up to the end, whose sum is largest: `argmax_k sum(values[k:])`.

    The maximum-likelihood place of a change of mean from below zero to as far above it, and the CUSUM of Page (1954)
    read from the end. Give `values - threshold`, the threshold half-way between the two levels.

    Args:
        values (`numpy.ndarray` of shape `(length,)`): in order.

    Returns:
        `int`, *optional*: `None` where no stretch has a sum above zero.
    """
    sums = np.cumsum(np.asarray(values, dtype=np.float64)[::-1])[::-1]
    return int(sums.argmax()) if len(sums) and sums.max() > 0 else None


def departure(excess: np.ndarray, seed: int = 0) -> Departure | None:
    """Where the loss rises over its level for good, if it does.

    Whether it does: [`last_stretch`] of the mean over documents, less half of the tolerance, must have a mean of at
    least the tolerance, four standard errors away from zero over blocks of 64 tokens. Where: [`last_stretch`] of the
    mean, less half of that rise, or a quarter of a nat if that is less. The interval is a percentile bootstrap over
    documents.

    Args:
        excess (`numpy.ndarray` of shape `(documents, tokens)`): what each token, from token 1 on, costs more than
            its level, in nats. At most zero where all is well.
        seed (`int`, *optional*, defaults to 0): of the bootstrap.
    """
    place = last_stretch(excess.mean(0) - TOLERANCE / 2)
    if place is None:
        return None
    tail = excess[:, place:]
    blocks = _block_means(tail)
    rise = float(tail.mean())
    if len(blocks) < FEWEST or rise < max(TOLERANCE, SIGMAS * blocks.std(ddof=1) / math.sqrt(len(blocks))):
        return None
    onset = min(rise / 2, ONSET)
    place = last_stretch(excess.mean(0) - onset)
    assert place is not None  # from the first place on the mean is the rise, twice the onset or more
    return Departure(place + 1, _interval(excess, onset, seed), float(excess[:, place:].mean()))


def _block_means(tail: np.ndarray) -> np.ndarray:
    """Means of whole blocks of each document, counted from the end; flat."""
    documents, tokens = tail.shape
    whole = tokens - tokens % BLOCK
    return np.asarray(tail[:, tokens - whole :].reshape(documents, -1, BLOCK).mean(-1).ravel())


def _interval(excess: np.ndarray, onset: float, seed: int) -> tuple[int, int] | None:
    """From documents drawn anew, with replacement; draws that show no departure say nothing of its place."""
    documents = len(excess)
    if documents < 2:
        return None
    weights = np.random.default_rng(seed).multinomial(documents, [1 / documents] * documents, size=RESAMPLES)
    places = [last_stretch(mean - onset) for mean in weights / documents @ excess]
    low, high = np.percentile([place + 1 for place in places if place is not None], [2.5, 97.5])
    return round(low), round(high)
