"""Forwards of a model over long texts in limited memory: the head on slices, smaller batches, and chunks with a cache.

A causal language model runs in two steps: the trunk below the head, and the head on slices of the trunk's output. The
model's own `forward` is replayed on each slice, so the head and everything after it (logit scaling, softcaps) are the
model's own code. The last product, hidden states times vocabulary, writes every slice to the same memory: 392 rows of
128,256 logits take 201 MB, which the system would otherwise allocate and free page by page. If the device supports it,
products in half precision return float32 sums. Logits in bfloat16 are off by up to 0.016 nats per token, and float32
sums by 5e-5.

The trunk reads a text in chunks if requested. The activations of a chunk are freed before the next chunk starts, so
the KV cache bounds the longest text. Every token attends to the same keys as in one forward over the whole text.
Values differ only by rounding, because matrix products have other shapes.
"""

from __future__ import annotations

import functools
import itertools
import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from ..errors import InvalidParameterError, OutOfMemoryError, UnsupportedModelError, first_line
from ..patching.detect import detect_scheme
from ..patching.modes import cache_argument, cache_of, with_cache
from ..patching.patch import find_patch
from ..plan import ExtensionPlan
from ..scheme import PositionalScheme

logger = logging.getLogger(__name__)


class Projection:
    """Replacement for the `forward` of a linear layer without bias. Each call overwrites the previous output."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self._memory: torch.Tensor | None = None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits `(..., vocabulary)` of hidden states `(..., width)`, valid until the next call."""
        weight = self.layer.weight
        if hidden.dtype != weight.dtype or torch.is_autocast_enabled(hidden.device.type):
            return nn.functional.linear(hidden, weight)
        rows = hidden.flatten(0, -2)
        in_float32 = sums_in_float32(weight.device, weight.dtype)
        if self._memory is None or len(self._memory) < len(rows):
            self._memory = rows.new_empty(len(rows), len(weight), dtype=torch.float32 if in_float32 else weight.dtype)
        output = self._memory[: len(rows)]
        options = {"out_dtype": torch.float32} if in_float32 else {}
        logits = torch.mm(rows, weight.T, out=output, **options)
        return logits.view(*hidden.shape[:-1], -1)


