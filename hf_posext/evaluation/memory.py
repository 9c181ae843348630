"""Long texts in limited memory: lengths at which positions change, smaller batches, and chunks with a KV cache.

The activations of a chunk are freed before the next chunk starts, so the KV cache bounds the longest text. Every token
attends to the same keys as in one forward over the whole text. Values differ only by rounding, because matrix products
have other shapes.
"""

from __future__ import annotations

import itertools
import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import DynamicCache

from ..errors import InvalidParameterError, OutOfMemoryError, UnsupportedModelError, first_line
from ..patching.detect import detect_scheme
from ..patching.modes import cache_argument, cache_of, with_cache
from ..patching.patch import find_patch
from ..plan import ExtensionPlan
from ..scheme import PositionalScheme
from .heads import PROBE_LENGTH, PROBE_SLICE, FullHead, Head, Read, deviation


@dataclass(frozen=True)
class Boundaries:
    """Input lengths at which the positions of a model change.

    Args:
        switches (`tuple[int, ...]`, *optional*, defaults to `()`): lengths in tokens, ascending. Longer inputs have
            other frequencies (LongRoPE with two lists: its trained length).
        dynamic (`bool`, *optional*, defaults to `False`): whether every length has its own frequencies (dynamic NTK).
    """

    switches: tuple[int, ...] = ()
    dynamic: bool = False

    def groups(self, lengths: list[int]) -> list[list[int]]:
        """Group lengths with equal positions. One forward at the longest length covers its group."""
        if self.dynamic:
            return [[length] for length in lengths]
        return [list(group) for _, group in itertools.groupby(lengths, lambda n: bisect_left(self.switches, n))]


def boundaries_of(scheme: PositionalScheme, plan: ExtensionPlan | None) -> Boundaries:
    """Return the boundaries of a model under a plan. Frequencies outside the plan are those of the checkpoint."""
    planned = plan.rotaries if plan is not None else ()
    changed = {entry.name for entry in planned}
    shipped = [rotary for rotary in scheme.rotaries if rotary.name not in changed]
    switches = {
        int(rotary.shipped.get("original_max_position_embeddings") or scheme.trained_length or 0)
        for rotary in shipped
        if rotary.shipped_type == "longrope"
    }
    if plan is not None and any(entry.short_inv_freq is not None for entry in planned):
        switches.add(plan.trained_length)
    dynamic = any(rotary.shipped_type == "dynamic" for rotary in shipped) or (plan is not None and plan.follows_rows)
    return Boundaries(tuple(sorted(switches)), dynamic)


def check_positions(scheme: PositionalScheme, plan: ExtensionPlan | None, longest: int) -> None:
    """Check that no length exceeds the position table under a plan. A GPU aborts on an index past its end."""
    rows = scheme.shipped_length if plan is None or plan.changes_nothing else plan.target_length
    if scheme.ends and rows is not None and longest > rows:
        table = "learned table" if scheme.kind == "learned" else "table"
        raise InvalidParameterError(
            f"{scheme.model_type} has a {table} of {rows} positions, and {longest} tokens were asked for. "
            f"Pass lengths up to {rows}."
        )


logger = logging.getLogger(__name__)


def ran_out(error: Exception) -> bool:
    """Return `True` if an error is an out-of-memory error of any device."""
    return isinstance(error, torch.OutOfMemoryError) or bool(should_reduce_batch_size(error))


