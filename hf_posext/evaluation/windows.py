"""Interface of protocols, the windows they read, and the control.

The control scores the same tokens with the unpatched model and a context truncated to the trained length. A perplexity
that falls with length proves nothing by itself, because later tokens of a document are easier. It also falls for a
model limited to its trained length. The benefit of a longer context is the difference from the control.
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
from .forwards import Boundaries
from .scorer import BATCH_TOKENS, Memory, TokenScorer
from .tokens import TokenizedDocuments, first_scored


class Measurement(NamedTuple):
    """NLL of one document at one context length.

    Args:
        length (`int`): context length in tokens.
        nll (`numpy.ndarray` of shape `(scored tokens,)`): float64, in nats, in text order.
        first (`int`, *optional*, defaults to 1): row index of the first scored token, if the scored tokens are
            contiguous; `None` if they are a sample or overlap.
        tail (`int`, *optional*): number of scored tokens in the second half of the text. By default the text is the
            scored tokens and the token before them.
        groups (`tuple[int, ...]`, *optional*): sizes of the token groups, in order, whose means a legacy protocol
            averages. Results then contain no gain by position.
        places (`numpy.ndarray` of shape `(scored tokens,)`, *optional*): row indices of a sample's tokens, one in the
            middle of each of equally long parts of the text.
    """

    length: int
    nll: np.ndarray
    first: int | None = 1
    tail: int | None = None
    groups: tuple[int, ...] | None = None
    places: np.ndarray | None = None


class PerplexityProtocol(ABC):
    """Protocol that measures one document in one pass. The caller loops over and distributes passes.

    A pass is one document and the lengths measured together. `name` is the name in results and on the command line,
    and `option` the setting that the protocol requires.
    """

    name: ClassVar[str]
    option: ClassVar[str | None] = None

    def check(self, lengths: list[int]) -> None:  # noqa: B027  # most protocols have no option
        """Refuse an option that the lengths do not allow."""

    @abstractmethod
    def bos_rule(self, bos: int) -> str:
        """Return a description of where the `bos` special tokens of a text are."""

    @abstractmethod
    def scorer(self, model: nn.Module, tokenizer: Any, memory: Memory) -> Any:
        """Return a token scorer for `measure`, or refuse the model. Its `model` is the model without wrappers."""

    def arrange(self, documents: TokenizedDocuments) -> TokenizedDocuments:
        """Return the rows as the protocol measures them, or refuse documents with too few tokens."""
        return documents

    def passes(self, lengths: list[int], boundaries: Boundaries) -> list[list[int]]:
        """Return the lengths of each pass, ascending."""
        return [[length] for length in lengths]

    @abstractmethod
    def measure(
        self, scorer: Any, documents: TokenizedDocuments, index: int, lengths: list[int], context: int | None = None
    ) -> list[Measurement]:
        """Return the measurements of one document at the lengths of one pass.

        For the control, `context` is the most tokens of context per token (2 or more). It allows any lengths, scores
        the same tokens, and changes no value of lengths up to `context` except for rounding.

        Raises:
            NonFiniteError: logits of this document are not finite.
            EvaluationError: the document cannot be measured.
        """

    @abstractmethod
    def reads(self, lengths: list[int], longest: int) -> list[int]:
        """Return the tokens per forward of a pass over `longest` tokens, for progress and load balancing."""


def is_legacy(name: str) -> bool:
    """Return `True` for a published average that weights tokens unequally, which every output marks."""
    return name.startswith("legacy-")


LINEAR_COST = 16_384
"""Tokens of context at which attention costs as much as all work linear in the length: four to twelve times the width
of a model. The estimate only balances work between processes."""


def cost_of(reads: Iterable[int]) -> float:
    """Return the relative cost of forwards that read these numbers of tokens."""
    return float(sum(size * (size + LINEAR_COST) for size in reads))


class Window(NamedTuple):
    """Window of a row that a model reads in one forward.

    Args:
        begin (`int`): index of the first token read after the special prefix.
        first (`int`): index of the first scored token.
        end (`int`): end of the window, exclusive. Tokens up to it are scored.
        bos (`int`, *optional*, defaults to 0): tokens of the special prefix, from the beginning of the row, that are
            read before the window.
        last_read (`bool`, *optional*, defaults to `True`): whether the last token is read, although no token after it
            is scored.
    """

    begin: int
    first: int
    end: int
    bos: int = 0
    last_read: bool = True

    @property
    def size(self) -> int:
        """Number of tokens read."""
        return self.end - self.begin + self.bos - (not self.last_read)

    def cut(self, size: int) -> Window:
        """Return the window shortened to read at most `size` tokens. It may score no tokens."""
        return self._replace(end=max(self.first, self.end - max(0, self.size - size)))


def check_stride(window: int, stride: int, bos: int = 1) -> None:
    """Check that a stride is at least 1 and skips no tokens, for windows with `bos` special tokens."""
    longest = window - first_scored(bos)
    if not 1 <= stride <= longest:
        raise InvalidParameterError(
            f"stride is {stride} for windows of {window} tokens. Pass 1 to {longest} (a longer one skips tokens)."
        )


def sliding_windows(total: int, window: int, stride: int, bos: int) -> list[Window]:
    """Return windows that score each token of a text exactly once.

    The special prefix is not scored, nor is token 0 of a text without one. The text of `total` tokens and every window
    of `window` tokens include the special prefix of `bos` tokens.
    """
    check_stride(window, stride, bos)
    windows = [Window(bos, first_scored(bos), min(window, total), bos)]
    while windows[-1].end < total:
        begin = windows[-1].begin + stride
        windows.append(Window(begin, windows[-1].end, min(begin + window - bos, total), bos))
    return windows


def rolling_windows(total: int, window: int, bos: int = 0) -> list[Window]:
    """Return the windows of lm-eval (`get_rolling_token_windows` with `context_len=1`, `max_seq_len=window`).

    The scored tokens of the windows are disjoint. Each window reads `window` tokens and predicts the token after each.
    The last window begins earlier to read equally many, and scores only the remaining tokens. Special tokens are only
    in the first window, and are not scored.
    """
    windows = [Window(0, first_scored(bos), min(window + 1, total), last_read=False)]
    while windows[-1].end < total:
        end = min(windows[-1].end + window, total)
        windows.append(Window(end - window - 1, windows[-1].end, end, last_read=False))
    return windows


def windows_nll(scorer: TokenScorer, row: torch.Tensor, windows: Sequence[Window]) -> np.ndarray:
    """Return the NLL of the tokens scored by windows of a row, in window order; float64, in nats."""

    def shape(window: Window) -> tuple[int, int, int, bool]:
        return window.end - window.begin, window.end - window.first, window.bos, window.last_read

    pieces = []
    for (size, scored, bos, last_read), alike in itertools.groupby(windows, shape):  # batches of equal shape
        begins = [window.begin for window in alike]
        per_batch = max(1, BATCH_TOKENS // size)
        for start in range(0, len(begins), per_batch):
            batch = torch.stack([row[begin : begin + size] for begin in begins[start : start + per_batch]])
            if bos:
                batch = torch.cat([row[:bos].expand(len(batch), bos), batch], dim=1)
            nll = scorer.token_nll(batch, first=batch.shape[1] - scored, last_read=last_read)
            pieces.append(nll.flatten())
    return torch.cat(pieces).double().numpy()


def windowed_nll(scorer: TokenScorer, row: torch.Tensor, window: int, stride: int, bos: int) -> np.ndarray:
    """Return the NLL of one document under a sliding window, from the first scored token on; float64, in nats."""
    return windows_nll(scorer, row, sliding_windows(len(row), window, stride, bos))


CONTROL = "truncated"
"""Name of the control in the results per document."""


def control_stride(trained_length: int) -> int:
    """Return an eighth of the trained length, which leaves every far token at least seven eighths of it as context."""
    return max(1, trained_length // 8)


def control_windows(tokens: int, trained_length: int) -> int:
    """Return the number of forwards of the control over `tokens` tokens of a document."""
    return 1 + max(0, -(-(tokens - trained_length) // control_stride(trained_length)))


class TruncatedReader:
    """Reader of the windows of one document with at most `size` tokens of context per token.

    The scored tokens among the first `size` tokens of a window come from one forward over these, exactly as in the
    protocol. Later tokens come from windows of `size` tokens that end every [`control_stride`] tokens of the document.
    They begin with the special prefix of the document, because many models collapse without it, and the control would
    be unfairly weak. Windows of at most `size` tokens are unchanged. Far windows that end at or before `since` are
    skipped.
    """

    def __init__(self, scorer: TokenScorer, row: torch.Tensor, size: int, bos: int, since: int = 1) -> None:
        self.scorer, self.row, self.size, self.bos, self.since = scorer, row, size, bos, since
        self._far: np.ndarray | None = None

    def nll(self, windows: Sequence[Window]) -> np.ndarray:
        """Return the NLL of the tokens scored by the windows, in window order; float64, in nats."""
        near = [window.cut(self.size) for window in windows]
        scored = [window for window in near if window.end > window.first]
        nll = windows_nll(self.scorer, self.row, scored) if scored else np.empty(0)
        if near == list(windows):
            return nll
        if self._far is None:  # NLL of tokens 1, 2, ... of the document; NaN before the first far token
            far = self._far_windows()
            self._far = np.append(np.full(far[0].first - 1, np.nan), windows_nll(self.scorer, self.row, far))
        ends = np.cumsum([cut.end - cut.first for cut in near])
        far_pieces = [self._far[cut.end - 1 : window.end - 1] for cut, window in zip(near, windows, strict=True)]
        pieces = zip(np.split(nll, ends[:-1]), far_pieces, strict=True)
        return np.concatenate([part for pair in pieces for part in pair])

    def _far_windows(self) -> list[Window]:
        windows = sliding_windows(len(self.row), self.size, control_stride(self.size), self.bos)
        # The first window begins at token 0, so the protocol's windows already cover the first `size` tokens.
        return [window for window in windows if window.end > max(self.size, self.since)]
