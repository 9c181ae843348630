"""Tokens of documents, kept on disk by `datasets`: a long corpus is tokenized once for each tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .documents import Document
from .tokens import token_ids


def cached_token_ids(documents: Sequence[Document], tokenizer: Any) -> list[list[int]]:
    """
    Tokens of whole documents without special ones, from the cache of `datasets` where they are in it.

    The fingerprint is the one of `datasets`, of the texts and of the tokenizer (vocabulary, merges, normalizer,
    options): wherever a text comes from, and in whichever process, the same text and tokenizer find the same file, and
    another vocabulary does not. Lengths, `start` and BOS play no part, since documents are kept whole. The files are
    `hf_posext/<fingerprint>.arrow` in `datasets.config.HF_DATASETS_CACHE`; `datasets.disable_caching()` switches them
    off.

    Args:
        documents (`Sequence[Document]`): the texts.
        tokenizer (`PreTrainedTokenizerBase`): the model's.

    Returns:
        `list[list[int]]`: one list for each document.
    """
    import datasets
    from datasets.fingerprint import Hasher

    if not documents or not datasets.is_caching_enabled():
        return [token_ids(tokenizer, document.text) for document in documents]
    texts = [document.text for document in documents]
    fingerprint = Hasher.hash((tokenizer, texts))
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "hf_posext"
    folder.mkdir(parents=True, exist_ok=True)
    # Only tokens go through Arrow: it cannot hold every text (lone surrogates).
    tokenized = datasets.Dataset.from_dict({"index": list(range(len(texts)))}).map(
        lambda row: {"input_ids": token_ids(tokenizer, texts[row["index"]])},
        remove_columns="index",
        features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),
        cache_file_name=str(folder / f"{fingerprint}.arrow"),
        new_fingerprint=fingerprint,
        writer_batch_size=16,  # documents are long
        desc="tokenize",
    )
    ids: list[list[int]] = tokenized["input_ids"][:]
    return ids
