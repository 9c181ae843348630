"""Rows of a result from NLL sums per document: records, statistics, and the gain by position.

Nothing here needs a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike

from ..decode import OptionalKey, Record
from .tokens import TokenizedDocuments
from .windows import Measurement, PerplexityProtocol

Interval = list[float | None]
"""Ends of a 95 % interval. A non-finite end is `None`."""


class Row(Record):
    """Row of one method at one length; see the table in [`compare`]. LongPPL and passkeys are optional."""

    method: str
    factor: float
    protocol: str
    bos: str
    dtype: str
    length: int
    perplexity: float | None
    perplexity_tail: float | None
    bits_per_byte: float | None
    nll_sum: float | None
    tokens: int
    documents: int
    ci95: Interval | None
    perplexity_truncated: float | None
    perplexity_truncated_tail: float | None
    gain: float | None
    gain_ci95: Interval | None
    change: float | None
    change_ci95: Interval | None
    longppl: float | None = OptionalKey()
    longppl_ci95: Interval | None = OptionalKey()
    longppl_truncated: float | None = OptionalKey()
    key_tokens: int | None = OptionalKey()
    passkey: float | None = OptionalKey()
    passkey_trials: int = OptionalKey()


class DocumentRecord(Record):
    """Sums of one document, method, and length; see [`document_record`]. Key tokens are optional."""

    document: str
    method: str
    factor: float
    length: int
    first: int | None
    nll_sum: float | None
    tokens: int
    bytes: int | None
    tail_nll_sum: float | None
    tail_tokens: int
    groups: int | None
    group_mean_sum: float | None
    position_nll_sums: list[float] | None
    key_nll_sum: float | None = OptionalKey()
    key_tokens: int | None = OptionalKey()


class RetrievalRow(Record):
    """Row of one method, task, length, and depth, as in [`retrieval`]."""

    method: str
    factor: float
    task: str
    length: int
    depth: float | None
    accuracy: float | None
    trials: int


def title(label: str, factor: float) -> str:
    """Return the label of a method with its factor, such as `"yarn x8"`. A factor of 1 is omitted."""
    return label if factor == 1 else f"{label} x{factor:g}"


CONFIDENCE = 0.95
RESAMPLES = 9_999


def pooled_perplexity(nll_sums: Any, tokens: Any, axis: int = -1) -> Any:
    """Return `exp(sum of NLL / sum of tokens)`. Every token of every document has equal weight.

    It is not the mean of the documents' perplexities. For sums of NLL *differences* over the same tokens, the value is
    the ratio of two perplexities. Both arrays have shape `(..., documents)` by default, and `axis` is the axis of
    documents. NLL is in nats and summed in float64.
    """
    with np.errstate(over="ignore"):  # the perplexity of a broken model may be infinite; files contain null
        return np.exp(np.sum(nll_sums, axis=axis, dtype=np.float64) / np.sum(tokens, axis=axis))


def share_interval(share: float, trials: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share of independent trials. For 5 of 5 its lower end is 57 %."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    middle = share + z**2 / (2 * trials)
    half = z * ((share * (1 - share) + z**2 / (4 * trials)) / trials) ** 0.5
    scale = 1 + z**2 / trials
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def bootstrap_interval(nll_sums: ArrayLike, tokens: ArrayLike, seed: int) -> list[float] | None:
    """Return the 95 % bootstrap interval of [`pooled_perplexity`] over documents; `None` for a single document.

    Documents are independent, but tokens of one document are not. Pass differences of NLL sums for the interval of a
    ratio of two perplexities on the same tokens. The differences are paired by document, which removes the difficulty
    of each document. The method is percentile, not BCa. BCa estimates an acceleration from a jackknife over documents,
    which is noise at the usual eight documents and undefined if documents agree. With few documents the interval is
    somewhat too narrow.
    """
    sums = np.asarray(nll_sums, dtype=np.float64)
    if len(sums) < 2:
        return None
    from scipy.stats import bootstrap

    interval = bootstrap(
        (sums, np.asarray(tokens)),
        pooled_perplexity,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return [float(interval.low), float(interval.high)]


STRETCHES = 16
"""Number of stretches. Eight documents of 4,096 tokens still put 2,048 tokens into each stretch."""


class StretchGain(NamedTuple):
    """Gain of a method over the control on tokens `begin` to `end` (exclusive) of every document."""

    begin: int
    end: int
    gain: float
    gain_ci95: list[float] | None


def stretch_bounds(first: int, scored: int) -> np.ndarray:
    """Return the bounds of the stretches in tokens, of shape (17,).

    They divide the tokens from the one before the first scored token on. If every token but token 0 is scored, they
    divide the whole document.
    """
    return first - 1 + np.arange(STRETCHES + 1) * (scored + 1) // STRETCHES


def position_sums(measurement: Measurement) -> list[float] | None:
    """Return the NLL sum of each stretch, or `None`.

    There are no sums if scored tokens overlap, if a sample does not divide evenly into stretches, or if the protocol
    weights tokens unequally, because the gain by stretch weights them equally.
    """
    nll = measurement.nll
    if measurement.places is not None and len(nll) % STRETCHES == 0:
        return [float(part.sum()) for part in np.split(nll, STRETCHES)]
    if measurement.first is None or measurement.groups is not None:
        return None
    bounds = np.maximum(stretch_bounds(0, len(nll)), 0)
    return [float(nll[begin:end].sum()) for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]


def stretches(record: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds (17,) of the stretches of a record, and the number of scored tokens (16,) of each."""
    first, scored, every = record["first"], record["tokens"], np.arange(STRETCHES + 1)
    if first is None:  # a sample is spread evenly over the document
        return every * record["length"] // STRETCHES, np.diff(every * scored // STRETCHES)
    bounds = stretch_bounds(first, scored)
    return bounds, np.diff(np.maximum(bounds, first))


