"""Protocols that reproduce published averages, so that old tables can be compared; every output marks them.

They do not weigh tokens equally. What they compare the methods with, the control, is averaged in the same way. Bits
per byte are not from their average: they are the sum of NLL over the bytes where a token counts once, else `None`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...errors import InvalidParameterError
from ..texts.tokens import TokenizedDocuments
from .decoders import ReadsWindows, Sliding
from .protocol import Measurement
from .windows import Window

BATCH = 32
"""Windows in a batch of LongLoRA's script."""


@dataclass(frozen=True)
class LegacyYaRN(Sliding):
    """
    The number that YaRN's `eval/perplexity.py` prints: `exp` of the mean, over all windows of all documents, of the
    mean NLL of the tokens that a window scores.

    The windows are those of [`Sliding`]. The first scores `L - 1` tokens and weighs as much as any other, which scores
    `stride`, and as the last, which may score one. The text is the first `max(lengths)` tokens of each document (the
    script reads whole documents). With `--truncate` the script gives what [`Prefix`] does. Each token is scored once,
    so that bits per byte are those of [`Sliding`].

    Args:
        stride (`int`): the script's `--sliding-window`; 256 in the paper's tables.
    """

    name: ClassVar[str] = "legacy-yarn"
    legacy: ClassVar[bool] = True

    def measurement(self, length: int, nll: np.ndarray, windows: list[Window]) -> Measurement:
        return Measurement(length, nll, windows[0].first, groups=tuple(w.end - w.first for w in windows))


@dataclass(frozen=True)
class LegacyLongLoRA(ReadsWindows):
    """
    The number that LongLoRA's `eval.py` prints: `exp` of the mean over batches of the mean NLL in a batch.

    All documents (the first `max(lengths)` tokens of each, without BOS) are one stream. Windows of `L` tokens begin
    at its tokens 0, `stride`, 2 `stride`, ... as long as a token follows them, all but the last of these windows; each
    scores its tokens 1 to `L - 1`, so that a token counts up to `L / stride` times. Batches have 32 windows, the last
    one what is left, and weigh the same. (The script's base of the exponential is 2.71828.) There are no bits per
    byte: the sum counts a token as often as windows hold it, and no text has those bytes; [`Sliding`] gives them.

    Args:
        stride (`int`): tokens that the window moves by; 256 in the script.
    """

    stride: int
    name: ClassVar[str] = "legacy-longlora"
    legacy: ClassVar[bool] = True

    def bos_rule(self, bos: int) -> str:
        return "none: removed, as published" if bos else super().bos_rule(bos)

    def arrange(self, documents: TokenizedDocuments) -> TokenizedDocuments:
        stream = documents.tokens[:, int(documents.bos) :].flatten()
        if len(stream) - documents.length <= self.stride:
            raise InvalidParameterError(
                f"the documents are a stream of {len(stream)} tokens, and {self.name} drops the last window "
                f"of {documents.length}, which leaves none; give {documents.length + self.stride + 1} tokens or more"
            )
        count = len(documents.ids)
        return TokenizedDocuments([f"stream of {count}"], stream[None], 0, [len(stream)], documents.left_out)

    def windows(self, total: int, length: int, bos: int) -> list[Window]:
        return [Window(begin, begin + 1, begin + length) for begin in range(0, total - length, self.stride)[:-1]]

    def measurement(self, length: int, nll: np.ndarray, windows: list[Window]) -> Measurement:
        batches = [windows[at : at + BATCH] for at in range(0, len(windows), BATCH)]
        sizes = tuple(len(batch) * (length - 1) for batch in batches)
        return Measurement(length, nll, first=None, groups=sizes)
