"""Which rows of a learned table of positions training has reached, read from the numbers themselves.

Training makes neighbouring positions alike, since text does not care much whether a word stands one place further on.
Rows that no token was ever trained on keep their random initialisation, in which neighbours have nothing in common.
Norms do not tell: trained rows have larger, smaller or equal ones.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from .change_point import last_stretch

WINDOW = 16
"""Rows to a line of the table, and rows that must be alike, or unlike, on average before anything is said of them."""

ALIKE = 0.25
"""Least cosine of neighbours, on average over a window, that counts as a pattern. Trained tables have 0.8 and more."""

SLOW = 0.1
"""Share of the frequencies, the lowest, whose power is told; of noise they have this share."""


def untrained_from(rows: np.ndarray) -> int | None:
    """The first of the rows, up to the end of the table, that look untrained.

    With cosines `c_p` of rows p and p + 1, the place is where `sum of (limit - c_p)` up to the end is largest
    ([`last_stretch`]); `limit` is half of the largest mean of a window, or less, but twice the standard deviation
    that cosines of random rows have, `1 / sqrt(width)`. The rows from there on count as untrained if there are
    sixteen of them or more, and their mean cosine is that of random rows, but for 0.05 and four standard errors.

    Args:
        rows (`numpy.ndarray` of shape `(positions, width)`): without the rows before position 0.

    Returns:
        `int`, *optional*: `None` where all rows look trained, and where none does.
    """
    if len(rows) <= 2 * WINDOW or not has_pattern(rows):
        return None
    cosines, noise = neighbour_cosines(rows), 1 / math.sqrt(rows.shape[1])
    limit = min(_best_window(cosines) / 2, max(0.15, 2 * noise))
    place = last_stretch(limit - cosines)
    if place is None or len(cosines) - place < WINDOW:
        return None
    tail = cosines[place:]
    return None if abs(tail.mean()) > 0.05 + 4 * noise / math.sqrt(len(tail)) else place + 1


def has_pattern(rows: np.ndarray) -> bool:
    """Whether any window of the table is smoother than random rows are."""
    return _best_window(neighbour_cosines(rows)) >= max(ALIKE, 1.5 / math.sqrt(rows.shape[1]))


def _best_window(cosines: np.ndarray) -> float:
    """Largest mean over sixteen cosines next to each other."""
    window = min(WINDOW, len(cosines))
    return float(np.convolve(cosines, np.full(window, 1 / window), mode="valid").max()) if window else 0.0


def neighbour_cosines(rows: np.ndarray) -> np.ndarray:
    """Cosine of each row and the next, of shape `(positions - 1,)`.

    Zero where a row is zero, or a copy of the row before it: a fill, and no training.
    """
    rows = rows.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1)
    products = norms[1:] * norms[:-1]
    cosines = (rows[1:] * rows[:-1]).sum(1) / np.where(products > 0, products, 1)
    return np.where((rows[1:] == rows[:-1]).all(1), 0.0, cosines)


def row_statistics(rows: np.ndarray) -> pd.DataFrame:
    """What the rows look like, a line for every sixteen of them.

    Columns: `begin` and `end` (positions), `norm` (mean), `cosine` (of neighbours, mean), `slow` (share of the power
    in the lowest tenth of the frequencies along positions, over windows of sixty-four rows around the line: 1 of a
    smooth table, about 0.1 of noise).
    """
    cosines, norms = neighbour_cosines(rows), np.linalg.norm(rows.astype(np.float64), axis=1)
    lines = []
    for begin in range(0, len(rows), WINDOW):
        end = min(begin + WINDOW, len(rows))
        inside = cosines[begin : end - 1]
        around = slice(max(0, begin - 24), begin + 40)
        lines.append(
            {
                "begin": begin,
                "end": end,
                "norm": norms[begin:end].mean(),
                "cosine": inside.mean() if len(inside) else math.nan,
                "slow": slow_share(rows[around]),
            }
        )
    return pd.DataFrame(lines)


def slow_share(rows: np.ndarray) -> float:
    """Share of the power along positions that is in the lowest tenth of the frequencies, the mean taken off."""
    power = power_spectrum(rows).sum(1)
    count = max(1, round(SLOW * len(power)))
    return float(power[:count].sum() / power.sum()) if power.sum() > 0 else math.nan


def power_spectrum(rows: np.ndarray) -> np.ndarray:
    """Power of each column at frequencies 1, 2, ... turns over the rows; shape `(positions // 2, width)`."""
    centred = rows - rows.mean(0)
    return np.asarray(np.abs(np.fft.rfft(centred, axis=0)[1:]) ** 2)
