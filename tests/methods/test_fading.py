"""Golden values of fade and decay, what they leave alone, and how far octaves are from the exact decay."""

from __future__ import annotations

import math

import pytest
import torch

from hf_posext import detect_scheme, patch_model
from hf_posext.methods import as_method
from hf_posext.patching.kernels.bands import decay, fade, octaves
from hf_posext.plan import Band, CountFade, DistanceDecay, PositionMap

from ..conftest import TRAINED, logits, tiny_llama, tokens

SAME = PositionMap()


def test_golden_values_of_a_fade() -> None:
    """Window 256, reference 512, strength 1."""
    part = Band(SAME, SAME, low=256, fade=CountFade(1.0, 512))
    shift = fade(part, torch.tensor([[511, 767, 1023, 2047, 4095]]), torch.float64)
    assert shift is not None
    expected = torch.tensor([[0, 0, -0.405465, -1.252763, -2.014903]]).double()
    torch.testing.assert_close(shift, expected, atol=1e-6, rtol=0)  # as printed


@pytest.mark.parametrize(("strength", "start"), [(1.0, 256), (1.5, 512)])
def test_a_decay_is_exact_in_the_middle_of_an_octave_and_near_elsewhere(strength: float, start: int) -> None:
    part = Band(SAME, SAME, low=256, decay=DistanceDecay(strength, start))
    distance = torch.arange(-10, 2**20, 7)
    shift = decay(part, distance, torch.float64)
    assert shift is not None
    exact = -strength * (distance / start).clamp(min=1).double().log()
    assert (shift - exact).abs().max() <= strength * math.log(2) / 2 + 1e-12
    assert (shift[distance < start] == 0).all()
    # the middle of an octave, to a token
    middle = torch.tensor([round(start * 2**0.5), round(start * 2**3.5)])
    at_middle = decay(part, middle, torch.float64)
    torch.testing.assert_close(at_middle, -strength * (middle / start).double().log(), atol=2e-3 * strength, rtol=0)


@pytest.mark.parametrize("start", [16, 5, 1, 40, 64])
@pytest.mark.parametrize("reach", [17, 64, 65, 1000])
def test_octaves_are_the_decay(start: int, reach: int) -> None:
    """The bands cover each distance once, in order, with what the decay adds there."""
    part = Band(SAME, SAME, low=16, decay=DistanceDecay(0.7, start))
    pieces = list(octaves(part, reach))
    assert pieces[0][0].low == 16 and pieces[-1][0].high is None
    assert all(near.high == far.low for (near, _), (far, _) in zip(pieces, pieces[1:], strict=False))
    for band, constant in pieces:
        distance = torch.arange(band.low, min(reach, band.high or reach))
        assert len(distance)
        torch.testing.assert_close(decay(part, distance, torch.float64), torch.full(distance.shape, constant).double())


def test_a_fade_under_chunks_begins_at_twice_the_trained_length() -> None:
    """Counted key by key: up to there, the older chunks hold no more keys than the reference, the trained length."""
    far = as_method("dual-chunk+fade").plan(detect_scheme(tiny_llama()), factor=8).bands[-1]
    chunk = 3 * TRAINED // 4 - TRAINED // 4
    counts = [sum(p // chunk - key // chunk >= 2 for key in range(p + 1)) for p in range(8 * TRAINED)]
    expected = torch.tensor([-math.log(max(1, count / TRAINED)) for count in counts], dtype=torch.float64)
    shift = fade(far, torch.arange(8 * TRAINED)[None], torch.float64)
    assert shift is not None
    torch.testing.assert_close(shift[0], expected, atol=1e-15, rtol=1e-15)
    assert int(expected.ne(0).nonzero()[0]) == 2 * TRAINED


@pytest.mark.parametrize(
    ("base", "fading"),
    [
        *((base, "fade") for base in ("rerope", "leaky-rerope", "self-extend", "dual-chunk")),
        *((base, "decay") for base in ("rerope", "leaky-rerope", "self-extend")),  # chunks cannot decay by distance
    ],
)
def test_nothing_changes_inside_the_trained_length(base: str, fading: str) -> None:
    ids = tokens(4 * TRAINED)
    with patch_model(model := tiny_llama(), base, factor=8):
        plain = logits(model, ids)
    with patch_model(model, f"{base}+{fading}", factor=8):
        faded = logits(model, ids)
    # float32; the log-sum-exp of pieces in another order where a decay cuts them
    torch.testing.assert_close(faded[:, :TRAINED], plain[:, :TRAINED], atol=1e-5, rtol=0)
    assert (faded - plain)[:, 3 * TRAINED :].abs().max() > 1e-2


def test_a_decay_changes_nothing_up_to_twice_the_trained_length() -> None:
    ids = tokens(4 * TRAINED)
    with patch_model(model := tiny_llama(), "leaky-rerope", factor=8):
        base = logits(model, ids)
    with patch_model(model, "leaky-rerope+decay", factor=8):
        decayed = logits(model, ids)
    # float32; the log-sum-exp of pieces in another order
    torch.testing.assert_close(decayed[:, : 2 * TRAINED], base[:, : 2 * TRAINED], atol=1e-5, rtol=0)
    assert (decayed - base)[:, 2 * TRAINED + 1 :].abs().amax(-1).min() > 1e-5
