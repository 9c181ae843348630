"""PoSE: the positions that rows are given, and models that take no notice of them."""

from __future__ import annotations

import random

import pytest
import torch

from hf_posext.errors import UnsupportedModelError
from hf_posext.patching.long_rows import check_skipping
from hf_posext.training.trainer import Collator, Skips

from ..conftest import logits, longer_gpt2, tiny_bloom, tiny_llama, tokens


@pytest.mark.parametrize("sample", range(20))
def test_two_chunks_are_cut_and_moved_as_in_the_papers_code(sample: int) -> None:
    """The arithmetic of `train_preprocess_function_pose`, on positions alone and with the same random numbers."""
    length, target = 33, 256
    draw = random.Random(f"7-{sample}")
    positions = list(range(length))
    first_end = draw.randint(1, (length + 1) // 2)
    skip = draw.randint(0, target - length)
    positions[first_end:] = [position + skip for position in positions[first_end:]]
    assert Skips(target, chunks=2, seed=7).positions(length, sample).tolist() == positions


@pytest.mark.parametrize("chunks", [2, 3, 8])
def test_chunks_keep_their_order_and_reach_up_to_the_target(chunks: int) -> None:
    drawn = [Skips(128, chunks, seed=0).positions(16, sample) for sample in range(4000)]
    for positions in drawn:
        steps = positions.diff()
        assert positions[0] == 0 and (steps >= 1).all() and positions[-1] < 128
        assert (steps > 1).sum() <= chunks - 1
    highest = torch.stack([positions[-1] for positions in drawn])
    assert highest.max() == 127, "the last position of the target is trained, too"
    assert chunks > 2 or highest.min() == 15, "and so is a row as it is"


def test_a_sample_has_the_same_positions_in_any_batch() -> None:
    samples = [{"input_ids": torch.arange(16), "sample": number} for number in range(6)]
    collate = Collator(Skips(64, 2, seed=3))
    together = collate(samples)["position_ids"]
    assert torch.equal(together, torch.cat([collate([sample])["position_ids"] for sample in samples]))
    assert len(torch.unique(together, dim=0)) == 6
    assert not torch.equal(together, Collator(Skips(64, 2, seed=4))(samples)["position_ids"])


def test_a_batch_has_a_mask_since_transformers_takes_a_jump_for_another_document() -> None:
    model, ids = tiny_llama(), tokens(24)
    batch = Collator(Skips(64, 2, seed=0))([{"input_ids": ids[0], "sample": 1}])
    changed = ids.clone()
    changed[0, 0] = changed[0, 0] % 127 + 1
    inputs = {"position_ids": batch["position_ids"], "use_cache": False}

    def last(row: torch.Tensor, **extras: torch.Tensor) -> torch.Tensor:
        return logits(model, row, **inputs, **extras)[0, -1]

    assert (batch["position_ids"].diff() > 1).sum() == 1
    assert not torch.equal(*(last(row, attention_mask=batch["attention_mask"]) for row in (ids, changed)))
    assert torch.equal(*(last(row) for row in (ids, changed))), "without a mask the first chunk is not seen any more"


def test_labels_are_the_tokens() -> None:
    batch = Collator(Skips(64, 2, seed=0))([{"input_ids": torch.arange(16), "sample": 0}])
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert set(batch) == {"input_ids", "labels", "position_ids", "attention_mask"}


def test_models_without_positions_to_give_are_refused() -> None:
    check_skipping(tiny_llama())
    check_skipping(longer_gpt2())
    with pytest.raises(UnsupportedModelError, match="BloomForCausalLM takes no position_ids"):
        check_skipping(tiny_bloom())