def halved(unit: str, amount: int, reason: str) -> int:
    """Return half of `amount`, after logging it and emptying the device's memory cache.

    Call it when the error is out of scope, because its frames hold the tensors that did not fit.
    """
    clear_device_cache(garbage_collection=True)
    logger.warning("out of memory, so %s go from %d to %d: %s", unit, amount, amount // 2, reason)
    return amount // 2


@dataclass
class Part:
    """Slice of a range. Inside `with part:`, an out-of-memory error ends only the block and is recorded.

    `reason` is the first line of that error. Without `gives_way` the error propagates.
    """

    begin: int
    end: int
    gives_way: bool
    reason: str | None = None

    @property
    def items(self) -> slice:
        """Items as an index."""
        return slice(self.begin, self.end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not self.gives_way or not isinstance(error, RuntimeError) or not ran_out(error):
            return False
        self.reason = first_line(error)  # not the error itself: its frames hold the tensors that did not fit
        return True


class Room:
    """Splitter of ranges into batches that fit in memory.

    ```python
    for part in room.parts(range(len(rows)), cost=length):
        with part:  # repeated with a shorter part if memory runs out
            out[part.items] = work(rows[part.items])
    ```

    `amount` is the total cost of the items that fit at once. It is halved when memory runs out, and stays halved.
    Without `gives_way` out-of-memory errors propagate.
    """

    def __init__(self, unit: str, amount: int, gives_way: bool = True) -> None:
        self.unit, self.amount, self.gives_way = unit, amount, gives_way

    def parts(self, items: range, cost: int, otherwise: Callable[[str], None] | None = None) -> Iterator[Part]:
        """Yield the batches of a range in order. A batch that ran out of memory is repeated with half its items.

        If a single item does not fit, `otherwise` is called with the first line of the error. It frees memory by other
        means, or raises. Without `otherwise` the error propagates.
        """
        begin = items.start
        while begin < items.stop:
            size = min(max(1, self.amount // cost), items.stop - begin)
            part = Part(begin, begin + size, self.gives_way and (size > 1 or otherwise is not None))
            yield part
            if part.reason is None:
                begin += size
            elif size > 1:
                self.amount = halved(self.unit, size, part.reason) * cost
            elif otherwise is not None:
                otherwise(part.reason)


NO_CACHE = "it has no cache that goes from one forward to the next"

SMALLEST_CHUNK = 64
"""Tokens in the shortest chunk. Shorter chunks save almost no memory. If it does not fit, the cache is too large."""


class Chunk(NamedTuple):
    """Tokens `begin` to `end` (exclusive) of a text, and the model's output for them."""

    begin: int
    end: int
    read: Read


def chunk_bounds(length: int, chunk: int, boundaries: Boundaries) -> list[tuple[int, int]]:
    """Return the bounds of the chunks of a text of `length` tokens.

    LongRoPE with two lists of frequencies chooses one by the last position in a forward. If a text is longer than the
    trained length, its first chunk also is, so all chunks use the same list.
    """
    first = max([chunk, *(switch + 1 for switch in boundaries.switches if switch < length)])
    ends = [*range(min(first, length), length, chunk), length]
    return list(zip([0, *ends[:-1]], ends, strict=True))


class Prefill:
    """Reader of texts with one model, in chunks of `chunk` tokens if requested.

    For each patch, a prefix of 16 tokens is read both ways to check that chunks reproduce the logits of a full
    forward. A model without a cache is refused, and so is an offloaded cache outside of CUDA.
    """

    def __init__(self, model: Any, chunk: int | None, offload_cache: bool) -> None:
        self.model = model
        self.chunk = chunk
        self.requested = chunk is not None
        self.offload_cache = offload_cache
        self._checked: tuple[Any, Boundaries, str | None] | None = None  # the checked patch and the result
        if chunk is not None and cache_argument(type(model).forward) is None:
            raise UnsupportedModelError(self._refusal(NO_CACHE))
        if offload_cache and model.device.type != "cuda":
            raise InvalidParameterError(
                f"offload_cache moves the cache of a CUDA device to main memory, and {type(model).__name__} is on "
                f"{model.device.type!r}. Leave it out."
            )

    def chunks(self, head: Head, input_ids: torch.Tensor) -> Iterator[Chunk]:
        """Yield the chunks of a batch of texts `(batch, length)` in order.

        A model whose current patch returns other logits in chunks is refused, if chunks were requested.
        """
        length = input_ids.shape[1]
        if self.chunk is not None and self.chunk < length:
            boundaries, obstacle = self._check(input_ids)
            if obstacle is None:
                yield from self._read(head, input_ids, chunk_bounds(length, self.chunk, boundaries))
                return
            if self.requested:
                raise UnsupportedModelError(self._refusal(obstacle))
        yield Chunk(0, length, head.read(input_ids, use_cache=False))

    def shorten(self, input_ids: torch.Tensor, reason: str) -> None:
        """Halve the chunks from now on, because the current ones did not fit, or raise if that would not help."""
        length = input_ids.shape[1]
        chunk = min(self.chunk or length, length)
        _, obstacle = self._check(input_ids)
        if obstacle is None and chunk >= 2 * SMALLEST_CHUNK:
            self.chunk = halved("tokens in a chunk", chunk, reason)
            return
        why = f"not even in chunks of {chunk}" if obstacle is None else f"and not in chunks either: {obstacle}"
        raise OutOfMemoryError(
            f"{length} tokens do not fit into memory ({reason}), {why}. Pass shorter lengths, load the model with "
            "dtype=torch.bfloat16, or choose offload_cache=True on a CUDA device."
        )

    def _read(self, head: Head, input_ids: torch.Tensor, bounds: list[tuple[int, int]]) -> Iterator[Chunk]:
        forward = type(self.model).forward
        cache = DynamicCache(config=self.model.config, offloading=True) if self.offload_cache else None
        for begin, end in bounds:
            read = head.read(input_ids[:, begin:end], use_cache=True, **with_cache(forward, cache))
            yield Chunk(begin, end, read)
            cache = cache_of(read.output)
            if self.offload_cache:
                torch.cuda.synchronize()  # transformers 5.10 prefetches keys before their offloading has finished

    def _check(self, input_ids: torch.Tensor) -> tuple[Boundaries, str | None]:
        """Return the boundaries, and the reason why the currently patched model cannot read in chunks, or `None`."""
        patch = find_patch(self.model)
        if self._checked is None or self._checked[0] is not patch:
            scheme, plan = detect_scheme(self.model), None if patch is None else patch.plan
            boundaries = boundaries_of(scheme, plan)
            obstacle = prefill_obstacle(scheme, plan) or self._probe(input_ids[:1, :PROBE_LENGTH], boundaries)
            self._checked = (patch, boundaries, obstacle)
        return self._checked[1:]

    def _probe(self, input_ids: torch.Tensor, boundaries: Boundaries) -> str | None:
        """Return the reason why chunks change the logits; `None` if they do not."""
        if cache_argument(type(self.model).forward) is None:
            return NO_CACHE
        head = FullHead(self.model)
        full = head.read(input_ids, use_cache=False).output.logits
        bounds = chunk_bounds(input_ids.shape[1], PROBE_SLICE, boundaries)
        try:
            logits = [chunk.read.output.logits for chunk in self._read(head, input_ids, bounds)]
            difference = deviation(torch.cat(logits, dim=1), full)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None if difference is None else f"its logits differ by {difference:.2g}"

    def _refusal(self, obstacle: str) -> str:
        return f"{type(self.model).__name__} cannot read a text in chunks: {obstacle}; leave prefill_chunk out"


def prefill_obstacle(scheme: PositionalScheme, plan: ExtensionPlan | None) -> str | None:
    """Return the known reason why chunks would change a model's values under a plan, or `None`.

    The reason is that the positions of every token follow the length of the input (dynamic NTK, dynamic YaRN).
    """
    if not boundaries_of(scheme, plan).dynamic:
        return None
    name = scheme.model_type if plan is None or plan.changes_nothing else plan.method
    return f"the positions of {name} follow the length of the input"
