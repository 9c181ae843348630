"""Causal language models in two steps: the trunk below the head, and the head on slices of its output.

The model's own `forward` is replayed on slices of the trunk's output. The head and everything after it (logit scaling,
softcaps) are therefore the model's own code. The last product, hidden states times vocabulary, writes every slice to
the same memory: 392 rows of 128,256 logits take 201 MB, which the system would otherwise allocate and free page by
page. If the device supports it, products in half precision return float32 sums. Logits in bfloat16 are off by up to
0.016 nats per token, and float32 sums by 5e-5.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel


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


logger = logging.getLogger(__name__)

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
            raise RuntimeError(f"{type(self.trunk).__name__} runs {len(outputs)} times in a forward")
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