def gain_by_position(
    records: Sequence[Mapping[str, Any]], control: Sequence[Mapping[str, Any]], seed: int
) -> list[StretchGain]:
    """Return the gain over the control in each stretch of the documents, with paired intervals.

    The gain is `exp` of the NLL saved by the longer context, averaged over the tokens of a stretch in all documents.
    Records are of the longest length, with `position_nll_sums`. The control's records are of the same documents in the
    same order.
    """
    bounds, counts = stretches(records[0])
    truncated, extended = (np.array([record["position_nll_sums"] for record in group]) for group in (control, records))
    gains = []
    for begin, end, count, saved in zip(bounds[:-1], bounds[1:], counts, (truncated - extended).T, strict=True):
        if count:
            tokens = [int(count)] * len(records)
            interval = bootstrap_interval(saved, tokens, seed)
            gains.append(StretchGain(int(begin), int(end), float(pooled_perplexity(saved, tokens)), interval))
    return gains


@dataclass(frozen=True)
class Conditions:
    """Conditions shared by all rows of a run: protocol, BOS rule in words, and dtype of the weights.

    Each record covers `joined` documents: more than one if the protocol joins them.
    """

    protocol: str
    bos: str
    dtype: str
    joined: int = 1

    @classmethod
    def of(cls, protocol: PerplexityProtocol, documents: TokenizedDocuments, dtype: str) -> Self:
        """Return the conditions of a run on documents before `protocol.arrange`."""
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
) -> DocumentRecord:
    """Return the sums of one document at one length, in float64.

    The tail is the second half of the tokens: of `n` tokens, those at positions `n/2 + 1` to `n`. The sum over all
    tokens includes the early positions, which hide a failure at late ones. `first` is `None` unless the scored tokens
    are contiguous. `bytes` is `None` unless they are contiguous or a sample, and byte offsets are known.
    `position_nll_sums` also requires `with_positions`, which is set at the longest length, because that covers the
    shorter ones. A legacy protocol averages the means of token groups: `groups` is their number, `group_mean_sum` the
    sum of their means, and all tokens are the tail. Its records have no `position_nll_sums`.
    """
    nll, first, groups = measurement.nll, measurement.first, measurement.groups
    size = len(nll) // 2 + 1 if measurement.tail is None else measurement.tail
    tail = nll if groups else nll[-size:]
    means = [] if groups is None else [part.mean() for part in np.split(nll, np.cumsum(groups)[:-1])]
    return DocumentRecord(
        document=documents.ids[index],
        method=method,
        factor=factor,
        length=measurement.length,
        first=first,
        nll_sum=math.fsum(nll),
        tokens=len(nll),
        bytes=_bytes(documents, index, measurement),
        tail_nll_sum=math.fsum(tail),
        tail_tokens=len(tail),
        groups=groups and len(groups),
        group_mean_sum=groups and math.fsum(means),
        position_nll_sums=position_sums(measurement) if with_positions else None,
    )


def averaged(record: Mapping[str, Any], tail: bool = False) -> tuple[float, int]:
    """Return a sum of NLL and its weight. Their pooled quotient is the logarithm of the perplexity.

    They are the sum over all tokens (or over the tail) and the number of tokens. For a legacy protocol they are the
    sum of the group means and the number of groups.
    """
    if record["groups"] is not None:
        return record["group_mean_sum"], record["groups"]
    part = "tail_" if tail else ""
    return record[f"{part}nll_sum"], record[f"{part}tokens"]


def make_rows(
    records: Sequence[DocumentRecord],
    *,
    conditions: Conditions,
    control: Sequence[DocumentRecord] = (),
    baseline: Sequence[DocumentRecord] = (),
    seed: int = 0,
) -> list[Row]:
    """Return one row per length of one method, from its records of every document at every length.

    Without records of the control, `gain` is `None`. Without records of the unpatched model (`baseline`), `change` is
    `None`.
    """
    lengths = sorted({record["length"] for record in records})
    return [
        _row(_at(records, length), _at(control, length), _at(baseline, length), length, conditions, seed)
        for length in lengths
    ]


