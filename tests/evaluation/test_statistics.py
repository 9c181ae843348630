"""Pooled perplexity and its interval over documents."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hf_posext.evaluation.rows import bootstrap_interval, pooled_perplexity

RANDOM = np.random.default_rng(0)
TOKENS = RANDOM.integers(50, 500, 8)
NLL = TOKENS * RANDOM.normal(3.5, 0.3, 8)


def test_tokens_weigh_the_same() -> None:
    """Not the mean of the documents' perplexities, which is larger."""
    nll, tokens = [2.0 * 100, 6.0 * 10], [100, 10]
    assert pooled_perplexity(nll, tokens) == pytest.approx(math.exp(260 / 110), rel=1e-15)
    assert pooled_perplexity(nll, tokens) < (math.exp(2) + math.exp(6)) / 2


def test_differences_give_a_ratio_of_perplexities() -> None:
    raised = NLL + 0.1 * TOKENS
    ratio = pooled_perplexity(raised, TOKENS) / pooled_perplexity(NLL, TOKENS)
    assert pooled_perplexity(raised - NLL, TOKENS) == pytest.approx(ratio, rel=1e-12)


def test_overflow_is_infinite_without_a_warning() -> None:
    assert pooled_perplexity([1e6], [10]) == math.inf


def test_interval_equals_a_plain_bootstrap() -> None:
    draws = np.random.default_rng(1).integers(0, 8, (20_000, 8))
    plain = [math.exp(NLL[draw].sum() / TOKENS[draw].sum()) for draw in draws]
    # Two independent Monte-Carlo estimates of the same quantiles, 10 and 20 thousand draws: about 1 % apart at most.
    assert bootstrap_interval(list(NLL), list(TOKENS), seed=0) == pytest.approx(
        np.quantile(plain, [0.025, 0.975]), rel=0.01
    )


def test_interval_is_seeded() -> None:
    first, again, reseeded = (bootstrap_interval(list(NLL), list(TOKENS), seed) for seed in (0, 0, 1))
    assert first == again != reseeded


def test_pairing_takes_out_how_hard_a_document_is() -> None:
    noise = TOKENS * RANDOM.normal(0.05, 0.005, 8)
    low, high = bootstrap_interval(list(noise), list(TOKENS), seed=0) or (0.0, 0.0)
    alone = bootstrap_interval(list(NLL + noise), list(TOKENS), seed=0) or (0.0, 0.0)
    assert 1.03 < low < pooled_perplexity(noise, TOKENS) < high < 1.07
    assert high - low < (alone[1] - alone[0]) / alone[0] / 10


def test_one_document_has_no_interval_and_equal_ones_a_point() -> None:
    assert bootstrap_interval([10.0], [5], seed=0) is None
    assert bootstrap_interval([10.0] * 3, [5] * 3, seed=0) == pytest.approx([math.exp(2)] * 2, rel=1e-15)
