"""LongCE: short contexts, weights and loss against a loop that makes a forward for each token."""

from __future__ import annotations

import pytest
import torch

from hf_posext.training.trainer import LongCE

from ..conftest import tiny_llama, tokens
from ..evaluation.helpers import BOS, naive_nll, naive_windowed_nll

LENGTH, SHORT = 46, 8


@pytest.mark.parametrize("bos", [0, 1, 3])
def test_weights_are_those_of_a_loop_over_tokens(bos: int) -> None:
    model, ids = tiny_llama(), tokens(LENGTH, rows=2)
    ids[:, :bos] = BOS
    scored = max(1, bos)  # special tokens in front are read, and have no loss
    long = torch.stack([torch.tensor(naive_nll(model, row))[scored - 1 :] for row in ids])
    short = torch.stack([torch.tensor(naive_windowed_nll(model, row, 2 * SHORT, SHORT, bos)) for row in ids])
    first = 2 * SHORT - scored
    assert torch.allclose(short[:, :first], long[:, :first], rtol=1e-4), "there is no shorter context"
    weight = (short - long).exp().clamp(max=5.0)
    assert weight.min() < 0.5 and weight.max() > 2, "or the test would not tell weights from none"
    outputs = model(input_ids=ids, use_cache=False)
    loss = LongCE(model, SHORT, bos)(outputs, ids, num_items_in_batch=3)
    # float32 against float64
    share = (LENGTH - scored) / (LENGTH - 1)
    assert float(loss.detach()) == pytest.approx(float((weight * long).sum()) / 3 / share, rel=1e-4)


def test_no_gradient_flows_through_the_weights_and_the_mode_is_kept() -> None:
    model, ids = tiny_llama().train(), tokens(LENGTH)
    longce = LongCE(model, SHORT, bos=False)
    outputs = model(input_ids=ids, use_cache=False)
    longce(outputs, ids).backward()
    assert model.training
    grad = model.lm_head.weight.grad.clone()
    model.zero_grad()
    outputs = model(input_ids=ids, use_cache=False)
    nll = torch.nn.functional.cross_entropy(outputs.logits[0, :-1], ids[0, 1:], reduction="none")
    weight = (longce.short_nll(ids, nll.detach()[None])[0] - nll.detach()).exp().clamp(max=5.0)
    (weight * nll).mean().backward()
    torch.testing.assert_close(grad, model.lm_head.weight.grad, rtol=1e-4, atol=1e-7)
