"""From documents to equally long rows of tokens: the same tokens for every method and every length."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch

from ...errors import DocumentError, InvalidParameterError
from .documents import Document
from .encoding import encode_documents

logger = logging.getLogger(__name__)

Bos = Literal["auto", "always", "never"]
"""Rule for BOS before every text: the tokenizer's own, always, or never."""


@dataclass(frozen=True)
class TokenizedDocuments:
    """
    The first `length` tokens of every document that is long enough.

    Args:
        ids (`list[str]`): of the documents.
        tokens (`torch.LongTensor` of shape `(documents, length)`): the rows, the special prefix included.
        bos (`int`): tokens of the special prefix, with which each row begins; they are read, and not scored.
        counts (`list[int]`): tokens that each document has, the prefix and what `start` leaves out included.
        left_out (`list[dict]`): `document` and `tokens` of those that are too short.
        byte_ends (`torch.LongTensor` of shape `(documents, length)`, *optional*): UTF-8 bytes of the document from its
            beginning to the end of each token, so that differences are bytes of text; at the prefix, where the row
            begins in the document (0 unless `start` leaves tokens out). `None` where the tokenizer gives no offsets
            (slow ones).
        start (`int`, *optional*, defaults to 0): tokens that are left out at the beginning of each document.
        prefix (`str`, *optional*): the special prefix in words, where it is not the BOS that the tokenizer adds.
    """

    ids: list[str]
    tokens: torch.Tensor
    bos: int
    counts: list[int] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    byte_ends: torch.Tensor | None = None
    start: int = 0
    prefix: str = ""

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


def special_prefix(tokenizer: Any, bos: Bos = "auto") -> list[int]:
    """
    Return the special tokens that stand before every text: `[gMASK]<sop>`, a class token, BOS, or nothing.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        bos (`str`, *optional*, defaults to `"auto"`): `"auto"` for what the tokenizer adds; `"always"` for BOS also
            where the tokenizer has lost it; `"never"` for nothing.

    Raises:
        InvalidParameterError: `"always"`, and the tokenizer has no BOS token; or another value.
    """
    if bos not in get_args(Bos):
        raise InvalidParameterError(f"Expected bos to be one of {', '.join(get_args(Bos))}, got {bos!r}.")
    if bos == "never":
        return []
    added = special_tokens(tokenizer)[0]
    if bos == "auto" or tokenizer.bos_token_id in added:
        return added
    if tokenizer.bos_token_id is None:
        raise InvalidParameterError(
            "bos is 'always', and the tokenizer has no BOS token; set tokenizer.bos_token, or pass bos='auto'"
        )
    return [tokenizer.bos_token_id, *added]


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return what a tokenizer puts before and after a text by itself: `[CLS]` and `[SEP]`, or nothing and `</s>`."""
    plain, whole = token_ids(tokenizer, "a"), tokenizer("a")["input_ids"]
    begin = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), None)
    if begin is None:
        raise InvalidParameterError(
            f"{type(tokenizer).__name__} tokenizes a text differently with special tokens around it; expected "
            f"{plain} within {whole}"
        )
    return whole[:begin], whole[begin + len(plain) :]


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
    documents: Sequence[Document], tokenizer: Any, length: int, start: int = 0, bos: Bos = "auto"
) -> TokenizedDocuments:
    """
    Cut every document to `special prefix + tokens[start:]`, first `length` tokens.

    The prefix stands there once, also where the text begins with it.

    Args:
        documents (`Sequence[Document]`): the texts.
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        length (`int`): tokens per row.
        start (`int`, *optional*, defaults to 0): tokens to leave out at the beginning of each document (front matter).
        bos (`str`, *optional*, defaults to `"auto"`): as in [`special_prefix`].

    Raises:
        DocumentError: no documents, or none is long enough.
        InvalidParameterError: a negative `start`.
    """
    if start < 0:
        raise InvalidParameterError(f"start is {start}; give the number of tokens to leave out, 0 or more")
    if not documents:
        raise DocumentError("there are no documents; give one or more, as load_documents(...) reads them")
    prefix = np.array(special_prefix(tokenizer, bos), dtype=np.int64)
    ids, rows, byte_ends, counts = [], [], [], []
    left_out: list[dict[str, Any]] = []
    for document, encoded in zip(documents, encode_documents(documents, tokenizer), strict=True):
        own = leading(encoded.ids, prefix)
        count = len(prefix) + len(encoded.ids) - own
        if count - start < length:
            left_out.append({"document": document.id, "tokens": count})
            continue
        part = slice(own + start, own + start + length - len(prefix))
        ids.append(document.id)
        rows.append(np.concatenate([prefix, encoded.ids[part]]))
        counts.append(count)
        if encoded.ends is not None:
            begins = encoded.ends[part.start - 1] if part.start else 0
            byte_ends.append(np.concatenate([np.full(len(prefix), begins), encoded.ends[part]]))
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
    words = _prefix_in_words(tokenizer, prefix.tolist(), bos)
    return TokenizedDocuments(ids, _table(rows), len(prefix), counts, left_out, ends, start, words)


def leading(ids: np.ndarray, prefix: np.ndarray) -> int:
    """Return how many of the first tokens of a text are of the special prefix, which is put before it anyway."""
    others = np.flatnonzero(~np.isin(ids, prefix)) if len(prefix) else [0]
    return int(others[0]) if len(others) else len(ids)


def _prefix_in_words(tokenizer: Any, prefix: list[int], bos: Bos) -> str:
    added = special_tokens(tokenizer)[0]
    if prefix == added:
        if prefix in ([], [tokenizer.bos_token_id]):
            return ""
        return f"special prefix {''.join(map(str, tokenizer.convert_ids_to_tokens(prefix)))}"
    return f"bos={bos!r}; the tokenizer adds {'one' if added else 'none'}"


def _table(rows: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(rows).astype(np.int64))
