"""The gain by position in the document, in sixteen equally long stretches of what is scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..protocols.protocol import Measurement
from .statistics import bootstrap_interval, pooled_perplexity

STRETCHES = 16
"""Few enough that eight documents tell something about each: at 4,096 tokens one holds 2,048 of them."""


class StretchGain(NamedTuple):
    """The gain of a method over the control on the tokens `begin` to `end` of every document."""

    begin: int
    end: int
    gain: float
    gain_ci95: list[float] | None


def stretch_bounds(first: int, scored: int) -> np.ndarray:
    """
    The tokens at which the stretches begin, and their end; shape (17,).

    They divide the tokens from the one before the first that is scored, which is where its context ends: where all of
    a document is scored that is token 0, and they divide the document.

    Args:
        first (`int`): index of the first token that is scored.
        scored (`int`): how many are.
    """
    return first - 1 + np.arange(STRETCHES + 1) * (scored + 1) // STRETCHES


def position_sums(measurement: Measurement) -> list[float] | None:
    """NLL summed over each stretch; `None` where tokens overlap, a sample does not have as many of each stretch, or
    the protocol does not weigh tokens equally, as the gain by stretch does."""
    nll = measurement.nll
    if measurement.places is not None and len(nll) % STRETCHES == 0:
        return [float(part.sum()) for part in np.split(nll, STRETCHES)]
    if measurement.first is None or measurement.groups is not None:
        return None
    bounds = np.maximum(stretch_bounds(0, len(nll)), 0)
    return [float(nll[begin:end].sum()) for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]


def stretches(record: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The bounds of the stretches of a record, shape (17,), and how many tokens of each are scored, shape (16,)."""
    first, scored, every = record["first"], record["tokens"], np.arange(STRETCHES + 1)
    if first is None:  # a sample, which is spread evenly
        return every * record["length"] // STRETCHES, np.diff(every * scored // STRETCHES)
    bounds = stretch_bounds(first, scored)
    return bounds, np.diff(np.maximum(bounds, first))


def gain_by_position(
    records: Sequence[Mapping[str, Any]], control: Sequence[Mapping[str, Any]], seed: int
) -> list[StretchGain]:
    """
    The control's perplexity divided by the method's in each stretch of the documents, with paired intervals.

    It is `exp` of the NLL that the longer context saves, averaged over the tokens of a stretch in all documents.

    Args:
        records (`Sequence[dict]`): of the method at the longest length, a document each, with `position_nll_sums`.
        control (`Sequence[dict]`): of the control, the same documents in the same order.
        seed (`int`): of the bootstrap.
    """
    bounds, counts = stretches(records[0])
    saved = np.array([record["position_nll_sums"] for record in control]) - [
        record["position_nll_sums"] for record in records
    ]
    found = []
    for begin, end, count, sums in zip(bounds[:-1], bounds[1:], counts, saved.T, strict=True):
        if count:
            tokens = [int(count)] * len(records)
            interval = bootstrap_interval(list(sums), tokens, seed)
            found.append(StretchGain(int(begin), int(end), float(pooled_perplexity(sums, tokens)), interval))
    return found
