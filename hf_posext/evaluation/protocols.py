"""All protocols by name, and those of causal language models. Legacy ones reproduce published averages.

Legacy protocols do not weigh tokens equally. The control is averaged in the same way as the methods. Bits per byte do
not use that average. They are the sum of NLL per byte if each token is scored once, else `None`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from ..errors import EvaluationError, InvalidParameterError
from .encoders import Pseudo, Seq2Seq
from .forwards import Boundaries
from .scorer import Memory, TokenScorer, autocast_dtype, require_finite, token_scorer
from .tokens import TokenizedDocuments, first_scored
from .windows import (
    Measurement,
    PerplexityProtocol,
    TruncatedReader,
    Window,
    check_stride,
    rolling_windows,
    sliding_windows,
    windows_nll,
)

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
                f"tail is {self.tokens} for texts of {lengths[0]} tokens, the first of which is not scored. Pass 1 to "
                f"{lengths[0] - 1}."
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
            f"one forward over {lengths[-1]} tokens and a fresh one over {lengths[0]} disagree by {deviation:.2g} "
            f"nats a token (allowed {allowed:.2g}): the positions of this model depend on the length of its input, "
            "and neither its config nor its plan says so. Measure one length at a time."
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
                f"the documents are a stream of {len(stream)} tokens, and {self.name} drops the last window "
                f"of {documents.length}, which leaves none. Pass {documents.length + self.stride + 1} tokens or more."
            )
        count = len(documents.ids)
        return TokenizedDocuments([f"stream of {count}"], stream[None], 0, [len(stream)], documents.left_out)

    def windows(self, total: int, length: int, bos: int) -> list[Window]:
        return [Window(begin, begin + 1, begin + length) for begin in range(0, total - length, self.stride)[:-1]]

    def measurement(self, length: int, nll: np.ndarray, windows: list[Window]) -> Measurement:
        batches = [windows[start : start + BATCH] for start in range(0, len(windows), BATCH)]
        sizes = tuple(len(batch) * (length - 1) for batch in batches)
        return Measurement(length, nll, first=None, groups=sizes)


PROTOCOLS: dict[str, Any] = {
    protocol.name: protocol
    for protocol in (Prefix, Sliding, Rolling, Tail, LegacyYaRN, LegacyLongLoRA, Pseudo, Seq2Seq)
}
DECODER_PROTOCOLS = ("prefix", "sliding", "rolling", "tail", "legacy-yarn", "legacy-longlora")

FITTING = {"causal": DECODER_PROTOCOLS, "masked": ("pseudo",), "seq2seq": ("seq2seq",)}
"""Protocols for each kind of language model. The first is the default."""


def protocol_for(
    name: str | None, kind: str, model: str, lengths: list[int], *, stride: int | None = None, tail: int | None = None
) -> PerplexityProtocol:
    """Return the requested protocol, or the default for the kind of model (see [`model_kind`]).

    Raises:
        InvalidParameterError: an unknown protocol, one that does not fit the model, an option that the protocol does
            not have, or a required option that is missing or out of range.
    """
    fitting, options = FITTING[kind], {"stride": stride, "tail": tail}
    name = name or fitting[0]
    if name not in PROTOCOLS:
        raise InvalidParameterError(f"protocol is {name!r}. Choose one of {', '.join(PROTOCOLS)}.")
    if name not in fitting:
        raise InvalidParameterError(
            f"protocol {name!r} does not fit {model}. Choose {' or '.join(map(repr, fitting))}."
        )
    required = PROTOCOLS[name].option
    for option, value in options.items():
        if value is not None and option != required:
            users = [user for user, protocol in PROTOCOLS.items() if protocol.option == option]
            raise InvalidParameterError(
                f"{option} is {value}, and protocol {name!r} has none. Leave it out, or choose {' or '.join(users)}."
            )
        if value is None and option == required:
            raise InvalidParameterError(f"protocol {name!r} requires {option}. Pass {option}=128, in tokens.")
    protocol: PerplexityProtocol = PROTOCOLS[name](*([options[required]] if required else []))
    protocol.check(lengths)
    return protocol
