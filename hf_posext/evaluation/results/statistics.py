"""Perplexity of pooled documents, and its bootstrap interval over them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 9_999


def pooled_perplexity(nll_sums: Any, tokens: Any, axis: int = -1) -> Any:
    """
    `exp(sum of NLL / sum of tokens)`: every token weighs the same, whichever document it is from.

    The mean of the documents' perplexities is another number, and a larger one. Sums of *differences* of NLL over the
    same tokens give the ratio of two perplexities.

    Args:
        nll_sums (`array` of shape `(..., documents)`): float64, in nats.
        tokens (`array` of shape `(..., documents)`): tokens scored in each document.
        axis (`int`, *optional*, defaults to -1): the axis of the documents.
    """
    with np.errstate(over="ignore"):  # a broken model's perplexity may be infinite; it is written as null
        return np.exp(np.sum(nll_sums, axis=axis, dtype=np.float64) / np.sum(tokens, axis=axis))


def share_interval(share: float, trials: int) -> tuple[float, float]:
    """
    95 % interval of a share of independent trials, after Wilson: 5 of 5 tells no more than that it is above 57 %.

    Args:
        share (`float`): found, from 0 to 1.
        trials (`int`): 1 or more.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    middle = share + z**2 / (2 * trials)
    half = z * ((share * (1 - share) + z**2 / (4 * trials)) / trials) ** 0.5
    scale = 1 + z**2 / trials
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def bootstrap_interval(nll_sums: Sequence[float], tokens: Sequence[int], seed: int) -> list[float] | None:
    """
    95 % interval of [`pooled_perplexity`] when documents are drawn anew, with replacement.

    Documents are the independent unit; tokens of one document are not. Give differences of NLL sums for the interval
    of a ratio of two perplexities on the same tokens: it is paired by document, which takes out how hard each one is.
    Percentile, not BCa: BCa estimates an acceleration from a jackknife over documents, which is noise at the usual
    eight and undefined where documents agree. With few documents the interval is somewhat too narrow.

    Args:
        nll_sums (`Sequence[float]`): one sum per document, in nats.
        tokens (`Sequence[int]`): tokens scored in each.
        seed (`int`): of the resampling.

    Returns:
        `list[float]`, *optional*: `[low, high]`; `None` with one document, which tells nothing about others.
    """
    if len(nll_sums) < 2:
        return None
    from scipy.stats import bootstrap

    interval = bootstrap(
        (np.asarray(nll_sums, dtype=np.float64), np.asarray(tokens)),
        pooled_perplexity,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return [float(interval.low), float(interval.high)]
