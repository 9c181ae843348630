"""Run by torchrun on two processes: each text is shared out over both, and must get the values of one process.

PyTorch has ring attention on CUDA only, and accelerate refuses to set it up on CPUs. So attention here gathers all
keys and values; who gets which tokens, and what becomes of them, is PyTorch's `context_parallel` and this package.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.experimental import context_parallel
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_posext import compare, patch_model
from hf_posext.errors import UnsupportedModelError
from hf_posext.evaluation.scorer import ContextParallelScorer, Memory, TokenScorer
from hf_posext.evaluation.setup import weights_fingerprint

from ..conftest import TRAINED, tiny_llama, tokens
from .helpers import character_tokenizer, random_texts


class Ring:
    """Stand-in for an accelerator, on a mesh of CPUs."""

    __class__ = Accelerator  # type: ignore[assignment]  # for isinstance

    def __init__(self) -> None:
        dist.init_process_group("gloo")
        PartialState(cpu=True)
        self.num_processes, self.process_index = dist.get_world_size(), dist.get_rank()
        self.is_main_process = self.process_index == 0
        self.parallelism_config = SimpleNamespace(cp_size=self.num_processes)
        self.mesh = init_device_mesh("cpu", (self.num_processes,))
        self.places: torch.Tensor | None = None

    @contextmanager
    def maybe_context_parallel(self, buffers: list[torch.Tensor], **kwargs: Any) -> Iterator[None]:
        with context_parallel(self.mesh, buffers=buffers, **kwargs):
            self.places = buffers[2]
            yield
        self.places = None

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        shares = [torch.empty_like(tensor) for _ in range(self.num_processes)]
        dist.all_gather(shares, tensor.contiguous())
        return torch.cat(shares)

    def attention(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        if self.places is None:
            return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        rows, groups, place = len(query), module.num_key_value_groups, self.places[0]
        keys, values = (torch.cat(self.gather(part).split(rows), dim=2) for part in (key, value))
        keys, values = (part.repeat_interleave(groups, dim=1) for part in (keys, values))
        causal = torch.cat(self.gather(place[None]).split(1), dim=1) <= place[:, None]
        # by hand: inside `context_parallel` a call of SDPA is a call of the ring
        scores = (query @ keys.transpose(2, 3) * module.scaling).masked_fill(~causal, float("-inf"))
        return (scores.softmax(-1) @ values).transpose(1, 2).contiguous(), None


def main() -> None:
    torch.set_num_threads(1)
    ring = Ring()
    assert ring.num_processes == 2
    AttentionInterface.register("gathering", ring.attention)
    model = tiny_llama(attn_implementation="gathering")
    scorer, shared = TokenScorer(model), ContextParallelScorer(model, Memory(accelerator=ring))
    far = 3 * TRAINED
    for ids, options in (
        (tokens(far), {}),
        (tokens(far - 3, rows=2), {"first": 17}),
        (tokens(far + 1), {"first": far - 5, "last_read": False}),
    ):
        plain = scorer.token_nll(ids, **options)
        # float32: keys arrive in another order, so that sums round otherwise
        torch.testing.assert_close(shared.token_nll(ids, **options), plain, atol=2e-5, rtol=0)
    plain = scorer.token_nll(tokens(far))
    for method in ("yarn", "linear"):
        with patch_model(model, method, factor=4):
            extended = scorer.token_nll(tokens(far))
            assert (extended - plain).abs().max() > 1e-2
            torch.testing.assert_close(shared.token_nll(tokens(far)), extended, atol=2e-5, rtol=0)

    deaf = tiny_llama(attn_implementation="eager")  # its attention knows nothing of the other process
    try:
        ContextParallelScorer(deaf, Memory(accelerator=ring)).token_nll(tokens(far))
    except UnsupportedModelError as error:
        assert "Leave cp_size out" in str(error)
    else:
        sys.exit("a share of a text was taken for all of it")
    shards_are_measured_as_the_whole(ring)
    dist.barrier()
    if dist.get_rank() == 0:
        print("two processes agree")


def shards_are_measured_as_the_whole(ring: Ring) -> None:
    """Weights dealt out by FSDP2, as context parallelism does, give what whole ones do and can be trained after."""
    read = character_tokenizer(), random_texts(2, 200)
    options: dict[str, Any] = {"methods": ["none", "yarn"], "factor": 2, "lengths": [40, 120], "trained_length": 64}
    model = tiny_llama(attn_implementation="gathering")
    expected_results, fingerprint = compare(model, *read, **options), weights_fingerprint(model)
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=ring.mesh, reshard_after_forward=True)
    assert weights_fingerprint(model) == fingerprint
    shared = compare(model, *read, accelerator=ring, **options)
    for row, expected in zip(shared.rows, expected_results.rows, strict=True):
        for name in ("perplexity", "gain"):
            # float32: keys arrive in another order, so that sums round otherwise
            torch.testing.assert_close(row[name], expected[name], rtol=1e-5, atol=0, msg=f"{name} of {row}")
    ids = tokens(TRAINED)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


if __name__ == "__main__":
    main()
