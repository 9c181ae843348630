"""The change point of a series that leaves its level for good: rows of a table, or the loss by position."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

TOLERANCE = 0.1
"""Smallest rise that counts as a departure, in nats per token: 10 % of perplexity."""

BLOCK = 64
"""Tokens of a document whose mean is one observation. Neighbouring tokens are not independent. Blocks of this length
nearly are, after the loss of the same tokens in a short context is subtracted."""

SIGMAS = 4.0
"""Standard errors by which the rise must differ from zero. The rise is tested where it looks largest, among some
thirty independent places of a usual text, so three would give false alarms."""

ONSET = 0.25
"""Largest rise that marks the place of a departure, in nats. Half-way up is the place of a steep rise; half-way up a
slow one would be late."""

FEWEST = 4
"""Fewest blocks whose variance is estimated."""

RESAMPLES = 999


@dataclass(frozen=True)
class Departure:
    """Departure of the loss from its level.

    Args:
        token (`int`): index of the first token that is predicted worse.
        interval (`tuple[int, int]`, *optional*): 95 % interval over documents; `None` with one document.
        rise (`float`): mean rise over the level from there to the end, in nats per token.
    """

    token: int
    interval: tuple[int, int] | None
    rise: float


def last_stretch(values: np.ndarray) -> int | None:
    """Return the first index of the final stretch with the largest sum: `argmax_k sum(values[k:])`.

    This is the maximum-likelihood place of a change of mean from below zero to as far above it: the CUSUM of Page
    (1954) read from the end. Pass `values - threshold`, with the threshold half-way between the two levels.

    Args:
        values (`numpy.ndarray` of shape `(length,)`): the series.

    Returns:
        `int`, *optional*: `None` if no stretch has a sum above zero.
    """
    sums = np.cumsum(np.asarray(values, dtype=np.float64)[::-1])[::-1]
    return int(sums.argmax()) if len(sums) and sums.max() > 0 else None


def departure(excess: np.ndarray, seed: int = 0) -> Departure | None:
    """Return the place from which on the loss stays above its level, with a percentile bootstrap over documents.

    Args:
        excess (`numpy.ndarray` of shape `(documents, tokens)`): loss of each token, from token 1 on, less its level,
            in nats. At most zero if nothing is wrong.
        seed (`int`, *optional*, defaults to 0): seed of the bootstrap.

    Returns:
        [`Departure`], *optional*: `None` if the loss keeps its level.
    """
    # A candidate: the final stretch that exceeds half of the tolerance by the largest sum.
    place = last_stretch(excess.mean(0) - TOLERANCE / 2)
    if place is None:
        return None
    # The test: its mean reaches the tolerance, and four standard errors over blocks.
    tail = excess[:, place:]
    blocks = _block_means(tail)
    rise = float(tail.mean())
    if len(blocks) < FEWEST or rise < max(TOLERANCE, SIGMAS * blocks.std(ddof=1) / math.sqrt(len(blocks))):
        return None
    # The place: the same statistic at half of that rise, or a quarter of a nat if that is less.
    onset = min(rise / 2, ONSET)
    place = last_stretch(excess.mean(0) - onset)
    assert place is not None  # from the first place on, the mean is the rise: at least twice the onset
    return Departure(place + 1, _interval(excess, onset, seed), float(excess[:, place:].mean()))


def _block_means(tail: np.ndarray) -> np.ndarray:
    """Return means of whole blocks of each document, counted from the end, as one row."""
    documents, tokens = tail.shape
    whole = tokens - tokens % BLOCK
    return np.asarray(tail[:, tokens - whole :].reshape(documents, -1, BLOCK).mean(-1).ravel())


def _interval(excess: np.ndarray, onset: float, seed: int) -> tuple[int, int] | None:
    """Return the interval over resampled documents. Samples without a departure are left out."""
    documents = len(excess)
    if documents < 2:
        return None
    weights = np.random.default_rng(seed).multinomial(documents, [1 / documents] * documents, size=RESAMPLES)
    places = [last_stretch(mean - onset) for mean in weights / documents @ excess]
    low, high = np.percentile([place + 1 for place in places if place is not None], [2.5, 97.5])
    return round(low), round(high)
