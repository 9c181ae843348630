"""One text over several devices: each process holds some of its tokens, and attention goes round (ring attention).

The ring is PyTorch's `context_parallel`, as `accelerate` sets it up with FSDP2 (`ParallelismConfig(cp_size=...)`). It
deals out tokens so that all processes have equal work, which permutes them: a token is told by the place that travels
with it, never by where it lies on its process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from ...errors import InvalidParameterError, UnsupportedModelError
from ...patching import find_patch
from .distribution import shares_texts
from .heads import deviation
from .progress import tokens_read
from .scorer import Memory, TokenScorer, logits_nll

if TYPE_CHECKING:
    from accelerate import Accelerator

PROBE_TOKENS = 32
"""Tokens per process on which a share of a text is compared with all of it."""


def shard_weights(model: nn.Module, accelerator: Accelerator) -> Any:
    """The model with its weights dealt out by FSDP2, which context parallelism needs."""
    # accelerate takes a model for FSDP2 together with an optimizer only; this one is never asked for a step
    return accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))[0]


def memory_for(accelerator: Accelerator | None, prefill_chunk: int | None, offload_cache: bool) -> Memory:
    """
    How texts are read on the processes of an accelerator.

    Raises:
        InvalidParameterError: only some of the processes would share a text, or as [`Memory`].
    """
    return Memory(prefill_chunk, offload_cache, accelerator if shares_texts(accelerator) else None)


def token_scorer(model: nn.Module, memory: Memory) -> TokenScorer:
    """Scorer of tokens with a causal language model, on this process or on all of them together."""
    if memory.accelerator is None:
        return TokenScorer(model, memory)
    return ContextParallelScorer(model, memory)


class ContextParallelScorer(TokenScorer):
    """
    Scores tokens as [`TokenScorer`] does, each text shared out over all processes.

    Every process has to make the same calls, and gets all values. A shared text is compared with a whole one on a
    prefix, for each patch anew; models and patches whose attention is not PyTorch's are refused by that.

    Args:
        model (`torch.nn.Module`): prepared by the accelerator.
        memory ([`Memory`]): with the accelerator. Where memory runs out the run ends: one process cannot shrink its
            share alone.

    Raises:
        InvalidParameterError: chunks are asked for, too.
        UnsupportedModelError: as [`TokenScorer`].
    """

    def __init__(self, model: nn.Module, memory: Memory) -> None:
        if memory.prefill_chunk is not None:
            raise InvalidParameterError(
                "prefill_chunk and context parallelism both divide a text; leave prefill_chunk out"
            )
        super().__init__(model, memory)
        self._windows.gives_way = False
        self._accelerator: Any = memory.accelerator
        self._checked: Any = self  # the patch with which shares were compared; none so far

    def _nll(self, input_ids: torch.Tensor, first: int, last_read: bool) -> torch.Tensor:
        patch = find_patch(self.model)
        if self._checked is not patch:
            self._compare(input_ids[:1, : PROBE_TOKENS * self._accelerator.num_processes])
            self._checked = patch
        return self._shared_nll(input_ids, first, last_read)

    def _shared_nll(self, input_ids: torch.Tensor, first: int, last_read: bool) -> torch.Tensor:
        assert self._head is not None
        head, (rows, length) = self._head, input_ids.shape
        shares = 2 * self._accelerator.num_processes  # a process gets an early share and a late one
        ids = F.pad(input_ids, (0, -length % shares))  # causal: what follows a token changes nothing
        targets = ids.roll(-1, dims=1)
        places = torch.arange(ids.shape[1], device=ids.device).repeat(rows, 1)
        positions = places.clamp(max=length - (1 if last_read else 2))
        buffers = [ids, targets, places, positions]
        with self._accelerator.maybe_context_parallel(
            buffers=buffers, buffer_seq_dims=[1] * len(buffers), no_restore_buffers=set(buffers)
        ):
            read = head.read(ids, position_ids=positions, use_cache=False)

            own = torch.empty(rows, ids.shape[1], device=ids.device)
            for part in self._logits.parts(range(ids.shape[1]), cost=rows):
                with part:
                    logits = head.logits(read, part.begin, part.end)
                    own[:, part.items] = logits_nll(logits, targets[:, part.items])
        tokens_read(rows * length)
        nll, order = (_side_by_side(self._accelerator.gather(part), rows) for part in (own, places))
        return nll.gather(1, order.argsort(dim=1))[:, first - 1 : length - 1].cpu()

    def _compare(self, input_ids: torch.Tensor) -> None:
        whole = super()._nll(input_ids, 1, last_read=True)
        shared = self._shared_nll(input_ids, 1, last_read=True)
        by = deviation(shared.to(self.model.dtype), whole.to(self.model.dtype))
        if by is not None:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} gives other values (off by {by:.2g} nats) when a text is shared out by "
                "process; leave cp_size out, or choose a method that changes frequencies only, such as yarn"
            )


def _side_by_side(gathered: torch.Tensor, rows: int) -> torch.Tensor:
    """From `(processes * rows, share)` to `(rows, processes * share)`."""
    return gathered.view(-1, rows, gathered.shape[1]).transpose(0, 1).flatten(1)