def _row(
    records: list[DocumentRecord],
    control: list[DocumentRecord],
    baseline: list[DocumentRecord],
    length: int,
    conditions: Conditions,
    seed: int,
) -> Row:
    nll, weights = _averaged(records)
    tail_nll, tail_weights = _averaged(records, tail=True)
    row = Row(
        method=records[0]["method"],
        factor=records[0]["factor"],
        protocol=conditions.protocol,
        bos=conditions.bos,
        dtype=conditions.dtype,
        length=length,
        perplexity=float(pooled_perplexity(nll, weights)),
        perplexity_tail=float(pooled_perplexity(tail_nll, tail_weights)),
        bits_per_byte=_bits_per_byte(records),
        nll_sum=math.fsum(record["nll_sum"] for record in records),
        tokens=sum(record["tokens"] for record in records),
        documents=len(records) * conditions.joined,
        ci95=bootstrap_interval(nll, weights, seed),
        **dict.fromkeys(
            ("perplexity_truncated", "perplexity_truncated_tail", "gain", "gain_ci95", "change", "change_ci95")
        ),
    )
    if control:
        row["perplexity_truncated"] = float(pooled_perplexity(_averaged(control)[0], weights))
        truncated_tail = _averaged(control, tail=True)[0]
        row["perplexity_truncated_tail"] = float(pooled_perplexity(truncated_tail, tail_weights))
        saved = truncated_tail - tail_nll
        row["gain"] = float(pooled_perplexity(saved, tail_weights))
        row["gain_ci95"] = bootstrap_interval(saved, tail_weights, seed)
    if baseline:
        added = nll - _averaged(baseline)[0]
        row["change"] = float(pooled_perplexity(added, weights)) - 1
        interval = bootstrap_interval(added, weights, seed)
        row["change_ci95"] = interval and [end - 1 for end in interval]
    return row


def _at(records: Iterable[DocumentRecord], length: int) -> list[DocumentRecord]:
    return [record for record in records if record["length"] == length]


def _averaged(records: Iterable[DocumentRecord], tail: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return the NLL sums and weights of several records."""
    sums, weights = zip(*(averaged(record, tail) for record in records), strict=True)
    return np.array(sums), np.array(weights)


def _bytes(documents: TokenizedDocuments, index: int, measurement: Measurement) -> int | None:
    """Return the UTF-8 bytes of the text of the scored tokens, each counted once."""
    first, places = measurement.first, measurement.places
    if documents.byte_ends is None:
        return None
    ends = documents.byte_ends[index].numpy()
    if first is not None:
        return int(ends[first + len(measurement.nll) - 1] - ends[first - 1])
    if places is None or (places[0] == 0 and documents.start):  # the byte offset of the row's first token is unknown
        return None
    return int((ends[places] - np.concatenate([[0], ends])[places]).sum())


def _bits_per_byte(records: Sequence[DocumentRecord]) -> float | None:
    """Return the NLL in bits per byte of scored text, which is comparable between tokenizers."""
    if any(record["bytes"] is None for record in records):
        return None
    size: int = sum(record["bytes"] for record in records)
    return math.fsum(record["nll_sum"] for record in records) / math.log(2) / size if size else None


def key_sums(nll: np.ndarray, indices: Sequence[int], first: int = 1) -> dict[str, Any]:
    """Return the NLL sum (float64, in nats) and the number of a document's key tokens.

    `nll` contains the values of tokens `first`, `first + 1`, ... of the document's row.
    """
    return {"key_nll_sum": math.fsum(nll[index - first] for index in indices), "key_tokens": len(indices)}


def longppl_cells(
    records: Sequence[DocumentRecord], control: Sequence[DocumentRecord], length: int, seed: int
) -> dict[str, Any]:
    """Return the LongPPL entries of a row; `None` if key tokens are unknown.

    Records contain the [`key_sums`] of each document at the longest length, and `None` at all other lengths.
    """
    at_length = _at(records, length)
    sums, counts = columns_of(at_length, "key_nll_sum", "key_tokens")
    control_sums, _ = columns_of(_at(control, length), "key_nll_sum", "key_tokens")
    known = any(record["key_tokens"] is not None for record in at_length)
    return {
        "longppl": float(pooled_perplexity(sums, counts)) if counts else None,
        "longppl_ci95": bootstrap_interval(sums, counts, seed) if counts else None,
        "longppl_truncated": float(pooled_perplexity(control_sums, counts)) if control_sums else None,
        "key_tokens": sum(counts) if known else None,
    }


def columns_of(records: Iterable[Mapping[str, Any]], nll: str, tokens: str) -> tuple[list[float], list[int]]:
    """Return the NLL sums and the token counts of the documents that have such tokens."""
    counted = [record for record in records if record[tokens]]
    return [record[nll] for record in counted], [record[tokens] for record in counted]
