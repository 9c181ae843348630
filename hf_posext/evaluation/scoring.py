"""Negative log-likelihood of every token, exact, with constant memory on the vocabulary side.

A naive loop holds logits of shape `(length, vocabulary)`, several times: 168 GB at 128k tokens of Llama-3. Here the
trunk (everything below the head) runs once, and the model's own `forward` is replayed on slices of what the trunk
gave, so that the head and whatever follows it (logit scaling, softcaps) are the model's own code, slice by slice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import EvaluationError, UnsupportedModelError
from ..patching.detect import unwrap

logger = logging.getLogger(__name__)

LOGITS_BUDGET = 32 * 2**20
"""Bytes of float32 logits that exist at a time; 32 MiB measured fastest between 16 MiB and 2 GiB."""

BATCH_TOKENS = 16_384
"""Tokens that go through the trunk together where windows of equal shape are batched."""

PROBE_LENGTH = 16
PROBE_SLICE = 5
"""The check of a new model runs on this many tokens, in slices of this many (the last slice is a shorter one)."""


class TokenScorer:
    """
    Scores tokens with a causal language model, for as long as a measurement lasts.

    On first use it checks, on a prefix of 16 tokens, that the model is causal and that slices give the logits of a
    full forward; where they do not, it says so in the log and keeps full logits from then on.

    Args:
        model (`torch.nn.Module`): a causal language model of transformers, also inside a PEFT or DDP wrapper.

    Raises:
        UnsupportedModelError: an encoder, an encoder-decoder, a model without head, or one with prompt tuning.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = scored_model(model)
        name = type(self.model).__name__
        if getattr(self.model.config, "is_encoder_decoder", False) or not self.model.can_generate():
            raise UnsupportedModelError(
                f"{name} has no causal language-model loss, so it has no perplexity; "
                "load a decoder with AutoModelForCausalLM.from_pretrained(...)"
            )
        self._sliced: bool | None = None

    @torch.inference_mode()
    def token_nll(self, input_ids: torch.Tensor, first: int = 1) -> torch.Tensor:
        """
        NLL of each token given all tokens before it in its row.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): rows without padding.
            first (`int`, *optional*, defaults to 1): index of the first token to score.

        Returns:
            `torch.FloatTensor` of shape `(batch, length - first)`, float32 on the CPU, in nats. A value that is not
            finite means that the logits there were not.
        """
        input_ids = input_ids.to(self.model.device)
        if self._sliced is None:
            self._sliced = self._check(input_ids[:1, :PROBE_LENGTH])
        rows = range(first - 1, input_ids.shape[1] - 1)
        nll = []
        for begin, logits in self._logits(input_ids, rows, sliced=self._sliced):
            targets = input_ids[:, begin + 1 : begin + 1 + logits.shape[1]].to(logits.device)
            # Float32 whatever the model's dtype: in bfloat16 the sums of the softmax alone are off by a per cent.
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
            nll.append(loss.view(targets.shape))
        return torch.cat(nll, dim=1).cpu()

    def _logits(self, input_ids: torch.Tensor, rows: range, sliced: bool, size: int = 0) -> Iterator[Any]:
        """Pairs of the first row and logits `(batch, rows of the slice, vocabulary)`, in order."""
        if not sliced:
            full = self.model(input_ids=input_ids, use_cache=False).logits
            size = size or self._slice_size(input_ids, full.shape[-1])
            for begin in range(rows.start, rows.stop, size):
                yield begin, full[:, begin : min(begin + size, rows.stop)]
            return
        trunk = self._trunk()
        original, captured = trunk.forward, []

        def run_and_keep(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            captured.append(output)
            return with_hidden_states(
                output, hidden_states(output)[:, -1:]
            )  # one row, so that no large logits come out

        with _forward_replaced(trunk, run_and_keep):
            last = self.model(input_ids=input_ids, use_cache=False).logits
        (output,) = captured
        hidden = hidden_states(output)
        size = size or self._slice_size(input_ids, last.shape[-1])
        for begin in range(rows.start, rows.stop, size):
            end = min(begin + size, rows.stop)
            piece = with_hidden_states(output, hidden[:, begin:end])
            with _forward_replaced(trunk, lambda *args, piece=piece, **kwargs: piece):
                logits = self.model(input_ids=input_ids[:, begin:end], use_cache=False).logits
            yield begin, logits

    def _trunk(self) -> nn.Module:
        trunk: nn.Module = self.model.base_model
        if trunk is self.model:
            raise UnsupportedModelError(f"{type(self.model).__name__} has no base model apart from its head")
        return trunk

    @staticmethod
    def _slice_size(input_ids: torch.Tensor, vocabulary: int) -> int:
        return max(1, LOGITS_BUDGET // (4 * vocabulary * input_ids.shape[0]))

    def _check(self, input_ids: torch.Tensor) -> bool:
        """Whether the head can run in slices; raises where the model is not causal.

        Logits are compared, relative to the largest: products of matrices of other shapes round differently, by some
        eps of the dtype, while a head that sees other inputs than the slice is off by the size of the logits.
        """
        full = self.model(input_ids=input_ids, use_cache=False).logits
        finite = bool(torch.isfinite(full).all())
        tolerance = max(1e-4, 8 * torch.finfo(full.dtype).eps) * float(full.abs().max())
        changed = input_ids.clone()
        changed[:, -1] = (changed[:, -1] + 1) % full.shape[-1]
        other = self.model(input_ids=changed, use_cache=False).logits
        if finite and (full - other)[:, :-1].abs().max() > tolerance:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} is not causal: its last token changes the logits of earlier ones, so it "
                "has no perplexity; load a decoder with AutoModelForCausalLM.from_pretrained(...)"
            )
        try:
            pieces = self._logits(input_ids, range(input_ids.shape[1]), sliced=True, size=PROBE_SLICE)
            sliced = torch.cat([logits for _, logits in pieces], dim=1)
            deviation = float((sliced - full).abs().max())
            reason = f"slices differ from full logits by {deviation:.2g}" if finite and deviation > tolerance else None
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            logger.warning(
                "%s keeps its logits in full (memory: length x vocabulary), since its head cannot run in slices: %s",
                type(self.model).__name__,
                reason,
            )
        return reason is None


