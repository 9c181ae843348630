"""Several processes: whole documents per process, or one text shared by all (ring attention).

Documents are gathered, never averaged over processes. Their sums are pooled afterwards in document order, so results
are bit-equal for any number of processes. The ring is PyTorch's `context_parallel`, which `accelerate` sets up with
FSDP2 (`ParallelismConfig(cp_size=...)`). It permutes tokens: the index that travels with a token identifies it, not
its position on the process.
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
from .forwards import deviation
from .scorer import Memory, TokenScorer, logits_nll, tokens_read

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


def rank_of(accelerator: Accelerator | None) -> int:
    """Return the index of this process; 0 without an accelerator."""
    return 0 if accelerator is None else int(accelerator.process_index)


def processes_of(accelerator: Accelerator | None) -> int:
    """Return the number of processes, all of which the accelerator must have joined; 1 without an accelerator."""
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
    """Return `True` if all processes share each text, instead of reading different texts."""
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
    """Return the process of each piece of work. The costliest pieces go first, each to the least loaded process.

    Every process computes the same assignment. Pieces of equal cost are assigned in order.
    """
    loads, owners = [0.0] * processes, [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[piece] = min(range(processes), key=loads.__getitem__)
        loads[owners[piece]] += costs[piece]
    return owners


def everywhere(work: Callable[[], T], accelerator: Accelerator | None) -> list[T]:
    """Run this process's share of the work, and return the results of all processes in order.

    Every process must call it. An error is raised on all processes, see [`exchange`]. Ctrl-C is not, because launchers
    then stop all processes.
    """
    if processes_of(accelerator) == 1:
        return [work()]
    result: T | None = None
    ended: Exception | None = None
    try:
        result = work()
    except Exception as error:
        ended = error
    return exchange(result, ended, accelerator)  # type: ignore[arg-type]  # without an error there is a result


def exchange(result: T, ended: Exception | None, accelerator: Accelerator | None) -> list[T]:
    """Return the results of all processes in order, after each has finished or failed.

    Every process must call it. The error `ended` of one process is raised on all, so none of them waits for a stopped
    process. Other processes raise the same if it is a [`PosExtError`], otherwise an [`EvaluationError`].
    """
    if processes_of(accelerator) == 1:
        if ended is not None:
            raise ended
        return [result]
    from accelerate.utils import gather_object

    error = ended  # errors of other packages may not survive pickling
    if ended is not None and not isinstance(ended, PosExtError):
        error = EvaluationError(f"process {rank_of(accelerator)} failed: {type(ended).__name__}: {ended}")
    shares = gather_object([(None if ended else result, error)])
    errors = [error for _, error in shares if error is not None]
    if errors:
        raise ended or errors[0]
    return [share for share, _ in shares]


PROBE_TOKENS = 32
"""Tokens per process of the prefix on which shared and unshared reading are compared."""


def shard_weights(model: nn.Module, accelerator: Accelerator) -> Any:
    """Shard a model's weights by FSDP2, which context parallelism requires."""
    # accelerate prepares a model for FSDP2 only together with an optimizer, which here never takes a step
    return accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))[0]


def token_scorer(model: nn.Module, memory: Memory) -> TokenScorer:
    """Return a token scorer of a causal language model, on this process or across all processes."""
    if memory.accelerator is None:
        return TokenScorer(model, memory)
    return ContextParallelScorer(model, memory)


class ContextParallelScorer(TokenScorer):
    """Scorer like [`TokenScorer`], with each text split across all processes.

    Every process must make the same calls, and receives all values. For each patch, a prefix is read both shared and
    unshared, and the values are compared. This refuses models and patches whose attention is not PyTorch's. The run
    ends if memory runs out, because one process cannot shrink its share alone.
    """

    def __init__(self, model: nn.Module, memory: Memory) -> None:
        if memory.prefill_chunk is not None:
            raise InvalidParameterError(
                "prefill_chunk and context parallelism both divide a text. Leave prefill_chunk out."
            )
        super().__init__(model, memory)
        self._windows.gives_way = False
        self._accelerator: Any = memory.accelerator
        self._checked: Any = self  # patch of the latest comparison; `self` equals no patch, not even `None`

    def _nll(self, input_ids: torch.Tensor, first: int, last_read: bool) -> torch.Tensor:
        patch = find_patch(self.model)
        if self._checked is not patch:
            self._compare(input_ids[:1, : PROBE_TOKENS * self._accelerator.num_processes])
            self._checked = patch
        return self._shared_nll(input_ids, first, last_read)

    def _shared_nll(self, input_ids: torch.Tensor, first: int, last_read: bool) -> torch.Tensor:
        assert self._head is not None
        head, (rows, length) = self._head, input_ids.shape
        shares = 2 * self._accelerator.num_processes  # each process gets an early and a late share
        ids = F.pad(input_ids, (0, -length % shares))  # causal: padding at the end changes no earlier token
        targets = ids.roll(-1, dims=1)
        places = torch.arange(ids.shape[1], device=ids.device).repeat(rows, 1)
        positions = places.clamp(max=length - (1 if last_read else 2))
        buffers = [ids, targets, places, positions]
        with self._accelerator.maybe_context_parallel(
            buffers=buffers, buffer_seq_dims=[1] * len(buffers), no_restore_buffers=set(buffers)
        ):
            read = head.read(ids, position_ids=positions, use_cache=False)

            losses = torch.empty(rows, ids.shape[1], dtype=torch.float32, device=ids.device)
            for part in self._logits.parts(range(ids.shape[1]), cost=rows):
                with part:
                    logits = head.logits(read, part.begin, part.end)
                    losses[:, part.items] = logits_nll(logits, targets[:, part.items])
        tokens_read(rows * length)
        nll, order = (_side_by_side(self._accelerator.gather(part), rows) for part in (losses, places))
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
