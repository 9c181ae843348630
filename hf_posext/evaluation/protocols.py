"""How perplexity is measured. A number without its protocol is not a result."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from ..errors import EvaluationError, InvalidParameterError
from .control import control_stride
from .scoring import BATCH_TOKENS, TokenScorer, require_finite
from .tokens import TokenizedDocuments


class Measurement(NamedTuple):
    """
    NLL of tokens of one document (float64, in nats), measured for one context length.

    They are tokens 1, 2, ... unless `tail` is given: then they are some, in order, and the last `tail` of them lie in
    the second half of the text.
    """

    length: int
    document: int
    nll: np.ndarray
    tail: int | None = None


class PerplexityProtocol(Protocol):
    """What a protocol is: a name, what scores tokens for it, how it measures them, and what it compares them with."""

    @property
    def name(self) -> str:
        """Name in results and on the command line."""

    def scorer(self, model: nn.Module, tokenizer: Any) -> Any:
        """What scores tokens for this protocol; it has the bare model as `model`, and is handed to the methods below.

        Raises:
            UnsupportedModelError: the protocol means nothing for such a model.
        """

    def measure(
        self, scorer: Any, documents: TokenizedDocuments, lengths: list[int], multipass: bool
    ) -> Iterator[Measurement]:
        """Every document at every length, in any order."""

    def measure_control(
        self, scorer: Any, documents: TokenizedDocuments, lengths: list[int], trained_length: int
    ) -> Iterator[Measurement]:
        """The same tokens, each given at most `trained_length` tokens (2 or more) of context."""


class _OfDecoders:
    """What the protocols of causal language models share."""

    def scorer(self, model: nn.Module, tokenizer: Any) -> TokenScorer:
        return TokenScorer(model)

    def span(self, length: int, longest: int) -> int:
        """How many tokens of a document count at a context length, the first one (which is never scored) included."""
        return length

    def measure_control(
        self, scorer: TokenScorer, documents: TokenizedDocuments, lengths: list[int], trained_length: int
    ) -> Iterator[Measurement]:
        """
        The tokens that the protocol scores, each given at most `trained_length` tokens of context.

        Tokens inside the first `trained_length` come from one forward over them, later ones from windows of that
        length that end every [`control_stride`] tokens. Where the tokenizer adds BOS, every window begins with it:
        without it many models collapse, and the control would be unfairly weak.
        """
        for index, row in enumerate(documents.tokens):
            nll = windowed_nll(scorer, row, trained_length, control_stride(trained_length), documents.bos)
            require_finite(nll, documents.ids[index])
            for length in lengths:
                yield Measurement(length, index, nll[: self.span(length, documents.length) - 1])


@dataclass(frozen=True)
class Prefix(_OfDecoders):
    """
    Perplexity of the first `L` tokens of each document, for every length `L`.

    Token `t` is scored given all tokens before it. Where positions do not depend on the length of the input, one
    forward over the longest length gives all lengths, since a causal token does not see what follows. A method whose
    positions do (`multipass`: LongRoPE with two lists, dynamic NTK) gets a fresh forward for each length.
    """

    name: ClassVar[str] = "prefix"

    def measure(
        self, scorer: TokenScorer, documents: TokenizedDocuments, lengths: list[int], multipass: bool
    ) -> Iterator[Measurement]:
        if multipass:
            # Lengths outside, ascending: transformers' dynamic NTK keeps the largest base that it has ever needed.
            for length, (index, row) in itertools.product(lengths, enumerate(documents.tokens)):
                yield Measurement(length, index, _row_nll(scorer, row[:length], documents.ids[index]))
            return
        shortest = _row_nll(scorer, documents.tokens[0, : lengths[0]], documents.ids[0])
        for index, row in enumerate(documents.tokens):
            nll = _row_nll(scorer, row, documents.ids[index])
            if index == 0:
                require_agreement(shortest, nll, lengths, scorer.model.dtype)
            for length in lengths:
                yield Measurement(length, index, nll[: length - 1])


@dataclass(frozen=True)
class Sliding(_OfDecoders):
    """
    Perplexity of the first `max(lengths)` tokens of each document, read through a window of `L` tokens.

    The window moves by `stride`; each scores the tokens that no earlier one has scored, given what it holds of the
    tokens before them: all in the first window, the last `stride` in the others. Where the tokenizer adds BOS, every
    window begins with it and holds `L - 1` tokens more. These are the windows of PoSE, weighted by token (YaRN's
    script has the same windows and averages their means).

    Args:
        stride (`int`): tokens that the window moves by, at most `L - 1`, since a longer one would skip tokens.
    """

    stride: int
    name: ClassVar[str] = "sliding"

    def span(self, length: int, longest: int) -> int:
        return longest

    def measure(
        self, scorer: TokenScorer, documents: TokenizedDocuments, lengths: list[int], multipass: bool
    ) -> Iterator[Measurement]:
        for length, (index, row) in itertools.product(lengths, enumerate(documents.tokens)):
            nll = windowed_nll(scorer, row, length, self.stride, documents.bos)
            require_finite(nll, documents.ids[index])
            yield Measurement(length, index, nll)


DECODER_PROTOCOLS = ("prefix", "sliding")


def make_protocol(name: str, lengths: list[int], stride: int | None) -> PerplexityProtocol:
    """
    The protocol of that name, for a causal language model.

    Raises:
        InvalidParameterError: no such protocol, a stride where none is used, none where one is, or one that skips
            tokens.
    """
    if name == "prefix":
        if stride is not None:
            raise InvalidParameterError(f"stride is {stride}, and protocol 'prefix' has none; use protocol='sliding'")
        return Prefix()
    if name == "sliding":
        if stride is None:
            raise InvalidParameterError("protocol 'sliding' needs a stride, as in stride=256")
        for length in lengths:
            check_stride(length, stride)
        return Sliding(stride)
    raise InvalidParameterError(f"protocol is {name!r}; choose one of {', '.join(DECODER_PROTOCOLS)}")


class Window(NamedTuple):
    """Tokens `begin` to `end` are read, after BOS where there is one; tokens `first` to `end` are scored."""

    begin: int
    first: int
    end: int


def check_stride(window: int, stride: int) -> None:
    """Refuse a stride that is none, or that skips tokens."""
    if not 1 <= stride <= window - 1:
        raise InvalidParameterError(
            f"stride is {stride} for windows of {window} tokens; give 1 to {window - 1} (a longer one skips tokens)"
        )


def sliding_windows(total: int, window: int, stride: int, bos: bool) -> list[Window]:
    """
    Windows that score each of the tokens 1 to `total - 1` exactly once.

    Args:
        total (`int`): tokens of the document, BOS included.
        window (`int`): tokens that a window holds, BOS included.
        stride (`int`): tokens that it moves by, at most `window - 1`.
        bos (`bool`): whether token 0 is BOS and begins every window.
    """
    check_stride(window, stride)
    offset = 1 if bos else 0
    windows = [Window(offset, 1, min(window, total))]
    while windows[-1].end < total:
        begin = windows[-1].begin + stride
        windows.append(Window(begin, windows[-1].end, min(begin + window - offset, total)))
    return windows


def windowed_nll(scorer: TokenScorer, row: torch.Tensor, window: int, stride: int, bos: bool) -> np.ndarray:
    """
    NLL of tokens 1, 2, ... of one document read through a sliding window; windows of equal shape are batched.

    Args:
        scorer ([`TokenScorer`]): of the model.
        row (`torch.LongTensor` of shape `(tokens,)`): the document.
        window, stride, bos: as in [`sliding_windows`].

    Returns:
        `numpy.ndarray` of shape `(tokens - 1,)`, float64, in nats.
    """
    pieces = []
    windows = sliding_windows(len(row), window, stride, bos)
    for (size, scored), group in itertools.groupby(windows, key=lambda w: (w.end - w.begin, w.end - w.first)):
        begins = [w.begin for w in group]
        per_batch = max(1, BATCH_TOKENS // window)
        for at in range(0, len(begins), per_batch):
            batch = torch.stack([row[begin : begin + size] for begin in begins[at : at + per_batch]])
            if bos:
                batch = torch.cat([row[:1].expand(len(batch), 1), batch], dim=1)
            pieces.append(scorer.token_nll(batch, first=batch.shape[1] - scored).flatten())
    return torch.cat(pieces).double().numpy()


def require_agreement(fresh: np.ndarray, nll: np.ndarray, lengths: list[int], dtype: torch.dtype) -> None:
    """
    The guard of the one-pass protocol: a fresh forward at the shortest length gives what the longest gave there.

    The mean absolute difference may be 1e-4 nats, a hundred times the rounding of float32 between products of other
    shapes, or four eps of a shorter dtype (0.03 for bfloat16), whose logits are rounded to some eps of their size.
    Positions that depend on the length move it by more: dynamic NTK by 0.1 and more.

    Raises:
        EvaluationError: they disagree.
    """
    deviation = float(np.abs(fresh - nll[: len(fresh)]).mean())
    allowed = max(1e-4, 4 * torch.finfo(dtype).eps)
    if deviation > allowed:
        raise EvaluationError(
            f"one forward over {lengths[-1]} tokens and a fresh one over {lengths[0]} disagree by {deviation:.2g} "
            f"nats a token (allowed {allowed:.2g}): the positions of this model depend on the length of its input, "
            "so its method must say multipass; measure one length at a time"
        )


def _row_nll(scorer: TokenScorer, row: torch.Tensor, document: str) -> np.ndarray:
    nll = scorer.token_nll(row[None])[0].double().numpy()
    require_finite(nll, document)
    return nll
