"""The control: the same tokens, scored by the unpatched model with its context truncated to the trained length.

A perplexity that falls with length proves nothing by itself, since later tokens of a document are easier; it falls for
a model that sees no more than its trained length, too. What a longer context is worth is the distance to this one.
"""

from __future__ import annotations

from collections.abc import Iterator

from .protocols import Measurement, PerplexityProtocol, windowed_nll
from .scoring import TokenScorer, require_finite
from .tokens import TokenizedDocuments

CONTROL = "truncated"
"""The name of the control among the per-document results."""


def control_stride(trained_length: int) -> int:
    """An eighth of the trained length, so that every token has seven eighths of it as context."""
    return max(1, trained_length // 8)


def measure_control(
    scorer: TokenScorer,
    documents: TokenizedDocuments,
    lengths: list[int],
    protocol: PerplexityProtocol,
    trained_length: int,
) -> Iterator[Measurement]:
    """
    The tokens that `protocol` scores, each given at most `trained_length` tokens of context.

    Tokens inside the first `trained_length` come from one forward over them, later ones from windows of that length
    that end every [`control_stride`] tokens. Where the tokenizer adds BOS, every window begins with it: without it
    many models collapse, and the control would be unfairly weak.

    Args:
        scorer ([`TokenScorer`]): of the unpatched model.
        documents ([`TokenizedDocuments`]): the rows.
        lengths (`list[int]`): ascending, in tokens.
        protocol ([`PerplexityProtocol`]): which tokens count at each length.
        trained_length (`int`): in tokens, 2 or more.
    """
    for index, row in enumerate(documents.tokens):
        nll = windowed_nll(scorer, row, trained_length, control_stride(trained_length), documents.bos)
        require_finite(nll, documents.ids[index])
        for length in lengths:
            yield Measurement(length, index, nll[: protocol.span(length, documents.length) - 1])
