"""Loss by position: of every token given all before it, and of the same token given only the last few."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..errors import EvaluationError
from ..evaluation.scoring.scorer import TokenScorer, require_finite
from ..evaluation.texts.tokens import TokenizedDocuments

STRETCHES = 32
"""Lines of a curve: at 2,048 tokens one is the mean of 64 tokens of each document."""

RESAMPLES = 1_999
CHANCE = 0.99
"""Share of the loss of a guess from which on a model is said to be no better than one."""


def token_losses(scorer: TokenScorer, documents: TokenizedDocuments) -> np.ndarray:
    """NLL of tokens 1, 2, ... given all before them, float64 of shape `(documents, length - 1)`, in nats.

    Raises:
        NonFiniteError: names the document.
    """
    rows = []
    for name, tokens in zip(documents.ids, documents.tokens, strict=True):
        nll = scorer.token_nll(tokens[None])[0].double().numpy()
        require_finite(nll, name, culprit=scorer.culprit)
        rows.append(nll)
    return np.stack(rows)


def short_context_losses(scorer: TokenScorer, documents: TokenizedDocuments, context: int) -> np.ndarray:
    """The same tokens, each given no more than the last `context`: the level that positions cannot spoil.

    Windows of `context` tokens move by half of that; the first is scored whole, of the others the second half, so
    that no token has less than half of the context. Each begins with the special tokens that the documents begin with.

    Args:
        scorer ([`TokenScorer`]): of the model without a patch.
        documents ([`TokenizedDocuments`]): rows.
        context (`int`): tokens, even, fewer than a row has.
    """
    step, length = context // 2, documents.length
    begins = list(range(step, length - context, step)) + [length - context]
    rows = []
    for name, tokens in zip(documents.ids, documents.tokens, strict=True):
        windows = torch.stack([tokens[begin : begin + context] for begin in begins])
        windows[:, : documents.bos] = tokens[: documents.bos]
        nll = np.empty(length - 1)
        nll[: context - 1] = scorer.token_nll(tokens[None, :context])[0].numpy()
        for begin, scored in zip(begins, scorer.token_nll(windows, step).numpy(), strict=True):
            nll[begin + step - 1 : begin + context - 1] = scored
        require_finite(nll, name, culprit=scorer.culprit)
        rows.append(nll)
    return np.stack(rows)


def require_skill(losses: np.ndarray, vocabulary: int, name: str) -> None:
    """Refuse a model that predicts no better than a guess: nothing that positions do to it would show.

    Args:
        losses (`numpy.ndarray`): in a short context.
        vocabulary (`int`): tokens that the model knows.
        name (`str`): of the model.

    Raises:
        EvaluationError: says what to look at.
    """
    loss, guess = float(losses.mean()), math.log(vocabulary)
    if loss >= CHANCE * guess:
        raise EvaluationError(
            f"{name} has a loss of {loss:.2f} nats per token in a short context, no better than a guess among its "
            f"{vocabulary} tokens ({guess:.2f}), so nothing can be seen of its positions; check that its weights are "
            "trained, that the tokenizer is its own, and that the documents are in a language that it knows"
        )


def curve_table(curves: Sequence[tuple[str, np.ndarray]], seed: int = 0) -> pd.DataFrame:
    """Means of stretches of the text, a line for each curve and stretch.

    Columns: `curve`, `begin` and `end` (tokens, the end not included), `nll` (nats per token), `low` and `high`
    (95 %, percentile bootstrap over documents; NaN of one document).

    Args:
        curves (`Sequence[tuple[str, numpy.ndarray]]`): names and losses of shape `(documents, length - 1)`.
        seed (`int`, *optional*, defaults to 0): of the bootstrap.
    """
    longest = max(losses.shape[1] for _, losses in curves) + 1
    bounds = np.unique(np.maximum(np.arange(STRETCHES + 1) * longest // STRETCHES, 1))
    lines: list[dict[str, Any]] = []
    for name, losses in curves:
        ends = bounds[bounds <= losses.shape[1] + 1]
        means = np.stack([losses[:, a - 1 : b - 1].mean(1) for a, b in zip(ends[:-1], ends[1:], strict=True)])
        low, high = _interval(means, seed)
        for line in zip(ends[:-1], ends[1:], means.mean(1), low, high, strict=True):
            named = dict(zip(("begin", "end", "nll", "low", "high"), line, strict=True))
            lines.append({"curve": name, **named})
    return pd.DataFrame(lines)


def _interval(means: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """95 % of the mean of each line over documents drawn anew, the same draws in each; means (lines, documents)."""
    if means.shape[1] < 2:
        return np.full(len(means), math.nan), np.full(len(means), math.nan)
    from scipy.stats import bootstrap

    found = bootstrap(
        (means,), np.mean, axis=-1, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return found.low, found.high
