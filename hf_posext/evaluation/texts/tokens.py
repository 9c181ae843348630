"""From documents to equally long rows of tokens: the same tokens for every method and every length."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ...errors import DocumentError, InvalidParameterError
from .documents import Document
from .encoding import encode_documents

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizedDocuments:
    """
    The first `length` tokens of every document that is long enough.

    Args:
        ids (`list[str]`): of the documents.
        tokens (`torch.LongTensor` of shape `(documents, length)`): the rows, the BOS token included.
        bos (`bool`): whether each row begins with BOS: if, and only if, the tokenizer adds one by itself.
        counts (`list[int]`): tokens that each document has, BOS and what `start` leaves out included.
        left_out (`list[dict]`): `document` and `tokens` of those that are too short.
        byte_ends (`torch.LongTensor` of shape `(documents, length)`, *optional*): UTF-8 bytes of the document from its
            beginning to the end of each token, so that differences are bytes of text; at BOS, where the row begins in
            the document (0 unless `start` leaves tokens out). `None` where the tokenizer gives no offsets (slow ones).
        start (`int`, *optional*, defaults to 0): tokens that are left out at the beginning of each document.
    """

    ids: list[str]
    tokens: torch.Tensor
    bos: bool
    counts: list[int] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    byte_ends: torch.Tensor | None = None
    start: int = 0

    def __post_init__(self) -> None:
        if len(set(self.ids)) != len(self.ids):  # tasks, journals and results are keyed by them
            raise ValueError(f"Expected unique document ids, got {self.ids}. Pass documents through as_documents().")

    @property
    def length(self) -> int:
        """Tokens per row."""
        return self.tokens.shape[1]


def check_lengths(lengths: Sequence[int]) -> list[int]:
    """
    Context lengths to measure at, ascending.

    Args:
        lengths (`Sequence[int]`): in tokens, each 2 or more (of one token nothing can be scored).

    Raises:
        InvalidParameterError: none, not whole numbers, below 2, or one twice.
    """
    if not lengths or any(not isinstance(n, int) or isinstance(n, bool) or n < 2 for n in lengths):
        raise InvalidParameterError(
            f"lengths is {list(lengths)}; give whole numbers of tokens, 2 or more, as in lengths=[512, 1024]"
        )
    if len(set(lengths)) != len(lengths):
        raise InvalidParameterError(f"lengths {list(lengths)} has one twice; give each once")
    return sorted(lengths)


def adds_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer puts its BOS token before a text by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text without special ones (`verbose=False`: no warning about the model's length)."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def check_vocabulary(
    model: Any,
    rows: Iterable[torch.Tensor],
    name: str = "the model",
    remedy: str = "load both from the same checkpoint",
) -> None:
    """
    Refuse tokens that a model does not have: their tokenizer is another's.

    Args:
        model (`PreTrainedModel`): that is to read them.
        rows (`Iterable[torch.LongTensor]`): the tokens.
        name (`str`, *optional*): of the model, in the message.
        remedy (`str`, *optional*): what the message says to do.

    Raises:
        InvalidParameterError: a token is not below the number of embeddings.
    """
    largest, vocabulary = max(int(row.max()) for row in rows), model.get_input_embeddings().num_embeddings
    if largest >= vocabulary:
        raise InvalidParameterError(f"the tokenizer gave token {largest}, and {name} has {vocabulary}; {remedy}")


def tokenize_documents(
    documents: Sequence[Document], tokenizer: Any, length: int, start: int = 0
) -> TokenizedDocuments:
    """
    Cut every document to `[BOS, if the tokenizer adds one] + tokens[start:]`, first `length` tokens.

    A row begins with one BOS, also where the text begins with it, or the tokenizer adds it twice.

    Args:
        documents (`Sequence[Document]`): the texts.
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        length (`int`): tokens per row.
        start (`int`, *optional*, defaults to 0): tokens to leave out at the beginning of each document (front matter).

    Raises:
        DocumentError: no documents, or none is long enough.
        InvalidParameterError: a negative `start`.
    """
    if start < 0:
        raise InvalidParameterError(f"start is {start}; give the number of tokens to leave out, 0 or more")
    if not documents:
        raise DocumentError("there are no documents; give one or more, as load_documents(...) reads them")
    bos = np.array([tokenizer.bos_token_id] if adds_bos(tokenizer) else [], dtype=np.int64)
    ids, rows, byte_ends, counts = [], [], [], []
    left_out: list[dict[str, Any]] = []
    for document, encoded in zip(documents, encode_documents(documents, tokenizer), strict=True):
        own = leading(encoded.ids, bos)
        count = len(bos) + len(encoded.ids) - own
        if count - start < length:
            left_out.append({"document": document.id, "tokens": count})
            continue
        part = slice(own + start, own + start + length - len(bos))
        ids.append(document.id)
        rows.append(np.concatenate([bos, encoded.ids[part]]))
        counts.append(count)
        if encoded.ends is not None:
            begins = encoded.ends[part.start - 1] if part.start else 0
            byte_ends.append(np.concatenate([np.full(len(bos), begins), encoded.ends[part]]))
    if not rows:
        longest = max((entry["tokens"] for entry in left_out), default=0)
        usable = max(0, longest - start)
        raise DocumentError(
            f"all {len(documents)} documents are too short: the longest has {longest} tokens, and start + length is "
            f"{start} + {length}; use lengths up to {usable}, or longer documents"
        )
    if left_out:
        logger.warning(
            "%d of %d documents are too short for %d tokens; left out", len(left_out), len(documents), length
        )
    ends = _table(byte_ends) if byte_ends else None
    return TokenizedDocuments(ids, _table(rows), len(bos) == 1, counts, left_out, ends, start)


def leading(ids: np.ndarray, bos: np.ndarray) -> int:
    """How many of the first tokens of a text are BOS, where one is put before it anyway."""
    others = np.flatnonzero(ids != bos[0]) if len(bos) else [0]
    return int(others[0]) if len(others) else len(ids)


def _table(rows: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(rows).astype(np.int64))
