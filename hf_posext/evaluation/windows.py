"""The interface of protocols, the windows that they read, and the control.

The control scores the same tokens with the unpatched model and a context truncated to the trained length. A perplexity
that falls with length proves nothing by itself, since later tokens of a document are easier; it falls for a model that
sees no more than its trained length, too. The worth of a longer context is the distance to the control.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn

from ..errors import InvalidParameterError
from .memory import Boundaries
from .scorer import BATCH_TOKENS, Memory, TokenScorer
from .tokens import TokenizedDocuments, first_scored


class Measurement(NamedTuple):
    """NLL of one document at one context length.

    Args:
        length (`int`): context length in tokens.
        nll (`numpy.ndarray` of shape `(scored tokens,)`): float64, in nats, in the order of the text.
        first (`int`, *optional*, defaults to 1): index in the row of the first token that is scored, if all after it
            are scored up to the last; `None` if they are a sample, or overlap.
        tail (`int`, *optional*): how many of the last lie in the second half of the text; by default the text is what
            is scored and the token before it.
        groups (`tuple[int, ...]`, *optional*): of a legacy protocol: sizes of the groups of tokens, in order, whose
            means are averaged; such an average is told of no stretch of the text.
        places (`numpy.ndarray` of shape `(scored tokens,)`, *optional*): of a sample: indices in the row of its
            tokens, one in the middle of each of equally long parts of the text.
    """

    length: int
    nll: np.ndarray
    first: int | None = 1
    tail: int | None = None
    groups: tuple[int, ...] | None = None
    places: np.ndarray | None = None


class PerplexityProtocol(ABC):
    """A way to measure one document, in one pass at a time; looping and distributing is left to the caller.

    A pass is one document, and the lengths that it measures together.

    Attributes:
        name (`str`): in results and on the command line.
        legacy (`bool`): `True` for a published average that weighs tokens unequally; marked in every output.
    """

    name: ClassVar[str]
    legacy: ClassVar[bool] = False

    @abstractmethod
    def bos_rule(self, bos: int) -> str:
        """Place of the `bos` special tokens that stand before a text, in words."""

    @abstractmethod
    def scorer(self, model: nn.Module, tokenizer: Any, memory: Memory) -> Any:
        """Scorer of tokens for this protocol; it has the bare model as `model`, and is handed to the methods below.

        Raises:
            UnsupportedModelError: the protocol means nothing for such a model.
        """

    def arrange(self, documents: TokenizedDocuments) -> TokenizedDocuments:
        """The rows as the protocol measures them.

        Raises:
            InvalidParameterError: too few tokens for it.
        """
        return documents

    def passes(self, lengths: list[int], boundaries: Boundaries) -> list[list[int]]:
        """The lengths, ascending, by pass."""
        return [[length] for length in lengths]

    def measure(self, scorer: Any, documents: TokenizedDocuments, index: int, lengths: list[int]) -> list[Measurement]:
        """One document at the lengths of one pass; a context of that length cuts nothing off.

        Raises:
            NonFiniteError: logits of this document are not finite.
            EvaluationError: nothing can be measured in this way.
        """
        return self.measure_control(scorer, documents, index, lengths, lengths[-1])

    @abstractmethod
    def measure_control(
        self, scorer: Any, documents: TokenizedDocuments, index: int, lengths: list[int], trained_length: int
    ) -> list[Measurement]:
        """The same tokens at any lengths, each given at most `trained_length` tokens (2 or more) of context.

        Where a length is not above `trained_length` this is what `measure` gives, up to rounding.
        """

    @abstractmethod
    def reads(self, lengths: list[int], longest: int) -> list[int]:
        """Tokens of each forward in one pass over a document of `longest` tokens, for progress and balancing."""


def is_legacy(name: str) -> bool:
    """Return `True` if a protocol, by its name in results, reproduces a published average."""
    return name.startswith("legacy-")


LINEAR_COST = 16_384
"""Tokens of context at which attention costs as much as all that is linear in the length: four to twelve times the
width of a model. Costs balance work between processes, and need be no better than that."""


def cost_of(reads: Iterable[int]) -> float:
    """Relative cost of forwards over so many tokens each."""
    return float(sum(size * (size + LINEAR_COST) for size in reads))


class Window(NamedTuple):
    """Some tokens of a row that a model reads in one forward.

    Args:
        begin (`int`): tokens `begin` to `end` are read, all but the last if `last_read` is not set.
        first (`int`): tokens `first` to `end` are scored.
        end (`int`): exclusive.
        bos (`int`): tokens of the special prefix (the first of the row) that are read before them.
        last_read (`bool`): whether the last token is read, of which nothing follows.
    """

    begin: int
    first: int
    end: int
    bos: int = 0
    last_read: bool = True

    @property
    def size(self) -> int:
        """Number of tokens that are read."""
        return self.end - self.begin + self.bos - (not self.last_read)

    def cut(self, size: int) -> Window:
        """The same window where at most `size` tokens are read; it may score nothing."""
        return self._replace(end=max(self.first, self.end - max(0, self.size - size)))


def check_stride(window: int, stride: int, bos: int = 1) -> None:
    """Refuse a stride that is none, or that skips tokens, where windows begin with `bos` special tokens."""
    longest = window - first_scored(bos)
    if not 1 <= stride <= longest:
        raise InvalidParameterError(
            f"stride is {stride} for windows of {window} tokens. Pass 1 to {longest} (a longer one skips tokens)."
        )


def sliding_windows(total: int, window: int, stride: int, bos: int) -> list[Window]:
    """Windows that score each token of a text exactly once, except for the first where no special token is before it.

    Texts of `total` tokens and every window of `window` tokens include the special prefix of `bos` tokens.
    """
    check_stride(window, stride, bos)
    windows = [Window(bos, first_scored(bos), min(window, total), bos)]
    while windows[-1].end < total:
        begin = windows[-1].begin + stride
        windows.append(Window(begin, windows[-1].end, min(begin + window - bos, total), bos))
    return windows


def rolling_windows(total: int, window: int, bos: int = 0) -> list[Window]:
    """Disjoint windows of lm-eval (`get_rolling_token_windows` with `context_len=1`, `max_seq_len=window`).

    Each reads `window` tokens and scores the `window` after its first; the last one begins earlier, so that it reads
    as many. Special tokens are in the first window only, and are not scored.
    """
    windows = [Window(0, first_scored(bos), min(window + 1, total), last_read=False)]
    while windows[-1].end < total:
        end = min(windows[-1].end + window, total)
        windows.append(Window(end - window - 1, windows[-1].end, end, last_read=False))
    return windows


def windows_nll(scorer: TokenScorer, row: torch.Tensor, windows: Sequence[Window]) -> np.ndarray:
    """NLL of the tokens of a row that windows score, in their order; float64, in nats. Neighbours of equal shape are
    batched."""
    pieces = []
    shape = {"key": lambda w: (w.end - w.begin, w.end - w.first, w.bos, w.last_read)}
    for (size, scored, bos, last_read), alike in itertools.groupby(windows, **shape):
        begins = [w.begin for w in alike]
        per_batch = max(1, BATCH_TOKENS // size)
        for at in range(0, len(begins), per_batch):
            batch = torch.stack([row[begin : begin + size] for begin in begins[at : at + per_batch]])
            if bos:
                batch = torch.cat([row[:bos].expand(len(batch), bos), batch], dim=1)
            nll = scorer.token_nll(batch, first=batch.shape[1] - scored, last_read=last_read)
            pieces.append(nll.flatten())
    return torch.cat(pieces).double().numpy()


def windowed_nll(scorer: TokenScorer, row: torch.Tensor, window: int, stride: int, bos: int) -> np.ndarray:
    """NLL of one document read through a sliding window, from the first token after the special prefix on; float64, in
    nats."""
    return windows_nll(scorer, row, sliding_windows(len(row), window, stride, bos))


CONTROL = "truncated"
"""The name of the control among the per-document results."""


def control_stride(trained_length: int) -> int:
    """An eighth of the trained length, so that every token has seven eighths of it as context."""
    return max(1, trained_length // 8)


def control_windows(tokens: int, trained_length: int) -> int:
    """Forwards of the control over so many tokens of a document."""
    return 1 + max(0, -(-(tokens - trained_length) // control_stride(trained_length)))


class TruncatedReader:
    """Reads the windows of one document with at most `size` tokens of context for each token.

    What a window scores among its first `size` tokens comes from one forward over them, exactly as the protocol reads
    them; later tokens come from windows of `size` tokens that end every [`control_stride`] tokens of the document, and
    begin with the special prefix of the document: without it many models collapse, and the control would be unfairly
    weak. A window of no more than `size` tokens is read as it is. No window scores a token before `since`.
    """

    def __init__(self, scorer: TokenScorer, row: torch.Tensor, size: int, bos: int, since: int = 1) -> None:
        self.scorer, self.row, self.size, self.bos, self.since = scorer, row, size, bos, since
        self._far: np.ndarray | None = None

    def nll(self, windows: Sequence[Window]) -> np.ndarray:
        """NLL of the tokens that the windows score, in their order; float64, in nats."""
        near = [window.cut(self.size) for window in windows]
        scored = [window for window in near if window.end > window.first]
        nll = windows_nll(self.scorer, self.row, scored) if scored else np.empty(0)
        if near == list(windows):
            return nll
        if self._far is None:  # of tokens 1, 2, ... of the document; NaN where nothing is scored
            far = self._far_windows()
            self._far = np.append(np.full(far[0].first - 1, np.nan), windows_nll(self.scorer, self.row, far))
        pieces, taken = [], 0
        for window, own in zip(windows, near, strict=True):
            count = own.end - own.first
            pieces += [nll[taken : taken + count], self._far[own.end - 1 : window.end - 1]]
            taken += count
        return np.concatenate(pieces)

    def _far_windows(self) -> list[Window]:
        windows = sliding_windows(len(self.row), self.size, control_stride(self.size), self.bos)
        # The first `size` tokens were read with the windows, of which the first begins at token 0.
        return [window for window in windows if window.end > max(self.size, self.since)]