def scored_model(model: nn.Module) -> Any:
    """The transformers model inside a wrapper, if what it gives to a token is of this token.

    Raises:
        UnsupportedModelError: prompt tuning, which puts virtual tokens before the others.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise UnsupportedModelError(
            "the model has a PEFT adapter of the prompt-learning kind, whose virtual tokens would be scored; "
            "measure a model with LoRA or merged weights, or without the adapter"
        )
    return unwrap(model)


def require_finite(nll: Any, document: str, tokens: Sequence[int] | None = None) -> None:
    """Refuse NLL that is not finite, naming the document and the position.

    Args:
        nll (`numpy.ndarray` of shape `(scored tokens,)`): of one document.
        document (`str`): its id.
        tokens (`Sequence[int]`, *optional*): which tokens they are of; 1, 2, ... if not given.

    Raises:
        EvaluationError: a value is NaN or infinite.
    """
    bad = (~torch.isfinite(torch.as_tensor(nll))).nonzero()
    if len(bad):
        first = tokens[int(bad[0])] if tokens else int(bad[0]) + 1
        raise EvaluationError(
            f"logits are not finite in document {document!r}, first at token {first}; "
            "load the model with dtype=torch.float32 or bfloat16, or choose a smaller factor"
        )


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another `forward` on one instance, inside; without a trace afterwards."""
    own = vars(module).get("forward")  # accelerate's hooks set one on the instance
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


def hidden_states(output: Any) -> torch.Tensor:
    """What a trunk gives to the head."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output["last_hidden_state"]
    return hidden


def with_hidden_states(output: Any, hidden: torch.Tensor) -> Any:
    """The same output of a trunk with other hidden states."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    return type(output)(**{**output, "last_hidden_state": hidden})
