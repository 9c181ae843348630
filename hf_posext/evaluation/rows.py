"""From NLL sums per document to the rows of a result: nothing here needs a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from .positions import position_sums
from .protocols import Measurement
from .statistics import bootstrap_interval, pooled_perplexity
from .tokens import TokenizedDocuments

Record = dict[str, Any]


def document_record(
    measurement: Measurement, documents: TokenizedDocuments, method: str, factor: float, *, with_positions: bool
) -> Record:
    """
    What one document gave at one length, as float64 sums.

    The tail is the second half of the tokens: of `n` tokens, those at positions `n/2 + 1` to `n`. The sum over all
    tokens averages in the easy early positions, and so hides a break. `position_nll_sums` are told only where
    `with_positions` is set (at the longest length, which covers the others), and every token was scored.
    """
    nll = measurement.nll
    every = measurement.tail is None
    size = len(nll) // 2 + 1 if measurement.tail is None else measurement.tail
    tail = nll[-size:]
    return {
        "document": documents.ids[measurement.document],
        "method": method,
        "factor": factor,
        "length": measurement.length,
        "nll_sum": math.fsum(nll),
        "tokens": len(nll),
        "tail_nll_sum": math.fsum(tail),
        "tail_tokens": len(tail),
        "position_nll_sums": position_sums(nll) if with_positions and every else None,
    }


def make_rows(
    records: Sequence[Record],
    *,
    protocol: str,
    control: Sequence[Record] = (),
    baseline: Sequence[Record] = (),
    seed: int = 0,
) -> list[dict[str, Any]]:
    """
    One row per length of one method.

    Args:
        records (`Sequence[dict]`): of the method, every document at every length.
        protocol (`str`): name of the protocol that measured them.
        control (`Sequence[dict]`, *optional*): of the control on the same tokens; without it `gain` is `None`.
        baseline (`Sequence[dict]`, *optional*): of the unpatched model; without it `change` is `None`.
        seed (`int`, *optional*, defaults to 0): of the bootstrap.
    """
    lengths = sorted({record["length"] for record in records})
    return [
        _row(_at(records, length), _at(control, length), _at(baseline, length), length, protocol, seed)
        for length in lengths
    ]


def _row(
    own: list[Record], control: list[Record], baseline: list[Record], length: int, protocol: str, seed: int
) -> dict[str, Any]:
    nll, tokens = _column(own, "nll_sum"), _column(own, "tokens")
    tail_nll, tail_tokens = _column(own, "tail_nll_sum"), _column(own, "tail_tokens")
    row: dict[str, Any] = {
        "method": own[0]["method"],
        "factor": own[0]["factor"],
        "protocol": protocol,
        "length": length,
        "perplexity": float(pooled_perplexity(nll, tokens)),
        "perplexity_tail": float(pooled_perplexity(tail_nll, tail_tokens)),
        "nll_sum": math.fsum(nll),
        "tokens": sum(tokens),
        "documents": len(own),
        "ci95": bootstrap_interval(nll, tokens, seed),
        **dict.fromkeys(
            ("perplexity_truncated", "perplexity_truncated_tail", "gain", "gain_ci95", "change", "change_ci95")
        ),
    }
    if control:
        row["perplexity_truncated"] = float(pooled_perplexity(_column(control, "nll_sum"), tokens))
        row["perplexity_truncated_tail"] = float(pooled_perplexity(_column(control, "tail_nll_sum"), tail_tokens))
        saved = _difference(_column(control, "tail_nll_sum"), tail_nll)
        row["gain"] = float(pooled_perplexity(saved, tail_tokens))
        row["gain_ci95"] = bootstrap_interval(saved, tail_tokens, seed)
    if baseline:
        added = _difference(nll, _column(baseline, "nll_sum"))
        row["change"] = float(pooled_perplexity(added, tokens)) - 1
        interval = bootstrap_interval(added, tokens, seed)
        row["change_ci95"] = interval and [end - 1 for end in interval]
    return row


def _at(records: Iterable[Record], length: int) -> list[Record]:
    return [record for record in records if record["length"] == length]


def _column(records: Iterable[Record], key: str) -> list[Any]:
    return [record[key] for record in records]


def _difference(left: Iterable[float], right: Iterable[float]) -> list[float]:
    return [a - b for a, b in zip(left, right, strict=True)]
