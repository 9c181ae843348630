"""The interface of protocols. A number without its protocol is not a result."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import nn

from ..scoring.boundaries import Boundaries
from ..scoring.scorer import Memory
from ..texts.tokens import TokenizedDocuments


class Measurement(NamedTuple):
    """
    What one document gave at one context length.

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


class PerplexityProtocol(Protocol):
    """
    How one document is measured, in one pass at a time; looping and distributing is left to the caller.

    A pass is one document, and the lengths that it measures together.
    """

    @property
    def name(self) -> str:
        """Name in results and on the command line."""

    @property
    def legacy(self) -> bool:
        """`True` if it reproduces a published average that weighs tokens unequally; marked in every output."""

    def bos_rule(self, bos: int) -> str:
        """Place of the `bos` special tokens that stand before a text, in words."""

    def scorer(self, model: nn.Module, tokenizer: Any, memory: Memory) -> Any:
        """Scorer of tokens for this protocol; it has the bare model as `model`, and is handed to the methods below.

        Raises:
            UnsupportedModelError: the protocol means nothing for such a model.
        """

    def arrange(self, documents: TokenizedDocuments) -> TokenizedDocuments:
        """The rows as the protocol measures them: most often as they are.

        Raises:
            InvalidParameterError: too few tokens for it.
        """

    def passes(self, lengths: list[int], boundaries: Boundaries) -> list[list[int]]:
        """The lengths, ascending, by pass."""

    def measure(self, scorer: Any, documents: TokenizedDocuments, index: int, lengths: list[int]) -> list[Measurement]:
        """One document at the lengths of one pass.

        Raises:
            NonFiniteError: logits of this document are not finite.
            EvaluationError: nothing can be measured in this way.
        """

    def measure_control(
        self, scorer: Any, documents: TokenizedDocuments, index: int, lengths: list[int], trained_length: int
    ) -> list[Measurement]:
        """The same tokens at any lengths, each given at most `trained_length` tokens (2 or more) of context.

        Where a length is not above `trained_length` this is what `measure` gives, up to rounding.
        """

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
