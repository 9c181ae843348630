"""The control: the same tokens, scored by the unpatched model with its context truncated to the trained length.

A perplexity that falls with length proves nothing by itself, since later tokens of a document are easier; it falls for
a model that sees no more than its trained length, too. What a longer context is worth is the distance to this one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..scoring.scorer import TokenScorer
from .windows import Window, sliding_windows, windows_nll

CONTROL = "truncated"
"""The name of the control among the per-document results."""


def control_stride(trained_length: int) -> int:
    """An eighth of the trained length, so that every token has seven eighths of it as context."""
    return max(1, trained_length // 8)


def control_windows(tokens: int, trained_length: int) -> int:
    """Forwards of the control over so many tokens of a document."""
    return 1 + max(0, -(-(tokens - trained_length) // control_stride(trained_length)))


class TruncatedReader:
    """
    Reads the windows of one document with at most so many tokens of context for each token.

    What a window scores among its first `size` tokens comes from one forward over them, exactly as the protocol reads
    them; later tokens come from windows of `size` tokens that end every [`control_stride`] tokens of the document, and
    begin with the special prefix of the document: without it many models collapse, and the control would be unfairly
    weak. A window of no more than `size` tokens is read as it is.

    Args:
        scorer ([`TokenScorer`]): of the unpatched model.
        row (`torch.LongTensor` of shape `(tokens,)`): the document.
        size (`int`): tokens, 2 or more.
        bos (`int`): tokens of the special prefix.
        since (`int`, *optional*, defaults to 1): the first token that a window scores.
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