@functools.cache
def sums_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return `True` if a device returns float32 from half-precision matrix products. The result is cached."""
    if dtype not in (torch.float16, torch.bfloat16):
        return False
    ones = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        return bool((torch.mm(ones, ones, out_dtype=torch.float32) == 16).all())
    except (RuntimeError, TypeError):  # not supported by this device, or by PyTorch before 2.8
        return False


def projection_of(model: Any) -> Projection | None:
    """Return a projection for the output layer if it is a plain product; otherwise `None`.

    A plain product has no bias, no adapter, and no quantised or sharded weights.
    """
    layer = model.get_output_embeddings()
    plain = type(layer) is nn.Linear and layer.bias is None and "forward" not in vars(layer)
    return Projection(layer) if plain and type(layer.weight.data) is torch.Tensor else None


PROBE_LENGTH = 16
"""Number of tokens in the check of a new model."""

PROBE_SLICE = 5
"""Number of tokens per slice or chunk in that check. The last one is shorter."""


class Read(NamedTuple):
    """Output of a model for some tokens.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`): the tokens.
        trunk (`Any`): input of the head for all tokens. `None` if the head has already processed them.
        output (`ModelOutput`): output of the model, with logits of all tokens if `trunk` is `None`, otherwise only of
            the last token.
        projection ([`Projection`], *optional*): output layer that writes the logits of each slice to the same memory.
    """

    input_ids: torch.Tensor
    trunk: Any
    output: Any
    projection: Projection | None = None


class FullHead:
    """Head that computes the logits of all tokens at once. Fits every model; takes memory of length x vocabulary."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def read(self, input_ids: torch.Tensor, **kwargs: Any) -> Read:
        """Run one forward. `kwargs` go to the model."""
        return Read(input_ids, None, self.model(input_ids=input_ids, **kwargs))

    def logits(self, read: Read, begin: int, end: int) -> torch.Tensor:
        """Return the logits `(batch, end - begin, vocabulary)` of a slice of tokens."""
        logits: torch.Tensor = read.output.logits[:, begin:end]
        return logits


class SlicedHead:
    """Head that computes logits in slices after one forward of the trunk, a model inside the model."""

    def __init__(self, model: Any, trunk: nn.Module) -> None:
        self.model = model
        self.trunk = trunk

    def read(self, input_ids: torch.Tensor, **kwargs: Any) -> Read:
        """Run one forward in which the head sees only the last token. `kwargs` go to the model."""
        original, outputs = self.trunk.forward, []

        def run_and_keep(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            outputs.append(output)
            return with_hidden_states(output, hidden_states(output)[:, -1:])

        with _forward_replaced(self.trunk, run_and_keep):
            output = self.model(input_ids=input_ids, **kwargs)
        if len(outputs) != 1:
            raise RuntimeError(
                f"Expected {type(self.trunk).__name__} to run once in a forward, got {len(outputs)} times."
            )
        (trunk,) = outputs
        return Read(input_ids, trunk, output, projection_of(self.model))

    def logits(self, read: Read, begin: int, end: int) -> torch.Tensor:
        """Return the logits `(batch, end - begin, vocabulary)` of a slice of tokens, valid until the next call."""
        piece = with_hidden_states(read.trunk, hidden_states(read.trunk)[:, begin:end])
        project = read.projection
        projection_context = nullcontext() if project is None else _forward_replaced(project.layer, project)
        with _forward_replaced(self.trunk, lambda *args, **kwargs: piece), projection_context:
            logits: torch.Tensor = self.model(input_ids=read.input_ids[:, begin:end], use_cache=False).logits
        return logits


Head = FullHead | SlicedHead


def find_head(model: Any, input_ids: torch.Tensor, full: torch.Tensor) -> Head:
    """Return a sliced head if the model contains a trunk, otherwise a full head with a warning.

    The trunk is the outermost inner model for which slices of `input_ids` reproduce the logits `full` of one forward.
    """
    reasons = []
    for trunk in model.modules():
        if trunk is model or not isinstance(trunk, PreTrainedModel):
            continue
        head, length = SlicedHead(model, trunk), input_ids.shape[1]
        try:
            read = head.read(input_ids, use_cache=False)
            starts = range(0, length, PROBE_SLICE)
            pieces = [head.logits(read, start, min(start + PROBE_SLICE, length)).clone() for start in starts]
            difference = deviation(torch.cat(pieces, dim=1), full)
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        if difference is None:
            return head
        reasons.append(f"slices differ from full logits by {difference:.2g}")
    logger.warning(
        "%s keeps its logits in full (memory: length x vocabulary), since its head cannot run in slices: %s",
        type(model).__name__,
        reasons[0] if reasons else "there is no model inside it",
    )
    return FullHead(model)


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the `forward` of one instance inside the context, and restore it on exit."""
    instance_forward = vars(module).get("forward")  # set on the instance by accelerate's hooks
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if instance_forward is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = instance_forward


def hidden_states(output: Any) -> torch.Tensor:
    """Return the hidden states that a trunk passes to the head."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output["last_hidden_state"]
    return hidden


def with_hidden_states(output: Any, hidden: torch.Tensor) -> Any:
    """Return a trunk's output with its hidden states replaced."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    return type(output)(**{**output, "last_hidden_state": hidden})


def deviation(logits: torch.Tensor, expected: torch.Tensor) -> float | None:
    """Return the largest difference of logits; `None` if it is within rounding or if `expected` is not finite.

    The tolerance is relative to the largest logit. Matrix products of different shapes differ by some eps of the
    dtype, while different inputs differ by the size of the logits.
    """
    if not torch.isfinite(expected).all():
        return None
    largest = float((logits - expected).abs().max())
    allowed = max(1e-4, 8 * torch.finfo(expected.dtype).eps) * float(expected.abs().max())
    return None if largest <= allowed else largest  # a NaN fails the comparison and is returned


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
            f"Expected texts of at most {rows} tokens, the positions of the {table} of {scheme.model_type}, got "
            f"{longest}. Pass lengths up to {rows}."
        )


def prefill_obstacle(scheme: PositionalScheme, plan: ExtensionPlan | None) -> str | None:
    """Return the known reason why chunks would change a model's values under a plan, or `None`.

    The reason is that the positions of every token follow the length of the input (dynamic NTK, dynamic YaRN).
    """
    if not boundaries_of(scheme, plan).dynamic:
        return None
    name = scheme.model_type if plan is None or plan.changes_nothing else plan.method
    return f"the positions of {name} follow the length of the input"


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
                f"Expected a CUDA device for offload_cache=True, got {type(model).__name__} on {model.device.type!r}. "
                "Leave offload_cache out."
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
            f"Expected memory for {length} tokens, got none ({reason}), {why}. Pass shorter lengths, load the model "
            "with dtype=torch.bfloat16, or choose offload_cache=True on a CUDA device."
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
        name = type(self.model).__name__
        return f"Expected a model that can read in chunks, got {name}: {obstacle}. Leave prefill_chunk out."
