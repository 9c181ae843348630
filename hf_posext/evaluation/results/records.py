"""The records of results: which keys each has, and of which types. Files are decoded by them.

No annotations from the future: as text they would hide from `TypedDict` which keys are not required.
"""

from typing import NotRequired, TypedDict

Interval = list[float | None]
"""Both ends of a 95 % interval; an end that is not finite is `None`."""


class Row(TypedDict):
    """One method at one length; see the table in [`compare`]. LongPPL and passkeys are there if asked for."""

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
    longppl: NotRequired[float | None]
    longppl_ci95: NotRequired[Interval | None]
    longppl_truncated: NotRequired[float | None]
    key_tokens: NotRequired[int | None]
    passkey: NotRequired[float | None]
    passkey_trials: NotRequired[int]


class DocumentRecord(TypedDict):
    """Sums of one document, method and length; see [`document_record`]. Key tokens are there if asked for."""

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
    key_nll_sum: NotRequired[float | None]
    key_tokens: NotRequired[int | None]


class RetrievalRow(TypedDict):
    """One method, task, length and depth, as [`retrieval`] gives them."""

    method: str
    factor: float
    task: str
    length: int
    depth: float | None
    accuracy: float | None
    trials: int


def required(record: type) -> tuple[str, ...]:
    """Keys that every such record has, in their order."""
    return tuple(key for key in record.__annotations__ if key in record.__required_keys__)  # type: ignore[attr-defined]
