"""Rows of equal length for training, cut from documents without attention between documents, and their batches.

A sample depends only on the seed and its number. A run that is resumed, or spread over more processes, therefore reads
the same samples.
"""

from __future__ import annotations

import bisect
import hashlib
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..errors import DocumentError
from ..evaluation import Document
from ..evaluation.tokens import first_scored, special_prefix, token_ids

logger = logging.getLogger(__name__)

NO_LABEL = -100
"""Label of a token that is not predicted."""

Tokens = list[int]


@dataclass(frozen=True)
class Rows:
    """Rows to train on: `input_ids`, and facts on their origin for the provenance.

    Packed rows have `position_ids`, which restart at 0 with each document, and `labels`, which exclude the first token
    and leading special tokens of each.
    """

    dataset: datasets.Dataset
    facts: dict[str, Any]


def make_rows(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, *, pack: bool = False
) -> Rows:
    """Cut documents into rows of `length` tokens, each beginning with BOS if the tokenizer adds it.

    A row comes from one document, and the remainder at the end of each document is not used. With `pack`, these
    remainders and the documents shorter than a row share rows. They stay whole and are separated by their positions.
    Texts that do not fill a row raise a `DocumentError`.
    """
    prefix = special_prefix(tokenizer)
    room = length - len(prefix)
    whole: list[Tokens] = []
    ends: list[Tokens] = []
    sizes = {}
    for document in documents:
        tokens = token_ids(tokenizer, document.text)
        sizes[document.id] = len(prefix) + len(tokens)
        pieces = [prefix + tokens[start : start + room] for start in range(0, len(tokens), room)]
        whole += [piece for piece in pieces if len(piece) == length]
        ends += [piece for piece in pieces if 1 < len(piece) < length]  # a single token has nothing to predict
    packs = _pack(ends, length) if pack else []
    short = [id for id, size in sizes.items() if size < length]
    if not whole and (not pack or sum(map(len, ends)) < length):
        have = f"all of them together have {sum(map(len, ends))}" if pack else f"the longest has {max(sizes.values())}"
        raise DocumentError(
            f"the {len(sizes)} documents do not fill a row of {length} tokens: {have}. Pass longer documents or a "
            "smaller length" + ("" if pack else ", or pack them")
        )
    if short and not pack:
        message = "%d of %d documents are shorter than %d tokens; left out, unless they are packed"
        logger.warning(message, len(short), len(sizes), length)
    used = sum(map(len, whole)) + (sum(map(len, ends)) if pack else 0)
    if pack:
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        padding = next(token for token in candidates if token is not None)  # any token: it is not attended to
        dataset = _packed(whole, packs, length, padding, first_scored(len(prefix)))
    else:
        dataset = _columns(input_ids=np.array(whole))
    facts = {
        "documents": sizes,
        "left_out": [] if pack else short,
        "rows": len(dataset),
        "length": length,
        "tokens": used,
        "bos": len(prefix),
        "pack": pack,
        "sha256": hashlib.sha256(np.array(dataset.with_format("numpy")["input_ids"][:]).tobytes()).hexdigest(),
    }
    return Rows(dataset, facts)


def _pack(pieces: list[Tokens], length: int) -> list[list[Tokens]]:
    """Pack pieces into rows by best fit: the longest first, each into the fullest row with enough space."""
    rows: list[list[Tokens]] = []
    spaces: list[tuple[int, int]] = []  # free space of each row, ascending, and the row's index
    for piece in sorted(pieces, key=len, reverse=True):
        position = bisect.bisect_left(spaces, (len(piece), -1))
        if position == len(spaces):
            rows.append([])
            space, index = length, len(rows) - 1
        else:
            space, index = spaces.pop(position)
        rows[index].append(piece)
        bisect.insort(spaces, (space - len(piece), index))
    return rows


def _packed(whole: list[Tokens], packs: list[list[Tokens]], length: int, padding: int, first: int) -> datasets.Dataset:
    count = len(whole) + len(packs)
    ids = np.full((count, length), padding)
    labels = np.full((count, length), NO_LABEL)
    positions = np.zeros((count, length), dtype=np.int64)
    for row, pieces in enumerate([*([piece] for piece in whole), *packs]):
        start = 0
        for piece in pieces:
            end = start + len(piece)
            ids[row, start:end] = piece
            labels[row, start + first : end] = piece[first:]
            positions[row, start:end] = range(len(piece))
            start = end
        positions[row, start:] = range(length - start)  # padding is a document of its own, without labels
    return _columns(input_ids=ids, position_ids=positions, labels=labels)


def _columns(**columns: np.ndarray) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns).with_format("torch")


def schedule(rows: datasets.Dataset, count: int, seed: int) -> datasets.Dataset:
    """Return `count` rows in training order, with the number of each as `sample`. Each round has its own order."""
    rounds = -(-count // len(rows))
    orders = [np.random.default_rng([seed, number]).permutation(len(rows)) for number in range(rounds)]

    def look_up(batch: dict[str, Any]) -> dict[str, Any]:
        return {**rows[batch["row"]], "sample": batch["sample"]}

    table = {"sample": np.arange(count), "row": np.concatenate(orders)[:count]}
    return datasets.Dataset.from_dict(table).with_transform(look_up)


@dataclass(frozen=True)
class Skips:
    """Positional skip-wise training (PoSE): short rows whose positions are spread over the target length.

    A row is cut into chunks. Each chunk after the first is shifted by a random number of positions, so that many rows
    together cover all distances below `target`. The text of the row stays contiguous. Zhu et al., 2023: PoSE:
    Efficient Context Window Extension of LLMs via Positional Skip-wise Training, https://arxiv.org/abs/2309.10400.

    Args:
        target (`int`): one more than the highest position.
        chunks (`int`): number of chunks in a row.
        seed (`int`): seed of the cuts and skips.
    """

    target: int
    chunks: int
    seed: int

    def positions(self, length: int, sample: int) -> torch.Tensor:
        """Return the positions (length,) of a sample.

        With two chunks, the cut and the skip are distributed as in the paper's code.
        """
        draw = random.Random(f"{self.seed}-{sample}")
        sizes: list[int] = []
        for _ in range(self.chunks - 1):  # each later chunk keeps at least one token
            left = length - sum(sizes) - (self.chunks - 1 - len(sizes))
            sizes.append(min(draw.randint(1, -(-length // self.chunks)), left))
        skips = [0]
        for _ in sizes:
            skips.append(draw.randint(skips[-1], self.target - length))
        sizes.append(length - sum(sizes))
        return torch.arange(length) + torch.repeat_interleave(torch.tensor(skips), torch.tensor(sizes))


@dataclass(frozen=True)
class Collator:
    """Collator of rows into a batch with labels, and with skipped positions if `skips` is given."""

    skips: Skips | None = None
    special: int = 0
    """Number of leading special tokens in each row, which are not predicted."""

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        columns = [name for name in samples[0] if name != "sample"]
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in columns}
        if "labels" not in batch:
            batch["labels"] = batch["input_ids"].clone()
            if self.special > 1:  # the first token is never predicted, and the Trainer counts its label
                batch["labels"][:, : self.special] = NO_LABEL
        if self.skips is not None:
            length = batch["input_ids"].shape[1]
            positions = [self.skips.positions(length, int(sample["sample"])) for sample in samples]
            # without a mask, transformers would take a jump in the positions for the edge of two documents
            mask = torch.ones_like(batch["input_ids"])
            batch |= {"position_ids": torch.stack(positions), "attention_mask": mask}
        return batch
