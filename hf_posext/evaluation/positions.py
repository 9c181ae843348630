"""Where in the document the longer context pays: the gain in sixteen equally long stretches of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .statistics import bootstrap_interval, pooled_perplexity

STRETCHES = 16
"""Few enough that eight documents tell something about each: at 4,096 tokens one holds 2,048 of them."""


class StretchGain(NamedTuple):
    """The gain of a method over the control on the tokens `begin` to `end` of every document."""

    begin: int
    end: int
    gain: float
    gain_ci95: list[float] | None


def stretch_bounds(length: int) -> np.ndarray:
    """The tokens at which the stretches of a document of `length` tokens begin, and its end; shape (17,)."""
    return np.arange(STRETCHES + 1) * length // STRETCHES


def position_sums(nll: np.ndarray) -> list[float]:
    """NLL summed over each stretch of a document.

    Args:
        nll (`numpy.ndarray` of shape `(tokens - 1,)`): of tokens 1, 2, ... (the first one is never scored).
    """
    bounds = np.maximum(stretch_bounds(len(nll) + 1) - 1, 0)
    return [float(nll[begin:end].sum()) for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]


def gain_by_position(
    records: Sequence[Mapping[str, Any]], control: Sequence[Mapping[str, Any]], seed: int
) -> list[StretchGain]:
    """
    The control's perplexity divided by the method's in each stretch of the documents, with paired intervals.

    It is `exp` of the NLL that the longer context saves, averaged over the tokens of a stretch in all documents.

    Args:
        records (`Sequence[dict]`): of the method at the longest length, a document each.
        control (`Sequence[dict]`): of the control, the same documents in the same order.
        seed (`int`): of the bootstrap.
    """
    length = records[0]["tokens"] + 1
    bounds = stretch_bounds(length)
    scored = np.diff(np.maximum(bounds, 1))
    saved = np.array([record["position_nll_sums"] for record in control]) - [
        record["position_nll_sums"] for record in records
    ]
    found = []
    for begin, end, count, sums in zip(bounds[:-1], bounds[1:], scored, saved.T, strict=True):
        if count:
            tokens = [int(count)] * len(records)
            interval = bootstrap_interval(list(sums), tokens, seed)
            found.append(StretchGain(int(begin), int(end), float(pooled_perplexity(sums, tokens)), interval))
    return found
