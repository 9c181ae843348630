"""From NLL sums per document to the rows of a result: nothing here needs a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..protocols.protocol import Measurement, PerplexityProtocol
from ..texts.tokens import TokenizedDocuments
from .positions import position_sums
from .statistics import bootstrap_interval, pooled_perplexity

Record = dict[str, Any]


@dataclass(frozen=True)
class Conditions:
    """
    How all rows of a run were measured: `Conditions.of(protocol, documents, dtype)`, once for a run.

    Args:
        protocol (`str`): name of the protocol.
        bos (`str`): where BOS stands, in words.
        dtype (`str`): of the model's weights, `"bfloat16"`.
        joined (`int`, *optional*, defaults to 1): documents behind each record; more where the protocol joins them.
    """

    protocol: str
    bos: str
    dtype: str
    joined: int = 1

    @classmethod
    def of(cls, protocol: PerplexityProtocol, documents: TokenizedDocuments, dtype: str) -> Conditions:
        """
        Args:
            protocol ([`PerplexityProtocol`]): what measures.
            documents ([`TokenizedDocuments`]): before `protocol.arrange`.
            dtype (`str`): of the model's weights.
        """
        joined = len(documents.ids) // len(protocol.arrange(documents).ids)
        rule = protocol.bos_rule(documents.bos)
        if documents.prefix:
            rule = f"{rule if documents.bos else 'none'}; {documents.prefix}"
        return cls(protocol.name, rule, dtype, joined)


def document_record(
    measurement: Measurement,
    documents: TokenizedDocuments,
    index: int,
    method: str,
    factor: float,
    *,
    with_positions: bool,
) -> Record:
    """
    What one document gave at one length, as float64 sums.

    The tail is the second half of the tokens: of `n` tokens, those at positions `n/2 + 1` to `n`. The sum over all
    tokens averages in the easy early positions, and so hides a break. `first` is told where the tokens that are
    scored follow each other, `bytes` there and of samples, and `position_nll_sums` like them where `with_positions` is
    set (at the longest length, which covers the others). Where a legacy protocol averages means, `groups` of them have
    the sum `group_mean_sum`, all of them are the tail, and there are no `position_nll_sums`.

    Args:
        measurement ([`Measurement`]): of the document.
        documents ([`TokenizedDocuments`]): as the protocol arranged them.
        index (`int`): which of them it is.
        method (`str`): label.
        factor (`float`): of the method.
        with_positions (`bool`): whether this is the longest length.
    """
    nll, first, groups = measurement.nll, measurement.first, measurement.groups
    size = len(nll) // 2 + 1 if measurement.tail is None else measurement.tail
    tail = nll if groups else nll[-size:]
    means = [] if groups is None else [part.mean() for part in np.split(nll, np.cumsum(groups)[:-1])]
    return {
        "document": documents.ids[index],
        "method": method,
        "factor": factor,
        "length": measurement.length,
        "first": first,
        "nll_sum": math.fsum(nll),
        "tokens": len(nll),
        "bytes": _bytes(documents, index, measurement),
        "tail_nll_sum": math.fsum(tail),
        "tail_tokens": len(tail),
        "groups": groups and len(groups),
        "group_mean_sum": groups and math.fsum(means),
        "position_nll_sums": position_sums(measurement) if with_positions else None,
    }


def averaged(record: Mapping[str, Any], tail: bool = False) -> tuple[float, int]:
    """A sum of NLL and its weight: the pooled quotient of these is the logarithm of the perplexity.

    They are the sum over the tokens (of the tail) and their number; of a legacy protocol that of its groups' means.
    """
    if record["groups"] is not None:
        return record["group_mean_sum"], record["groups"]
    part = "tail_" if tail else ""
    return record[f"{part}nll_sum"], record[f"{part}tokens"]


def make_rows(
    records: Sequence[Record],
    *,
    conditions: Conditions,
    control: Sequence[Record] = (),
    baseline: Sequence[Record] = (),
    seed: int = 0,
) -> list[dict[str, Any]]:
    """
    One row per length of one method.

    Args:
        records (`Sequence[dict]`): of the method, every document at every length.
        conditions ([`Conditions`]): how they were measured.
        control (`Sequence[dict]`, *optional*): of the control on the same tokens; without it `gain` is `None`.
        baseline (`Sequence[dict]`, *optional*): of the unpatched model; without it `change` is `None`.
        seed (`int`, *optional*, defaults to 0): of the bootstrap.
    """
    lengths = sorted({record["length"] for record in records})
    return [
        _row(_at(records, length), _at(control, length), _at(baseline, length), length, conditions, seed)
        for length in lengths
    ]


def _row(
    own: list[Record],
    control: list[Record],
    baseline: list[Record],
    length: int,
    conditions: Conditions,
    seed: int,
) -> dict[str, Any]:
    nll, weights = _averaged(own)
    tail_nll, tail_weights = _averaged(own, tail=True)
    row: dict[str, Any] = {
        "method": own[0]["method"],
        "factor": own[0]["factor"],
        "protocol": conditions.protocol,
        "bos": conditions.bos,
        "dtype": conditions.dtype,
        "length": length,
        "perplexity": float(pooled_perplexity(nll, weights)),
        "perplexity_tail": float(pooled_perplexity(tail_nll, tail_weights)),
        "bits_per_byte": _bits_per_byte(own),
        "nll_sum": math.fsum(record["nll_sum"] for record in own),
        "tokens": sum(record["tokens"] for record in own),
        "documents": len(own) * conditions.joined,
        "ci95": bootstrap_interval(nll, weights, seed),
        **dict.fromkeys(
            ("perplexity_truncated", "perplexity_truncated_tail", "gain", "gain_ci95", "change", "change_ci95")
        ),
    }
    if control:
        row["perplexity_truncated"] = float(pooled_perplexity(_averaged(control)[0], weights))
        truncated_tail = _averaged(control, tail=True)[0]
        row["perplexity_truncated_tail"] = float(pooled_perplexity(truncated_tail, tail_weights))
        saved = _difference(truncated_tail, tail_nll)
        row["gain"] = float(pooled_perplexity(saved, tail_weights))
        row["gain_ci95"] = bootstrap_interval(saved, tail_weights, seed)
    if baseline:
        added = _difference(nll, _averaged(baseline)[0])
        row["change"] = float(pooled_perplexity(added, weights)) - 1
        interval = bootstrap_interval(added, weights, seed)
        row["change_ci95"] = interval and [end - 1 for end in interval]
    return row


def _at(records: Iterable[Record], length: int) -> list[Record]:
    return [record for record in records if record["length"] == length]


def _averaged(records: Iterable[Record], tail: bool = False) -> tuple[list[float], list[int]]:
    """Sums and weights of several documents."""
    sums, weights = zip(*(averaged(record, tail) for record in records), strict=True)
    return list(sums), list(weights)


def _bytes(documents: TokenizedDocuments, index: int, measurement: Measurement) -> int | None:
    """UTF-8 bytes of the text of the tokens that are scored, each of them counted once."""
    first, places = measurement.first, measurement.places
    if documents.byte_ends is None:
        return None
    ends = documents.byte_ends[index].numpy()
    if first is not None:
        return int(ends[first + len(measurement.nll) - 1] - ends[first - 1])
    if places is None or (places[0] == 0 and documents.start):  # where such a row begins is not told
        return None
    return int((ends[places] - np.concatenate([[0], ends])[places]).sum())


def _bits_per_byte(records: Sequence[Record]) -> float | None:
    """NLL in bits divided by the bytes of the text that is scored: comparable between tokenizers."""
    if any(record["bytes"] is None for record in records):
        return None
    size: int = sum(record["bytes"] for record in records)
    return math.fsum(record["nll_sum"] for record in records) / math.log(2) / size if size else None


def _difference(left: Iterable[float], right: Iterable[float]) -> list[float]:
    return [a - b for a, b in zip(left, right, strict=True)]
