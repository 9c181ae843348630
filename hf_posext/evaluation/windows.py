"""Protocols of causal language models, the windows that they read, and the control.

The control scores the same tokens with the unpatched model and a context truncated to the trained length. A perplexity
that falls with length proves nothing by itself, because later tokens of a document are easier. It also falls for a
model limited to its trained length. The benefit of a longer context is the difference from the control.

Legacy protocols reproduce published averages, which do not weigh tokens equally. The control is averaged in the same
way as the methods. Bits per byte do not use that average. They are the sum of NLL per byte if each token is scored
once, else `None`.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn

from ..errors import EvaluationError, InvalidParameterError
from .forwards import Boundaries
from .scorer import BATCH_TOKENS, Memory, TokenScorer, autocast_dtype, require_finite, token_scorer
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
            f"Expected stride to be 1 to {longest} for windows of {window} tokens (a longer one skips tokens), got "
            f"{stride}. Pass stride={longest}."
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


GUARD_TOKENS = 64
"""Number of last tokens at the shortest length that are compared with a fresh forward.

Positions that depend on the input length change all tokens, and the last ones most. The head on all tokens took 6 % of
a run with a large vocabulary.
"""

NO_BOS = "none: the tokenizer adds none"


class OfDecoders(PerplexityProtocol):
    """Base class of the protocols of causal language models."""

    bos_place: ClassVar[str] = "first token of each document"

    def bos_rule(self, bos: int) -> str:
        place = self.bos_place if bos < 2 else self.bos_place.replace("first token", f"first {bos} tokens", 1)
        return place if bos else NO_BOS

    def scorer(self, model: nn.Module, tokenizer: Any, memory: Memory) -> TokenScorer:
        return token_scorer(model, memory)


@dataclass(frozen=True)
class Prefix(OfDecoders):
    """Perplexity of the first `L` tokens of each document, for every length `L`.

    Token `t` is scored given all tokens before it. If positions do not depend on the input length, one forward over
    the longest length covers all lengths, because causal attention does not see later tokens. LongRoPE with two
    frequency lists takes two forwards, and dynamic NTK takes one for each length.
    """

    name: ClassVar[str] = "prefix"

    def first(self, length: int, bos: int) -> int:
        """Return the index of the first scored token at a length, after a special prefix of `bos` tokens."""
        return first_scored(bos)

    def tail(self, length: int) -> int | None:
        """Return the number of scored tokens in the second half if it is not half of them, else `None`."""
        return None

    def passes(self, lengths: list[int], boundaries: Boundaries) -> list[list[int]]:
        return boundaries.groups(lengths)

    def measure(
        self, scorer: TokenScorer, documents: TokenizedDocuments, index: int, lengths: list[int],
        context: int | None = None,
    ) -> list[Measurement]:  # fmt: skip
        row, firsts = documents.tokens[index], [self.first(length, documents.bos) for length in lengths]
        begin, end = firsts[0], lengths[-1]
        reader = TruncatedReader(scorer, row, context or end, documents.bos, begin)
        nll = reader.nll([Window(0, begin, end)])
        require_finite(nll, documents.ids[index], range(begin, end), scorer.culprit)
        # Sharing a forward between lengths is verified once, on the first document.
        if context is None and index == 0 and len(lengths) > 1:
            shared = nll[: lengths[0] - begin][-GUARD_TOKENS:]
            fresh = windows_nll(scorer, row, [Window(0, lengths[0] - len(shared), lengths[0])])
            require_agreement(fresh, shared, lengths, autocast_dtype(scorer.model) or scorer.model.dtype)
        return [
            Measurement(length, nll[first - begin : length - begin], first, self.tail(length))
            for length, first in zip(lengths, firsts, strict=True)
        ]

    def reads(self, lengths: list[int], longest: int) -> list[int]:
        return lengths[-1:]


@dataclass(frozen=True)
class Tail(Prefix):
    """Perplexity of the last `K` of the first `L` tokens of each document, for every length `L`.

    Documents are read as by [`Prefix`], and token `t` is scored given all tokens before it. Only tokens with at least
    `L - K` tokens before them are scored.

    Args:
        tokens (`int`): the number `K` of scored tokens, at most `L - 1`.
    """

    tokens: int
    name: ClassVar[str] = "tail"
    option: ClassVar[str] = "tail"

    def check(self, lengths: list[int]) -> None:
        if not 1 <= self.tokens <= lengths[0] - 1:
            raise InvalidParameterError(
                f"Expected tail to be 1 to {lengths[0] - 1} for texts of {lengths[0]} tokens, the first of which is "
                f"not scored, got {self.tokens}. Pass tail={lengths[0] - 1}."
            )

    def first(self, length: int, bos: int) -> int:
        return max(first_scored(bos), length - self.tokens)

    def tail(self, length: int) -> int:
        return min(self.tokens, (length + 1) // 2)


class ReadsWindows(OfDecoders):
    """Base class of the protocols that read the whole document through windows."""

    @abstractmethod
    def windows(self, total: int, length: int, bos: int) -> list[Window]:
        """Return the windows of a row of `total` tokens."""

    def measurement(self, length: int, nll: np.ndarray, windows: list[Window]) -> Measurement:
        """Return the measurement of the NLL of the tokens that the windows score."""
        return Measurement(length, nll, first=windows[0].first)

    def measure(
        self, scorer: TokenScorer, documents: TokenizedDocuments, index: int, lengths: list[int],
        context: int | None = None,
    ) -> list[Measurement]:  # fmt: skip
        reader = TruncatedReader(scorer, documents.tokens[index], context or lengths[-1], documents.bos)
        measurements = []
        for length in lengths:
            windows = self.windows(documents.length, length, documents.bos)
            nll = reader.nll(windows)
            if not np.isfinite(nll).all():
                scored = [token for window in windows for token in range(window.first, window.end)]
                require_finite(nll, documents.ids[index], scored, scorer.culprit)
            measurements.append(self.measurement(length, nll, windows))
        return measurements

    def reads(self, lengths: list[int], longest: int) -> list[int]:
        return [window.size for length in lengths for window in self.windows(longest, length, 0)]


@dataclass(frozen=True)
class Strided(ReadsWindows):
    """Base class of the protocols whose windows move by a stride."""

    stride: int
    option: ClassVar[str] = "stride"

    def check(self, lengths: list[int]) -> None:
        for length in lengths:
            check_stride(length, self.stride)


@dataclass(frozen=True)
class Sliding(Strided):
    """Perplexity of the first `max(lengths)` tokens of each document, read through a window of `L` tokens.

    The window moves by `stride` tokens. Each window scores the tokens that no earlier window has scored, given the
    earlier tokens of the window. These are all tokens except for the first in the first window, and the last `stride`
    tokens in later windows (fewer at the end of the text). If the tokenizer adds BOS, every window begins with it and
    contains `L - 1` other tokens. These are the windows of PoSE, with equal weight for each token. YaRN's script uses
    the same windows and averages their means (see [`LegacyYaRN`]).

    Args:
        stride (`int`): step of the window in tokens, at most `L - 1`, because a longer step would skip tokens.
    """

    name: ClassVar[str] = "sliding"
    bos_place: ClassVar[str] = "first token of every window"

    def windows(self, total: int, length: int, bos: int) -> list[Window]:
        return sliding_windows(total, length, self.stride, bos)


@dataclass(frozen=True)
class Rolling(ReadsWindows):
    """Perplexity of the first `max(lengths)` tokens of each document, read in disjoint windows of `L` tokens.

    These are the windows of lm-eval's `loglikelihood_rolling` with `max_length = L`. The first window reads tokens 0
    to `L - 1` and scores tokens 1 to `L`. Each later window reads the last scored token and the `L - 1` tokens after
    it, and scores the next `L`. The last window begins earlier, so that it also reads `L` tokens. A token has 1 to `L`
    tokens of context, about `L / 2` on average. If the tokenizer adds BOS, it is token 0 and only in the first window.
    lm-eval puts a BOS there for every tokenizer. Here, token 0 takes its place and is not scored.
    """

    name: ClassVar[str] = "rolling"
    bos_place: ClassVar[str] = "first token of the first window of each document"

    def windows(self, total: int, length: int, bos: int) -> list[Window]:
        return rolling_windows(total, length, bos)


def require_agreement(fresh: np.ndarray, nll: np.ndarray, lengths: list[int], dtype: torch.dtype) -> None:
    """Check that a fresh forward at the shortest length agrees with the forward over the longest length.

    This guards the measurement of several lengths in one pass. The mean absolute difference may be up to 1e-4 nats,
    which is a hundred times the float32 rounding between products of different shapes. For a shorter dtype it may be
    up to four eps (0.03 for bfloat16), because logits are rounded to some eps of their size. Positions that depend on
    the length differ by more: dynamic NTK by 0.1 and above.

    Raises:
        EvaluationError: the two forwards disagree.
    """
    deviation = float(np.abs(fresh - nll).mean())
    allowed = max(1e-4, 4 * torch.finfo(dtype).eps)
    if deviation > allowed:
        raise EvaluationError(
            f"Expected a forward over {lengths[-1]} tokens to agree with a fresh one over {lengths[0]}, got a "
            f"difference of {deviation:.2g} nats a token (allowed {allowed:.2g}): the positions of this model depend "
            "on the length of its input, and neither its config nor its plan says so. Measure one length at a time."
        )


BATCH = 32
"""Number of windows per batch in LongLoRA's script."""


