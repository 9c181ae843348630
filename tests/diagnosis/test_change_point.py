"""Change points against brute force, on curves whose change is known, and on curves without one."""

from __future__ import annotations

import numpy as np
import pytest

from hf_posext.diagnosis.reading import departure, level_kept
from hf_posext.diagnosis.weights import last_stretch

LENGTH, PLACE = 2048, 900
"""Of the curves; their level changes at token 901, which is at index 900."""


def noisy(rise: np.ndarray | float, documents: int = 8, seed: int = 0, deviation: float = 0.6) -> np.ndarray:
    """Excess of tokens over their level, as that of the shipped models looks: slightly below zero, and noise that has
    an own mean in each passage of sixteen tokens."""
    random = np.random.default_rng(seed)
    passages = np.repeat(random.standard_normal((documents, LENGTH // 16)), 16, axis=1)
    noise = deviation * (random.standard_normal((documents, LENGTH)) + 0.5 * passages)
    return -0.05 + rise + noise


def step(rise: float) -> np.ndarray:
    return np.where(np.arange(LENGTH) < PLACE, 0.0, rise + 0.05)


def test_the_last_stretch_is_the_one_of_the_largest_sum() -> None:
    random = np.random.default_rng(1)
    for _ in range(50):
        values = random.standard_normal(int(random.integers(1, 40)))
        sums = [sum(values[begin:]) for begin in range(len(values))]
        expected = int(np.argmax(sums)) if max(sums) > 0 else None
        assert last_stretch(values) == expected


def test_no_values_have_no_stretch() -> None:
    assert last_stretch(np.zeros(0)) is None
    assert last_stretch(np.zeros(5)) is None


# Tolerances: sums of this noise over n tokens have a deviation of s sqrt(n), with s = 1.34 of one document (0.6^2 of
# tokens, 16 * 0.3^2 of passages) and 0.47 of eight. Against a threshold that is t away from both levels they are out
# by some (s / t)^2 tokens, 20 of one document and 3 to 20 of eight; the largest of twenty draws by several times that.
@pytest.mark.parametrize(("rise", "documents", "off"), [(2.0, 1, 80), (1.0, 8, 16), (0.3, 8, 60), (0.15, 8, 100)])
def test_a_known_change_is_found(rise: float, documents: int, off: int) -> None:
    for seed in range(20):
        change = departure(noisy(step(rise), documents, seed))
        assert change is not None
        assert abs(change.token - (PLACE + 1)) <= off
        assert change.rise == pytest.approx(rise, abs=0.15)  # 1.34 / sqrt(1148) = 0.04 of one document


def test_the_interval_holds_the_place() -> None:
    hits = 0
    for seed in range(20):
        change = departure(noisy(step(0.5), 8, seed))
        assert change is not None and change.interval is not None
        hits += change.interval[0] <= PLACE + 1 <= change.interval[1]
    assert hits >= 17  # of twenty, at 95 % with eight documents: fewer than that has a chance of 1 in 60


def test_a_ramp_departs_where_it_has_risen_by_a_quarter_of_a_nat() -> None:
    ramp = np.clip((np.arange(LENGTH) - PLACE) / 500, 0, None) + 0.05
    for seed in range(10):
        change = departure(noisy(ramp, seed=seed))
        assert change is not None
        assert change.token == pytest.approx(PLACE + 125, abs=100)  # where noise of 0.2 nats over a passage is crossed


@pytest.mark.parametrize("documents", [1, 2, 8])
@pytest.mark.parametrize("level", [0.05, 0.0])  # exactly at the level, and below it as where longer context helps
def test_curves_without_a_change_are_not_accused(documents: int, level: float) -> None:
    accused = [departure(noisy(level, documents, seed)) for seed in range(100)]
    assert sum(change is not None for change in accused) <= 2


def test_a_rise_that_does_not_last_is_no_departure() -> None:
    bump = np.where((np.arange(LENGTH) >= 500) & (np.arange(LENGTH) < 600), 1.0, -0.05)
    assert departure(noisy(bump)) is None


def test_a_rise_below_the_tolerance_is_no_departure() -> None:
    assert departure(noisy(step(0.07), deviation=0.05)) is None


def test_too_little_text_after_a_change_says_nothing() -> None:
    late = np.zeros((1, LENGTH))
    late[:, -3 * 64 :] = 2.0  # three blocks of one document
    assert departure(late) is None
    late[:, -4 * 64 :] = 2.0
    change = departure(late)
    assert change is not None and change.token == LENGTH - 4 * 64 + 1
    assert change.interval is None, "one document tells nothing of others"


def test_the_level_is_kept_no_farther_than_can_be_told() -> None:
    """A rise over fewer than four blocks is no departure, and no evidence of the level either."""
    for seed in range(20):
        late = noisy(0.0, 1, seed)
        assert level_kept(late, 512) == LENGTH + 1
        late[:, -3 * 64 :] += 2.0
        assert departure(late) is None
        assert level_kept(late, 512) == pytest.approx(LENGTH - 3 * 64 + 1, abs=80)  # as of one document above


@pytest.mark.parametrize(("documents", "tokens", "kept"), [(1, 255, 512), (1, 256, 768), (4, 63, 512), (4, 64, 576)])
def test_few_tokens_past_the_trained_length_tell_nothing(documents: int, tokens: int, kept: int) -> None:
    assert level_kept(np.zeros((documents, 512 + tokens - 1)), 512) == kept
