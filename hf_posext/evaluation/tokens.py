"""Tokenization of documents into rows of equal length, with the same tokens for every method and length."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from filelock import FileLock

from ..decode import check_type
from ..errors import DocumentError, InvalidParameterError
from ..patching.checkpoint import require_vocabulary
from .documents import Document

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of the cached columns. Changing it invalidates every cached file."""


class Encoded(NamedTuple):
    """Tokens of one text, without special ones.

    Args:
        ids (`np.ndarray` of shape `(tokens,)`): token ids, int32.
        ends (`np.ndarray` of shape `(tokens,)`, *optional*): UTF-8 bytes of the text up to the end of each token,
            int64; `None` for a slow tokenizer, which returns no offsets.
    """

    ids: np.ndarray
    ends: np.ndarray | None


def encode(tokenizer: Any, text: str) -> Encoded:
    """Return the tokens of a text without special tokens, and the byte offset at which each ends.

    The bytes of a character split into several tokens count for the first of them. Text that the tokenizer drops
    counts for the next token.
    """
    if not getattr(tokenizer, "is_fast", False):
        return Encoded(np.array(token_ids(tokenizer, text), dtype=np.int32), None)
    ids, spans = with_offsets(tokenizer, text)
    return Encoded(ids.astype(np.int32), bytes_before(text)[spans[:, 1]])