@dataclass(frozen=True)
class LegacyYaRN(Sliding):
    """Perplexity as printed by YaRN's `eval/perplexity.py`.

    This is `exp` of the mean, over all windows of all documents, of the mean NLL of the tokens scored in a window. The
    windows are those of [`Sliding`]. All windows weigh the same, although the first scores `L - 1` tokens, the others
    score `stride`, and the last may score only one. The text is the first `max(lengths)` tokens of each document,
    while the script reads whole documents. With `--truncate`, the script prints the result of [`Prefix`]. Each token
    is scored once, so bits per byte are those of [`Sliding`].

    Args:
        stride (`int`): step of the window in tokens, `--sliding-window` in the script; 256 in the paper's tables.
    """

    name: ClassVar[str] = "legacy-yarn"

    def measurement(self, length: int, nll: np.ndarray, windows: list[Window]) -> Measurement:
        return Measurement(length, nll, windows[0].first, groups=tuple(w.end - w.first for w in windows))


@dataclass(frozen=True)
class LegacyLongLoRA(Strided):
    """Perplexity as printed by LongLoRA's `eval.py`: `exp` of the mean over batches of the mean NLL in a batch.

    All documents (the first `max(lengths)` tokens of each, without BOS) form one stream. Windows of `L` tokens begin
    at tokens 0, `stride`, 2 `stride`, ... of the stream, if at least one token follows the window. The last of these
    windows is dropped. Each window scores its tokens 1 to `L - 1`, so a token counts up to `L / stride` times. A batch
    has 32 windows, except for the last batch, which has the rest. All batches weigh the same. The script uses 2.71828
    as the base of the exponential. Bits per byte are `None`, because the sum counts a token once for each window that
    contains it. Use [`Sliding`] for bits per byte.

    Args:
        stride (`int`): step of the window in tokens; 256 in the script.
    """

    name: ClassVar[str] = "legacy-longlora"

    def bos_rule(self, bos: int) -> str:
        return "none: removed, as published" if bos else super().bos_rule(bos)

    def arrange(self, documents: TokenizedDocuments) -> TokenizedDocuments:
        stream = documents.tokens[:, documents.bos :].flatten()
        if len(stream) - documents.length <= self.stride:
            raise InvalidParameterError(
                f"Expected a stream of {documents.length + self.stride + 1} tokens or more, as {self.name} drops the "
                f"last window of {documents.length}, got {len(stream)}. Pass longer documents, or more of them."
            )
        count = len(documents.ids)
        return TokenizedDocuments([f"stream of {count}"], stream[None], 0, [len(stream)], documents.left_out)

    def windows(self, total: int, length: int, bos: int) -> list[Window]:
        return [Window(begin, begin + 1, begin + length) for begin in range(0, total - length, self.stride)[:-1]]

    def measurement(self, length: int, nll: np.ndarray, windows: list[Window]) -> Measurement:
        batches = [windows[start : start + BATCH] for start in range(0, len(windows), BATCH)]
        sizes = tuple(len(batch) * (length - 1) for batch in batches)
        return Measurement(length, nll, first=None, groups=sizes)
