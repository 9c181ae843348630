"""Documents in the tokens of another tokenizer, and which tokens of one lie in tokens of the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...errors import InvalidParameterError
from .documents import Document
from .tokens import TokenizedDocuments, leading, special_prefix


@dataclass(frozen=True)
class TokensRead:
    """
    The rows of the measured models as an evaluator reads them: as they are, or in tokens of its own.

    Args:
        ids (`list[str]`): of the documents.
        rows (`list[torch.LongTensor]`): of shape `(tokens,)` each, of any lengths.
        bos (`int`): tokens of the special prefix, with which each begins.
        carry (`Callable[[int, numpy.ndarray], numpy.ndarray]`): from the index of a document and indices in the
            evaluator's row to those in the row of the measured models.
    """

    ids: list[str]
    rows: list[torch.Tensor]
    bos: int
    carry: Callable[[int, np.ndarray], np.ndarray] = lambda index, keys: keys


def read_by(
    evaluator_tokenizer: Any, tokenizer: Any, texts: Iterable[Document], rows: TokenizedDocuments
) -> TokensRead:
    """
    The rows for an evaluator.

    Args:
        evaluator_tokenizer (`PreTrainedTokenizerBase`, *optional*): its own, where it has another.
        tokenizer (`PreTrainedTokenizerBase`): of the measured models.
        texts (`Iterable[Document]`): the documents.
        rows ([`TokenizedDocuments`]): of the measured models.

    Raises:
        InvalidParameterError: two tokenizers of which one gives no offsets.
    """
    if evaluator_tokenizer is None or _are_same(evaluator_tokenizer, tokenizer):
        return TokensRead(rows.ids, list(rows.tokens), rows.bos)
    for own in (tokenizer, evaluator_tokenizer):
        if not own.is_fast:
            raise InvalidParameterError(
                f"{type(own).__name__} gives no character offsets, so key tokens cannot be carried between it and "
                "another tokenizer; use a fast tokenizer, or an evaluator with the same tokenizer"
            )
    text_of = {document.id: document.text for document in texts}
    first, prefix = int(rows.bos), special_prefix(evaluator_tokenizer)
    own_rows, aligned = [], []
    for id, row in zip(rows.ids, rows.tokens, strict=True):
        ids, spans = _offsets(tokenizer, text_of[id])
        skipped = rows.start + leading(ids, row[:first].numpy())
        begin = int(spans[skipped - 1, 1]) if skipped else 0
        spans = np.maximum(spans[skipped : skipped + rows.length - first] - begin, 0)
        covered = text_of[id][begin : begin + spans[-1, 1]]
        others, other_spans = _offsets(evaluator_tokenizer, covered)
        own_rows.append(torch.tensor([*prefix, *others.tolist()], device="cpu"))
        aligned.append((covered, spans, other_spans))

    def carry(index: int, keys: np.ndarray) -> np.ndarray:
        covered, spans, other_spans = aligned[index]
        carried = np.flatnonzero(tokens_inside(spans, other_spans[keys - len(prefix)], covered)) + first
        return carried[carried >= max(1, first)]  # neither the prefix nor token 0 is scored

    return TokensRead(rows.ids, own_rows, len(prefix), carry)


def tokens_inside(offsets: np.ndarray, spans: np.ndarray, text: str) -> np.ndarray:
    """
    Which tokens lie, but for white space, inside spans of characters.

    Args:
        offsets (`numpy.ndarray` of shape `(tokens, 2)`): first character and one past the last, of each token.
        spans (`numpy.ndarray` of shape `(spans, 2)`): the same, of the spans; in any order, also overlapping.
        text (`str`): what the characters are of.

    Returns:
        `numpy.ndarray` of shape `(tokens,)`, bool. A token that shares no character with the spans is in none of them.
    """
    covered = np.zeros(len(text), dtype=bool)
    for begin, end in spans:
        covered[begin:end] = True
    is_space = np.fromiter((character.isspace() for character in text), dtype=bool, count=len(text))
    inside, outside = (np.concatenate([[0], np.cumsum(mask)]) for mask in (covered, ~covered & ~is_space))
    begins, ends = offsets[:, 0], offsets[:, 1]
    result: np.ndarray = (inside[ends] > inside[begins]) & (outside[ends] == outside[begins])
    return result


def _offsets(tokenizer: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a text without special ones, and their characters, `(tokens, 2)`."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return np.array(encoded["input_ids"], dtype=np.int64), spans


def _are_same(one: Any, other: Any) -> bool:
    """Whether two tokenizers give the same tokens, also where they were loaded from different places."""
    if one is other or not (one.is_fast and other.is_fast):
        return one is other
    for tokenizer in (one, other):
        tokenizer("a", verbose=False)  # clears what an earlier call left of padding and truncation
    same: bool = one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
    return same
