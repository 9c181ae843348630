"""Windows of a document, and the NLL of the tokens that they score."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ...errors import InvalidParameterError
from ..scoring.scorer import BATCH_TOKENS, TokenScorer


class Window(NamedTuple):
    """
    Some tokens of a row that a model reads in one forward.

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
    longest = window - max(1, bos)
    if not 1 <= stride <= longest:
        raise InvalidParameterError(
            f"stride is {stride} for windows of {window} tokens; give 1 to {longest} (a longer one skips tokens)"
        )


def sliding_windows(total: int, window: int, stride: int, bos: int) -> list[Window]:
    """
    Windows that score each token of a text exactly once, except for the first where no special token is before it.

    Args:
        total (`int`): tokens of the document, the special prefix included.
        window (`int`): tokens that a window holds, the special prefix included.
        stride (`int`): tokens that it moves by, at most `window - 1`.
        bos (`int`): tokens of the special prefix, with which every window begins.
    """
    bos = int(bos)
    check_stride(window, stride, bos)
    windows = [Window(bos, max(1, bos), min(window, total), bos)]
    while windows[-1].end < total:
        begin = windows[-1].begin + stride
        windows.append(Window(begin, windows[-1].end, min(begin + window - bos, total), bos))
    return windows


def rolling_windows(total: int, window: int, bos: int = 0) -> list[Window]:
    """
    Disjoint windows of lm-eval (`get_rolling_token_windows` with `context_len=1`): each reads `window` tokens and
    scores the `window` after its first; the last one begins earlier, so that it reads as many.

    Args:
        total (`int`): tokens of the document, what conditions the first (lm-eval's `prefix_token`) included.
        window (`int`): tokens that a window reads, lm-eval's `max_seq_len`.
        bos (`int`, *optional*): tokens of the special prefix, in the first window only; they are not scored.
    """
    windows = [Window(0, max(1, bos), min(window + 1, total), last_read=False)]
    while windows[-1].end < total:
        end = min(windows[-1].end + window, total)
        windows.append(Window(end - window - 1, windows[-1].end, end, last_read=False))
    return windows


def windows_nll(scorer: TokenScorer, row: torch.Tensor, windows: Sequence[Window]) -> np.ndarray:
    """
    NLL of the tokens that windows score, in their order; neighbours of equal shape are batched.

    Args:
        scorer ([`TokenScorer`]): of the model.
        row (`torch.LongTensor` of shape `(tokens,)`): the document.
        windows (`Sequence[Window]`): each scores a token or more.

    Returns:
        `numpy.ndarray` of shape `(scored tokens,)`, float64, in nats.
    """
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
    """
    NLL of one document read through a sliding window, from the first token after the special prefix on.

    Args:
        scorer ([`TokenScorer`]): of the model.
        row (`torch.LongTensor` of shape `(tokens,)`): the document.
        window, stride, bos: as in [`sliding_windows`].

    Returns:
        `numpy.ndarray` of shape `(tokens - max(1, bos),)`, float64, in nats.
    """
    return windows_nll(scorer, row, sliding_windows(len(row), window, stride, bos))
