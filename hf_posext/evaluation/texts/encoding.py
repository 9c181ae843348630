"""Tokens of whole documents and where each ends in the text, from the tokenizer or from the cache of `datasets`."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from .documents import Document

logger = logging.getLogger(__name__)

FORMAT = 1
"""Of the cached columns; another number makes all that was cached before unknown."""


class Encoded(NamedTuple):
    """
    Tokens of one text, without special ones.

    Args:
        ids (`np.ndarray` of shape `(tokens,)`): int32.
        ends (`np.ndarray` of shape `(tokens,)`, *optional*): UTF-8 bytes of the text up to the end of each token,
            int64; `None` where the tokenizer gives no offsets (slow ones).
    """

    ids: np.ndarray
    ends: np.ndarray | None


def encode(tokenizer: Any, text: str) -> Encoded:
    """
    Tokens of a text without special ones, and where each ends.

    A character whose bytes are several tokens counts with the first of them, and what the tokenizer drops from the
    text counts with the token behind it.
    """
    wanted = {"add_special_tokens": False, "verbose": False}  # verbose warns about the model's length
    if not getattr(tokenizer, "is_fast", False):
        return Encoded(np.array(tokenizer(text, **wanted)["input_ids"], dtype=np.int32), None)
    encoded = tokenizer(text, **wanted, return_offsets_mapping=True, return_attention_mask=False)
    ids = np.array(encoded["input_ids"], dtype=np.int32)
    characters = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)[:, 1]
    return Encoded(ids, bytes_before(text)[characters])


def bytes_before(text: str) -> np.ndarray:
    """UTF-8 bytes before each character of a text, and of all of it; int64, of shape `(characters + 1,)`."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.concatenate([[0], np.cumsum(sizes)])


def encode_documents(documents: Sequence[Document], tokenizer: Any) -> Iterator[Encoded]:
    """
    Tokens of every document, in order.

    They are kept in the cache of `datasets` under a fingerprint of the texts and the tokenizer, so that the next run
    tokenizes nothing; of several processes that want the same, the first tokenizes and the others wait and read. With
    `datasets.disable_caching()`, or where the cache cannot be written, they are kept in memory.

    Args:
        documents (`Sequence[Document]`): the texts.
        tokenizer (`PreTrainedTokenizerBase`): the model's.
    """
    import datasets

    def encode_one(index: int) -> dict[str, Any]:
        encoded = encode(tokenizer, documents[index].text)
        return {"ids": encoded.ids, **({} if encoded.ends is None else {"ends": encoded.ends})}

    def encode_all(**options: Any) -> Any:
        # Indices and not texts, which would be copied, and of which a column of Arrow holds no more than 2 GB.
        rows = datasets.Dataset.from_dict({"index": range(len(documents))})
        return rows.map(
            encode_one,
            input_columns="index",
            remove_columns="index",
            writer_batch_size=16,  # long texts: what is not yet written is in memory
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
        except (OSError, ValueError) as error:  # what Arrow raises of a torn file is a ValueError
            logger.warning("tokens cannot be kept at %s (%s); they are made again", path, error)
            table = encode_all(keep_in_memory=True, new_fingerprint=fingerprint)
    for row in table.with_format("numpy"):
        yield Encoded(row["ids"], row.get("ends"))


def _fingerprint(documents: Sequence[Document], tokenizer: Any) -> str | None:
    """Of all that the tokens depend on; `None` if the tokenizer cannot be fingerprinted."""
    from datasets.fingerprint import Hasher

    if getattr(tokenizer, "is_fast", False):
        tokenizer("a", verbose=False)  # clears what an earlier call left of padding and truncation
        state = tokenizer.backend_tokenizer.to_str()
    else:
        try:
            state = Hasher.hash(tokenizer)
        except Exception as error:
            logger.warning("tokens are not cached, since the tokenizer cannot be pickled (%s)", error)
            return None
    kind = f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"
    versions = [metadata.version(package) for package in ("tokenizers", "transformers")]
    digest = hashlib.sha256()
    digest.update(json.dumps([FORMAT, versions, kind, getattr(tokenizer, "split_special_tokens", False)]).encode())
    for text in (state, *(document.text for document in documents)):
        content = text.encode()
        digest.update(b"%d:" % len(content))  # so that texts cannot run into each other
        digest.update(content)
    return digest.hexdigest()
