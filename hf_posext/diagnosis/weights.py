"""Properties of a positional scheme in its weights: rows of a learned table, reach of heads, buckets.

A learned table shows which of its rows training has reached. Training makes neighbouring positions alike, because text
hardly depends on whether a word stands one place further on. Rows that no token was ever trained on keep their random
initialisation, in which neighbours have nothing in common. Norms say nothing: trained rows have larger, smaller or
equal ones.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from ..patching.observe import buckets_of
from ..plan import BucketPlan
from ..scheme import Buckets

WINDOW = 16
"""Rows in a line of the statistics, and rows that are averaged before they count as alike or unlike."""

ALIKE = 0.25
"""Smallest mean cosine of neighbours over a window that counts as a pattern."""

SLOW = 0.1
"""Share of the frequencies, from the lowest, that count as slow. In noise they have this share of the power."""

FADED = 0.01
"""Weight, relative to the nearest token, below which a token is out of reach of a head."""


def last_stretch(values: np.ndarray) -> int | None:
    """Return the first index of the final stretch with the largest sum: `argmax_k sum(values[k:])`.

    This is the maximum-likelihood place of a change of mean from below zero to as far above it: the CUSUM of Page
    (1954) read from the end. Pass `values - threshold`, with the threshold half-way between the two levels. `None` if
    no stretch has a sum above zero.
    """
    sums = np.cumsum(np.asarray(values, dtype=np.float64)[::-1])[::-1]
    return int(sums.argmax()) if len(sums) and sums.max() > 0 else None


def untrained_from(rows: np.ndarray) -> int | None:
    """Return the first row from which on the table looks untrained; `None` if all rows look trained, or none does.

    `rows` have the shape `(positions, width)`, without those before position 0.
    """
    if len(rows) <= 2 * WINDOW or not has_pattern(rows):
        return None
    # Cosines of random rows have a standard deviation of 1 / sqrt(width). The limit between trained and untrained is
    # twice that, at least 0.15, and at most half of what the smoothest window has.
    cosines, noise = neighbour_cosines(rows), 1 / math.sqrt(rows.shape[1])
    limit = min(_best_window(cosines) / 2, max(0.15, 2 * noise))
    place = last_stretch(limit - cosines)
    if place is None or len(cosines) - place < WINDOW:
        return None
    # The tail is untrained if its mean is that of random rows, within 0.05 and four standard errors.
    tail = cosines[place:]
    return None if abs(tail.mean()) > 0.05 + 4 * noise / math.sqrt(len(tail)) else place + 1


def has_pattern(rows: np.ndarray) -> bool:
    """Return whether any window of the table is smoother than random rows are."""
    return _best_window(neighbour_cosines(rows)) >= max(ALIKE, 1.5 / math.sqrt(rows.shape[1]))


def _best_window(cosines: np.ndarray) -> float:
    window = min(WINDOW, len(cosines))
    return float(np.convolve(cosines, np.full(window, 1 / window), mode="valid").max()) if window else 0.0


def neighbour_cosines(rows: np.ndarray) -> np.ndarray:
    """Return the cosine of each row and the next, of shape `(positions - 1,)`.

    Zero where a row is zero or a copy of the row before it: such rows are a fill and were not trained.
    """
    rows = rows.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1)
    products = norms[1:] * norms[:-1]
    cosines = (rows[1:] * rows[:-1]).sum(1) / np.where(products > 0, products, 1)
    return np.where((rows[1:] == rows[:-1]).all(1), 0.0, cosines)


def row_statistics(rows: np.ndarray) -> pd.DataFrame:
    """Return statistics of the rows, a line for every sixteen.

    Columns: `begin` and `end` (positions), `norm` (mean), `cosine` (of neighbours, mean), `slow` (share of the power
    in the lowest tenth of the frequencies along positions, over the sixty-four rows around the line; 1 in a smooth
    table, about 0.1 in noise).
    """
    cosines, norms = neighbour_cosines(rows), np.linalg.norm(rows.astype(np.float64), axis=1)
    lines = []
    for begin in range(0, len(rows), WINDOW):
        end = min(begin + WINDOW, len(rows))
        inside = cosines[begin : end - 1]
        slow = slow_share(rows[max(0, begin - 24) : begin + 40])
        lines.append((begin, end, norms[begin:end].mean(), inside.mean() if len(inside) else math.nan, slow))
    return pd.DataFrame(lines, columns=["begin", "end", "norm", "cosine", "slow"])


def slow_share(rows: np.ndarray) -> float:
    """Return the share of the power along positions in the lowest tenth of the frequencies, without the mean."""
    power = power_spectrum(rows).sum(1)
    count = max(1, round(SLOW * len(power)))
    return float(power[:count].sum() / power.sum()) if power.sum() > 0 else math.nan


def power_spectrum(rows: np.ndarray) -> np.ndarray:
    """Return the power of each column at 1, 2, ... cycles over the rows, of shape `(positions // 2, width)`."""
    centred = rows - rows.mean(0)
    return np.asarray(np.abs(np.fft.rfft(centred, axis=0)[1:]) ** 2)


def reach_table(slopes: tuple[float, ...], scale: float) -> pd.DataFrame:
    """Return the reach of each head of an ALiBi model, steepest first.

    Columns: `head`, `slope` (nats per token), `reach` (tokens, `ln 100 / slope`: at that distance an equal score gets
    1 % of the weight of the nearest token). The model multiplies its biases by `scale`.
    """
    table = pd.DataFrame({"head": range(len(slopes)), "slope": np.multiply(slopes, scale)})
    with np.errstate(divide="ignore"):  # a head without a slope sees as far as it likes
        table["reach"] = -math.log(FADED) / table.slope
    return table.sort_values("slope", ascending=False, ignore_index=True)


def bucket_table(model: PreTrainedModel, buckets: Buckets) -> pd.DataFrame:
    """Return the distances, to keys before the query, that share a bucket, nearest first.

    Columns: `bucket`, `first` and `last` (tokens). The last bucket has no last distance (NaN).
    """
    distances = torch.arange(2 * buckets.max_distance + 2)
    bucket_of = buckets_of(model, distances, BucketPlan())
    lines = []
    for bucket in dict.fromkeys(bucket_of.tolist()):
        members = distances[bucket_of == bucket]
        lines.append({"bucket": bucket, "first": int(members.min()), "last": float(members.max())})
    lines[-1]["last"] = math.nan
    return pd.DataFrame(lines)
