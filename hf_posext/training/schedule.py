"""What each step reads: a function of the seed and of the number of the sample, and of nothing else.

So a run that is resumed, or spread over more processes, reads the same; nothing depends on the state of a generator.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch


def schedule(rows: datasets.Dataset, count: int, seed: int) -> datasets.Dataset:
    """
    Rows in the order in which they are trained on, with the number of each `sample`.

    Args:
        rows (`datasets.Dataset`): in `torch` format.
        count (`int`): samples in all; rows repeat, in another order each time, when all were read.
        seed (`int`): of the orders.
    """
    rounds = -(-count // len(rows))
    orders = [np.random.default_rng([seed, number]).permutation(len(rows)) for number in range(rounds)]

    def look_up(batch: dict[str, Any]) -> dict[str, Any]:
        return {**rows[batch["row"]], "sample": batch["sample"]}

    table = {"sample": np.arange(count), "row": np.concatenate(orders)[:count]}
    return datasets.Dataset.from_dict(table).with_transform(look_up)


@dataclass(frozen=True)
class Skips:
    """
    Positional skip-wise training (PoSE): rows are short, and their positions are spread over the length to come.

    A row is cut into chunks, and each chunk after the first is moved on by a random number of positions, so that with
    many rows all distances up to `target` are seen. The text is that of the row as it stands. Zhu et al., 2023: PoSE:
    Efficient Context Window Extension of LLMs via Positional Skip-wise Training, https://arxiv.org/abs/2309.10400.

    Args:
        target (`int`): one more than the highest position.
        chunks (`int`): of a row.
        seed (`int`): of cuts and skips.
    """

    target: int
    chunks: int
    seed: int

    def positions(self, length: int, sample: int) -> torch.Tensor:
        """Positions (length,) of a sample. With two chunks, cut and skip are distributed as in the paper's code."""
        draw = random.Random(f"{self.seed}-{sample}")
        sizes = [draw.randint(1, -(-length // self.chunks)) for _ in range(self.chunks - 1)]
        skips = [0]
        for _ in sizes:
            skips.append(draw.randint(skips[-1], self.target - length))
        sizes.append(length - sum(sizes))
        return torch.arange(length) + torch.repeat_interleave(torch.tensor(skips), torch.tensor(sizes))


@dataclass(frozen=True)
class Collator:
    """Rows to a batch, with labels, and with skipped positions where those are asked for."""

    skips: Skips | None = None

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        columns = [name for name in samples[0] if name != "sample"]
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in columns}
        batch.setdefault("labels", batch["input_ids"].clone())
        if self.skips is not None:
            length = batch["input_ids"].shape[1]
            positions = [self.skips.positions(length, int(sample["sample"])) for sample in samples]
            # without a mask, transformers would take a jump in the positions for the border of two documents
            mask = torch.ones_like(batch["input_ids"])
            batch |= {"position_ids": torch.stack(positions), "attention_mask": mask}
        return batch
