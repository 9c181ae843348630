"""Batches and memory savers as trainers have them: a row depends on itself, and a gradient on nothing but the loss."""

from __future__ import annotations

import pytest
import torch

from hf_posext import patch_model
from tests.adapter_helpers import with_adapter
from tests.conftest import TRAINED, tiny_llama, tokens


@pytest.mark.parametrize("method", ["yarn", "rerope", "self-extend", "log-n", "dynamic-ntk", "dynamic-yarn"])
def test_loss_of_a_short_row_beside_a_long_one(method: str) -> None:
    """Right padding and an attention mask, without positions, as collators of trainers pad."""
    model = tiny_llama()
    patch_model(model, method, factor=4)
    model.train()
    short, long = tokens(40, seed=1), tokens(3 * TRAINED, seed=2)
    alone = model(input_ids=short, labels=short).loss
    ids = torch.zeros(2, 3 * TRAINED, dtype=torch.long)
    ids[0, :40], ids[1] = short[0], long[0]
    mask, labels = torch.ones_like(ids), torch.full_like(ids, -100)
    mask[0, 40:], labels[0, :40] = 0, short[0]  # the long row has no labels
    padded = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)  # sums of float32 in another order


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["yarn", "rerope", "dynamic-ntk"])
def test_gradient_checkpointing(method: str, reentrant: bool) -> None:
    """An adapter gets the gradients that it gets without."""
    found = []
    for checkpointing in (False, True):
        model = tiny_llama()
        patch_model(model, method, factor=4)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        adapted = with_adapter(model).train()
        ids = tokens(2 * TRAINED, rows=2)
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: weight.grad for name, weight in adapted.named_parameters() if weight.grad is not None})
    assert found[0] and found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
