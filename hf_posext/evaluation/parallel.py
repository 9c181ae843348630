"""Several processes: whole documents per process, or one text shared by all (ring attention).

Documents are gathered, never averaged over processes: sums that are pooled afterwards, in the order of the documents,
are the same to the bit however many processes there were. The ring is PyTorch's `context_parallel`, as `accelerate`
sets it up with FSDP2 (`ParallelismConfig(cp_size=...)`). It permutes tokens: a token is known by the place that
travels with it, never by where it lies on its process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import EvaluationError, InvalidParameterError, PosExtError, UnsupportedModelError
from ..patching import find_patch
from .heads import deviation
from .scorer import Memory, TokenScorer, logits_nll, tokens_read

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


def rank_of(accelerator: Accelerator | None) -> int:
    """Return the index of this process; 0 without an accelerator."""
    return 0 if accelerator is None else int(accelerator.process_index)


def processes_of(accelerator: Accelerator | None) -> int:
    """Return the number of processes; 1 without an accelerator.

    Raises:
        InvalidParameterError: the launcher has started more processes than the accelerator has joined, each of which
            would do all of the work.
    """
    if accelerator is None:
        return 1
    started, joined = int(os.environ.get("WORLD_SIZE", 1)), int(accelerator.num_processes)
    if started > joined:
        raise InvalidParameterError(
            f"WORLD_SIZE is {started}, and the accelerator has joined {joined}, so that each process would do all of "
            "the work. Pass Accelerator(cpu=True) on a machine without a GPU, or set ACCELERATE_USE_CPU=true."
        )
    return joined


def shares_texts(accelerator: Accelerator | None) -> bool:
    """Return `True` if the processes work on one text together, instead of on a text each.

    Raises:
        InvalidParameterError: some of them would.
    """
    config = getattr(accelerator, "parallelism_config", None)
    if accelerator is None or config is None or config.cp_size == 1:
        return False
    if config.cp_size != accelerator.num_processes:
        raise InvalidParameterError(
            f"cp_size is {config.cp_size} and there are {accelerator.num_processes} processes; an evaluation shares "
            "each text out over all processes or over none: make the two equal, or leave cp_size out"
        )
    return True


def deal(costs: Sequence[float], processes: int) -> list[int]:
    """Assign work to processes: the longest first, each to the process with the least work so far.

    It is the same on every process. Of equal costs the first goes first.
    """
    loads, owners = [0.0] * processes, [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[piece] = min(range(processes), key=loads.__getitem__)
        loads[owners[piece]] += costs[piece]
    return owners


def everywhere(work: Callable[[], T], accelerator: Accelerator | None) -> list[T]:
    """Run this process's share of the work, and return the results of all processes in order.

    Every process has to call it. An error is carried to the others before it is raised, so that none of them waits for
    a process that has stopped; Ctrl-C is not, since launchers stop all processes then.

    Raises:
        Exception: of `work`; on the other processes the same if it is a [`PosExtError`], else an [`EvaluationError`].
    """
    if processes_of(accelerator) == 1:
        return [work()]
    result: T | None = None
    ended: Exception | None = None
    try:
        result = work()
    except Exception as error:
        ended = error
    return exchange(result, ended, accelerator)  # type: ignore[arg-type]  # there is a result where nothing ended it


def exchange(result: T, ended: Exception | None, accelerator: Accelerator | None) -> list[T]:
    """Exchange the results of all processes in order, after each has finished or failed.

    Every process has to call it.

    Raises:
        Exception: `ended`; on the other processes the same if it is a [`PosExtError`], else an [`EvaluationError`].
    """
    if processes_of(accelerator) == 1:
        if ended is not None:
            raise ended
        return [result]
    from accelerate.utils import gather_object

    known = ended if ended is None or isinstance(ended, PosExtError) else None
    if ended is not None and known is None:
        known = EvaluationError(f"process {rank_of(accelerator)} failed: {type(ended).__name__}: {ended}")
    shares = gather_object([(None if ended else result, known)])
    errors = [error for _, error in shares if error is not None]
    if errors:
        raise ended or errors[0]
    return [share for share, _ in shares]


PROBE_TOKENS = 32
"""Tokens per process on which a share of a text is compared with all of it."""


def shard_weights(model: nn.Module, accelerator: Accelerator) -> Any:
    """Shard a model's weights by FSDP2, which context parallelism requires."""
    # accelerate takes a model for FSDP2 together with an optimizer only; this one is never asked for a step
    return accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))[0]


def token_scorer(model: nn.Module, memory: Memory) -> TokenScorer:
    """Return a scorer of tokens for a causal language model, on this process or on all processes together."""
    if memory.accelerator is None:
        return TokenScorer(model, memory)
    return ContextParallelScorer(model, memory)


class ContextParallelScorer(TokenScorer):
    """Scorer like [`TokenScorer`], with each text split across all processes.

    Every process has to make the same calls, and gets all values. A shared text is compared with a whole one on a
    prefix, for each patch anew; models and patches whose attention is not PyTorch's are refused by that. Where memory
    runs out the run ends: one process cannot shrink its share alone.

    Raises:
        InvalidParameterError: chunks are asked for, too.
        UnsupportedModelError: as [`TokenScorer`].
    """

    def __init__(self, model: nn.Module, memory: Memory) -> None:
        if memory.prefill_chunk is not None:
            raise InvalidParameterError(
                "prefill_chunk and context parallelism both divide a text. Leave prefill_chunk out."
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
                "process. Leave cp_size out, or choose a method that changes frequencies only, such as yarn."
            )


def _side_by_side(gathered: torch.Tensor, rows: int) -> torch.Tensor:
    """Reshape `(processes * rows, share)` to `(rows, processes * share)`."""
    return gathered.view(-1, rows, gathered.shape[1]).transpose(0, 1).flatten(1)