def with_offsets(tokenizer: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of a text without special tokens, and the characters `(tokens, 2)` of each; int64."""
    encoded = tokenizer(
        text, add_special_tokens=False, verbose=False, return_offsets_mapping=True, return_attention_mask=False
    )
    spans = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return np.array(encoded["input_ids"], dtype=np.int64), spans


def bytes_before(text: str) -> np.ndarray:
    """Return the UTF-8 bytes before each character of a text, and in total; int64, of shape `(characters + 1,)`."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (codes > 0x7F).astype(np.uint8) + (codes > 0x7FF) + (codes > 0xFFFF)
    total = np.zeros(len(codes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=total[1:])
    return total


def encode_documents(documents: Sequence[Document], tokenizer: Any) -> Iterator[Encoded]:
    """Yield the tokens of every document, in order.

    Tokens are cached in the cache of `datasets` under a fingerprint of the texts and the tokenizer, so the next run
    does not tokenize. If several processes need the same tokens, the first tokenizes while the rest wait and then
    read. With `datasets.disable_caching()`, or if the cache cannot be written, tokens are kept in memory.
    """
    import datasets

    def encode_one(index: int) -> dict[str, Any]:
        encoded = encode(tokenizer, documents[index].text)
        return {"ids": encoded.ids, **({} if encoded.ends is None else {"ends": encoded.ends})}

    def encode_all(**options: Any) -> Any:
        # Indices instead of texts: texts would be copied, and an Arrow column of texts is limited to 2 GB.
        rows = datasets.Dataset.from_dict({"index": range(len(documents))})
        return rows.map(
            encode_one,
            input_columns="index",
            remove_columns="index",
            writer_batch_size=16,  # small, because rows not yet written are in memory and texts are long
            desc="tokenizing",
            **options,
        )

    fingerprint = _fingerprint(documents, tokenizer) if datasets.is_caching_enabled() else None
    if fingerprint is None:
        table = encode_all(keep_in_memory=True, new_fingerprint="uncached")
    else:
        path = Path(datasets.config.HF_DATASETS_CACHE) / "hf_posext" / f"tokens-{fingerprint}.arrow"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with nullcontext() if path.exists() else FileLock(f"{path}.lock"):
                table = encode_all(cache_file_name=str(path), new_fingerprint=fingerprint)
        except (OSError, ValueError) as error:  # Arrow raises a ValueError for a truncated file
            logger.warning("tokens cannot be kept at %s (%s); they are made again", path, error)
            table = encode_all(keep_in_memory=True, new_fingerprint=fingerprint)
    for row in table.with_format("numpy"):
        yield Encoded(row["ids"], row.get("ends"))


def _fingerprint(documents: Sequence[Document], tokenizer: Any) -> str | None:
    """Return a fingerprint of everything the tokens depend on; `None` if the tokenizer cannot be pickled."""
    from datasets.fingerprint import Hasher

    try:
        state = _state(tokenizer) if getattr(tokenizer, "is_fast", False) else Hasher.hash(tokenizer)
    except Exception as error:
        logger.warning("tokens are not cached, since the tokenizer cannot be pickled (%s)", error)
        return None
    kind = f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"
    versions = [metadata.version(package) for package in ("tokenizers", "transformers")]
    digest = hashlib.sha256()
    digest.update(json.dumps([FORMAT, versions, kind, getattr(tokenizer, "split_special_tokens", False)]).encode())
    for text in (state, *(document.text for document in documents)):
        content = text.encode()
        digest.update(b"%d:" % len(content))  # the size separates texts that would otherwise be ambiguous
        digest.update(content)
    return digest.hexdigest()


def _state(tokenizer: Any) -> str:
    """Return all settings and the vocabulary of a fast tokenizer as text."""
    tokenizer("a", verbose=False)  # resets padding and truncation of earlier calls, which are part of the state
    state: str = tokenizer.backend_tokenizer.to_str()
    return state


Bos = Literal["auto", "always", "never"]
"""Rule for BOS before every text: the tokenizer's default, always, or never."""


@dataclass(frozen=True)
class TokenizedDocuments:
    """The first `length` tokens of every document that is long enough.

    Args:
        ids (`list[str]`): ids of the documents.
        tokens (`torch.LongTensor` of shape `(documents, length)`): rows, including the special prefix.
        bos (`int`): number of tokens in the special prefix of each row. They are read but not scored.
        counts (`list[int]`, *optional*): tokens of each document, including the prefix and the tokens skipped by
            `start`.
        left_out (`list[dict]`, *optional*): `document` and `tokens` of each document that is too short.
        byte_ends (`torch.LongTensor` of shape `(documents, length)`, *optional*): UTF-8 bytes of the document from its
            beginning to the end of each token. Differences are bytes of text. For tokens of the prefix, it is the
            offset at which the row begins in the document (0 unless `start` skips tokens). `None` for a slow
            tokenizer, which returns no offsets.
        start (`int`, *optional*, defaults to 0): tokens skipped at the beginning of each document.
        prefix (`str`, *optional*, defaults to `""`): description of the special prefix, unless it is empty or BOS by
            the tokenizer's default.
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
        if len(set(self.ids)) != len(self.ids):  # tasks, journals, and results are keyed by id
            raise ValueError(f"Expected unique document ids, got {self.ids}. Pass documents through as_documents().")

    @property
    def length(self) -> int:
        """Number of tokens per row."""
        return self.tokens.shape[1]


def check_lengths(lengths: Sequence[int]) -> list[int]:
    """Return the context lengths in tokens, checked and in ascending order. A single token cannot be scored.

    Raises:
        InvalidParameterError: no lengths, a length that is not a whole number or is below 2, or duplicates.
    """
    check_type("lengths", lengths, Sequence[int])
    if not lengths or min(lengths) < 2:
        raise InvalidParameterError(
            f"Expected lengths to be whole numbers of 2 or more, got {list(lengths)}. Pass lengths=[512, 1024]."
        )
    if len(set(lengths)) != len(lengths):
        raise InvalidParameterError(f"Expected lengths to be different, got {list(lengths)}. Pass each once.")
    return sorted(lengths)


def special_prefix(tokenizer: Any, bos: Bos = "auto") -> list[int]:
    """Return the special tokens before every text: `[gMASK]<sop>`, a class token, BOS, or nothing.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        bos (`str`, *optional*, defaults to `"auto"`): `"auto"` for the tokens that the tokenizer adds, `"always"` for
            BOS even if the tokenizer does not add it, or `"never"` for no special tokens.

    Raises:
        InvalidParameterError: `"always"` and the tokenizer has no BOS token, or an unknown value.
    """
    check_type("bos", bos, Bos)
    if bos == "never":
        return []
    added = special_tokens(tokenizer)[0]
    if bos == "auto" or tokenizer.bos_token_id in added:
        return added
    if tokenizer.bos_token_id is None:
        raise InvalidParameterError(
            f"Expected a tokenizer with a BOS token for bos='always', got {type(tokenizer).__name__} without one. Set "
            "tokenizer.bos_token, or pass bos='auto'."
        )
    return [tokenizer.bos_token_id, *added]


def first_scored(bos: int) -> int:
    """Return the index of the first scored token, given a special prefix of `bos` tokens, which are only read."""
    return max(1, bos)


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that a tokenizer adds before and after a text: `[CLS]` and `[SEP]`, or nothing and `</s>`."""
    plain, whole = token_ids(tokenizer, "a"), tokenizer("a")["input_ids"]
    begin = next((index for index in range(len(whole)) if whole[index : index + len(plain)] == plain), None)
    if begin is None:
        raise InvalidParameterError(
            f"Expected the tokens {plain} within those with special tokens around them, got {whole} from "
            f"{type(tokenizer).__name__}. Pass another tokenizer."
        )
    return whole[:begin], whole[begin + len(plain) :]


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text without special tokens, and without a warning about the model's length."""
    require_tokenizer(tokenizer)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def require_tokenizer(tokenizer: Any) -> None:
    """Check that an argument is a tokenizer, that is, callable."""
    if not callable(tokenizer):
        raise InvalidParameterError(
            f"Expected a tokenizer, got {type(tokenizer).__name__}. Pass AutoTokenizer.from_pretrained(...)."
        )


def check_vocabulary(
    model: Any,
    rows: Iterable[torch.Tensor],
    name: str = "the model",
    remedy: str = "Load both from the same checkpoint",
) -> None:
    """Check that every token is in a model's vocabulary. If not, the tokenizer is of another model.

    Raises:
        InvalidParameterError: a token id is not below the number of token embeddings.
    """
    largest, vocabulary = max(int(row.max()) for row in rows), model.get_input_embeddings().num_embeddings
    if largest >= vocabulary:
        raise InvalidParameterError(
            f"Expected tokens below {vocabulary}, the vocabulary of {name}, got {largest}. {remedy}."
        )


def tokenize_documents(
    documents: Sequence[Document], tokenizer: Any, length: int, start: int = 0, bos: Bos = "auto"
) -> TokenizedDocuments:
    """Return the first `length` tokens of `special prefix + tokens[start:]` of every document.

    The prefix ([`special_prefix`]) is not repeated if the text already begins with it.

    Raises:
        DocumentError: no documents, or no document is long enough.
        InvalidParameterError: a negative `start`.
        CheckpointError: the tokenizer has no vocabulary.
    """
    check_type("length", length, int)
    check_type("start", start, int)
    if start < 0:
        raise InvalidParameterError(
            f"Expected start to be 0 or more, got {start}. Pass the number of tokens to leave out."
        )
    if not documents:
        raise DocumentError("Expected documents, got none. Pass one or more, as load_documents(...) reads them.")
    require_vocabulary(tokenizer)
    prefix = np.array(special_prefix(tokenizer, bos), dtype=np.int64)
    ids, rows, byte_ends, counts = [], [], [], []
    left_out: list[dict[str, Any]] = []
    for document, encoded in zip(documents, encode_documents(documents, tokenizer), strict=True):
        skipped = start + leading(encoded.ids, prefix)
        count = start + len(prefix) + len(encoded.ids) - skipped
        if count - start < length:
            left_out.append({"document": document.id, "tokens": count})
            continue
        part = slice(skipped, skipped + length - len(prefix))
        ids.append(document.id)
        rows.append(np.concatenate([prefix, encoded.ids[part]]))
        counts.append(count)
        if encoded.ends is not None:
            begins = encoded.ends[skipped - 1] if skipped else 0
            byte_ends.append(np.concatenate([np.full(len(prefix), begins), encoded.ends[part]]))
    if not rows:
        longest = max(entry["tokens"] for entry in left_out)
        shorter = f"lengths up to {longest - start}, or longer" if longest - start > 1 else "longer"
        raise DocumentError(
            f"Expected documents of start + length tokens, {start} + {length}, got {len(documents)} of at most "
            f"{longest}. Pass {shorter} documents."
        )
    if left_out:
        logger.warning(
            "%d of %d documents are too short for %d tokens; left out", len(left_out), len(documents), length
        )
    ends = _table(byte_ends) if byte_ends else None
    words = _prefix_in_words(tokenizer, prefix.tolist(), bos)
    return TokenizedDocuments(ids, _table(rows), len(prefix), counts, left_out, ends, start, words)


def leading(ids: np.ndarray, prefix: np.ndarray) -> int:
    """Return the number of leading tokens of a text that belong to the special prefix, which is added anyway."""
    text = np.flatnonzero(~np.isin(ids, prefix)) if len(prefix) else [0]
    return int(text[0]) if len(text) else len(ids)


def _prefix_in_words(tokenizer: Any, prefix: list[int], bos: Bos) -> str:
    added = special_tokens(tokenizer)[0]
    if prefix == added:
        if prefix in ([], [tokenizer.bos_token_id]):
            return ""
        return f"special prefix {''.join(map(str, tokenizer.convert_ids_to_tokens(prefix)))}"
    return f"bos={bos!r}; the tokenizer adds {'one' if added else 'none'}"


def _table(rows: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(rows).astype(np.int64))


@dataclass(frozen=True)
class TokensRead:
    """Rows of the measured models, unchanged or retokenized for an evaluator.

    `rows` begin with the `bos` tokens of the special prefix. `carry` takes the index of a document and token indices
    in the evaluator's row, and returns the token indices in the row of the measured models.
    """

    ids: list[str]
    rows: list[torch.Tensor]
    bos: int
    carry: Callable[[int, np.ndarray], np.ndarray] = lambda index, keys: keys


def read_by(
    evaluator_tokenizer: Any, tokenizer: Any, texts: Iterable[Document], rows: TokenizedDocuments
) -> TokensRead:
    """Return the rows for an evaluator, which may have another tokenizer.

    Raises:
        InvalidParameterError: the tokenizers differ, and one of them returns no offsets.
    """
    if evaluator_tokenizer is not None:
        require_tokenizer(evaluator_tokenizer)
    if evaluator_tokenizer is None or _are_same(evaluator_tokenizer, tokenizer):
        return TokensRead(rows.ids, list(rows.tokens), rows.bos)
    for each in (tokenizer, evaluator_tokenizer):
        if not each.is_fast:
            raise InvalidParameterError(
                f"Expected a tokenizer with character offsets, got {type(each).__name__}, so that key tokens cannot "
                "be carried between it and another one. Pass a fast tokenizer, or an evaluator with the same "
                "tokenizer."
            )
    text_of = {document.id: document.text for document in texts}
    first, prefix = rows.bos, special_prefix(evaluator_tokenizer)
    evaluator_rows, aligned = [], []
    for id, row in zip(rows.ids, rows.tokens, strict=True):
        ids, spans = with_offsets(tokenizer, text_of[id])
        skipped = rows.start + leading(ids, row[:first].numpy())
        begin = int(spans[skipped - 1, 1]) if skipped else 0
        spans = np.maximum(spans[skipped : skipped + rows.length - first] - begin, 0)
        covered = text_of[id][begin : begin + spans[-1, 1]]
        evaluator_ids, evaluator_spans = with_offsets(evaluator_tokenizer, covered)
        evaluator_rows.append(torch.tensor([*prefix, *evaluator_ids.tolist()], device="cpu"))
        aligned.append((covered, spans, evaluator_spans))

    def carry(index: int, keys: np.ndarray) -> np.ndarray:
        covered, spans, evaluator_spans = aligned[index]
        carried = np.flatnonzero(tokens_inside(spans, evaluator_spans[keys - len(prefix)], covered)) + first
        return carried[carried >= max(1, first)]  # neither the prefix nor token 0 is scored

    return TokensRead(rows.ids, evaluator_rows, len(prefix), carry)


def tokens_inside(offsets: np.ndarray, spans: np.ndarray, text: str) -> np.ndarray:
    """Return the mask of the tokens inside spans of characters, ignoring white space; bool, of shape `(tokens,)`.

    Offsets `(tokens, 2)` and spans `(spans, 2)` are pairs of first character and end (exclusive). Spans may be in any
    order and overlap. A token that shares no character with the spans is outside.
    """
    covered = np.zeros(len(text), dtype=bool)
    for begin, end in spans:
        covered[begin:end] = True
    is_space = np.fromiter((character.isspace() for character in text), dtype=bool, count=len(text))
    inside, outside = (np.concatenate([[0], np.cumsum(mask)]) for mask in (covered, ~covered & ~is_space))
    begins, ends = offsets[:, 0], offsets[:, 1]
    result: np.ndarray = (inside[ends] > inside[begins]) & (outside[ends] == outside[begins])
    return result


def _are_same(one: Any, other: Any) -> bool:
    """Return `True` if two tokenizers are equal, even if they were loaded from different places."""
    return one is other or bool(one.is_fast and other.is_fast and _state(one) == _state(other))
