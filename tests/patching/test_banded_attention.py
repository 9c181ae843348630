"""Attention over bands against the dense matrix of scores, and its memory."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hf_posext.patching.kernels.banded as banded
from hf_posext import patch_model
from hf_posext.methods import DualChunk, ReRoPE, SelfExtend
from hf_posext.patching.kernels.bands import Geometry, belongs
from hf_posext.plan import Band, CountFade, DistanceDecay, PositionMap

from ..conftest import tiny_llama, tokens
from .bands import Branch, attention_kernel, banded_attention

PLAIN, FAR = PositionMap(), PositionMap(rate=0)
BANDS: dict[str, tuple[Band, ...]] = {
    "window": (Band(PLAIN, PLAIN, high=16), Band(FAR, FAR, low=16)),
    "chunks": (
        Band(PLAIN, PLAIN, high=1, chunk=24),
        Band(PLAIN, PLAIN, low=1, high=2, chunk=24),
        Band(FAR, FAR, low=2, chunk=24),
    ),
    "sinks": (Band(PLAIN, PLAIN, high=20), Band(PLAIN, PLAIN, low=20, keys_below=4)),
    "fading": (
        Band(PLAIN, PLAIN, high=16),
        Band(FAR, FAR, low=16, fade=CountFade(0.7, 20), decay=DistanceDecay(1.0, 5)),
    ),
    "fading chunks": (
        Band(PLAIN, PLAIN, high=2, chunk=12),
        Band(FAR, FAR, low=2, chunk=12, fade=CountFade(1.5, 30)),
    ),
}


def bias(band: Band, i: int, j: int) -> float:
    """Return the shift that a band adds to the logit of a pair."""
    added = 0.0
    if band.fade is not None:
        far = sum(i // band.chunk - key // band.chunk >= band.low for key in range((i // band.chunk + 1) * band.chunk))
        added -= band.fade.strength * math.log(max(1, far / band.fade.reference))
    if band.decay is not None and i - j >= band.decay.start:
        octave = math.floor(math.log2((i - j) / band.decay.start))
        added -= band.decay.strength * math.log(2) * (octave + 0.5)
    return added


def dense(branches: list[Branch], value: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, **kw: Any) -> Any:
    """Attend with the whole matrix of scores at once."""
    groups = branches[0].query.shape[1] // value.shape[1]
    scores = torch.tensor(-torch.inf, dtype=value.dtype)
    for branch in branches:
        score = branch.query @ branch.key.repeat_interleave(groups, 1).transpose(-1, -2) * kw["scaling"]
        if kw.get("softcap"):
            score = kw["softcap"] * torch.tanh(score / kw["softcap"])
        if branch.band.fade or branch.band.decay:
            added = [[bias(branch.band, i, j) for j in keys[0].tolist()] for i in queries[0].tolist()]
            score = score + torch.tensor(added, dtype=score.dtype)
        scores = torch.where(belongs(branch.band, queries, keys)[:, None], score, scores)
    scores = scores.masked_fill(~kw["mask"], -torch.inf)
    if kw.get("sinks") is not None:
        scores = torch.cat([scores, kw["sinks"].view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : keys.shape[1]]
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2)


def problem(bands: str, queries: int, keys: int, learning: bool = False) -> tuple[Any, ...]:
    """Return the arguments of [`banded_attention`]: random states of two rows, and positions of queries and keys."""
    torch.manual_seed(0)

    def states(heads: int, count: int) -> torch.Tensor:
        return torch.randn(2, heads, count, 8, dtype=torch.float64, requires_grad=learning)

    branches = [Branch(band, states(4, queries), states(2, keys)) for band in BANDS[bands]]
    at_key = torch.arange(keys).expand(2, -1)
    return branches, states(2, keys), at_key[:, keys - queries :], at_key


def causal_mask(queries: int, keys: int) -> torch.Tensor:
    return torch.ones(queries, keys).tril(keys - queries).bool()[None, None]


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"sinks": torch.randn(4).double()}])
@pytest.mark.parametrize("bands", BANDS)
@pytest.mark.parametrize("counts", [(300, 300), (90, 300), (1, 300)])
def test_banded_attention_equals_dense(
    counts: tuple[int, int], bands: str, options: dict[str, Any], learning: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare values and gradients of both kernels, with each kind of mask, and for bands that are stripes or not."""
    monkeypatch.setattr(banded, "SCORE_BYTES", 2**17)  # several blocks
    monkeypatch.setattr(banded, "FUSED_ROWS", 40)
    queries, keys = counts
    branches, value, *places = problem(bands, queries, keys, learning)
    leaves = [value, *(t for branch in branches for t in (branch.query, branch.key))]
    if "sinks" in options:
        options = {"sinks": options["sinks"].clone().requires_grad_(learning)}
        leaves.append(options["sinks"])
    causal = causal_mask(queries, keys)
    weights = torch.randn(2, queries, 4, 8, dtype=torch.float64)

    def run(function: Any, **kwargs: Any) -> list[torch.Tensor]:
        out = function(branches, value, *places, scaling=0.3, **options, **kwargs)
        return [out, *torch.autograd.grad((out * weights).sum(), leaves)] if learning else [out]

    expected = run(dense, mask=causal)
    additive = torch.zeros(2, 4, queries, keys).masked_fill(~causal, torch.finfo(torch.float32).min)
    for mask in (None, causal, additive):
        for aligned, kernel in itertools.product((True, False), ("cpu", "plain")):
            with attention_kernel(kernel):
                results = run(banded_attention, mask=mask, aligned=aligned)
            torch.testing.assert_close(results, expected, atol=1e-12, rtol=0)
            assert results[0].is_contiguous(), "some models view it"


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_channels_that_do_not_lie_one_behind_the_other(which: str, learning: bool) -> None:
    """Check non-adjacent channels, from which a kernel that is called directly would silently read wrong numbers."""
    torch.manual_seed(0)

    def states(name: str, heads: int) -> torch.Tensor:
        if name == which == "value":
            return torch.randn(1, heads, 50, 1, dtype=torch.float64, requires_grad=learning).expand(-1, -1, -1, 8)
        states = torch.randn(1, heads, 8, 50, dtype=torch.float64, requires_grad=learning)
        return states.mT if name == which else states.mT.contiguous()

    branches = [Branch(band, states("query", 4), states("key", 2)) for band in BANDS["window"]]
    value, positions = states("value", 2), torch.arange(50)[None]
    causal = torch.ones(50, 50).tril().bool()[None, None]
    out = banded_attention(branches, value, positions, positions, mask=None, aligned=True, scaling=0.3)
    expected = dense(branches, value, positions, positions, mask=causal, scaling=0.3)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)  # float64, sums in another order
    if learning:
        leaves = [value, *(t for branch in branches for t in (branch.query, branch.key))]
        grads, expected_grads = (torch.autograd.grad(result.square().sum(), leaves) for result in (out, expected))
        torch.testing.assert_close(grads, expected_grads, atol=1e-11, rtol=0)


def test_biases_are_narrow() -> None:
    """Check that a decay needs biases only beside the edges of its octaves, because building them takes long."""
    decayed = Band(FAR, FAR, low=64, decay=DistanceDecay(1.0, 64))
    positions = torch.arange(4096)[None]
    geometry = Geometry((Band(PLAIN, PLAIN, high=64), decayed), positions, positions, None, aligned=True)
    pieces = geometry.pieces(4032, 4096, 2, torch.float32)
    biased = [piece.high - piece.low for piece in pieces if piece.bias is not None]
    plain = [piece.high - piece.low for piece in pieces if piece.bias is None]
    # both bands score 63 keys, and the near band one more, which makes its width a multiple of 16
    assert sum(biased) + sum(plain) == 4096 + 64 and max(biased) <= 2 * 64


class Largest(TorchDispatchMode):
    """Recorder of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in out if isinstance(out, tuple | list) else (out,):
            self.elements = max(self.elements, leaf.numel() if isinstance(leaf, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"sinks": torch.randn(4).double()}])
@pytest.mark.parametrize("bands", BANDS)
def test_a_single_query_equals_dense(bands: str, options: dict[str, Any], learning: bool) -> None:
    """Compare values and gradients of a step whose bands share their keys, with each kind of mask."""
    torch.manual_seed(0)
    query = [torch.randn(2, 4, 1, 8, dtype=torch.float64, requires_grad=learning) for _ in BANDS[bands]]
    key, value = (torch.randn(2, 2, 90, 8, dtype=torch.float64, requires_grad=learning) for _ in range(2))
    branches = [Branch(band, state, key) for band, state in zip(BANDS[bands], query, strict=True)]
    at_key = torch.arange(90).expand(2, -1)
    padded = torch.ones(2, 1, 1, 90, dtype=torch.bool)
    padded[0, ..., :7] = padded[..., 83:] = False
    heads = padded & (torch.rand(2, 4, 1, 90) < 0.8)
    additive = torch.zeros_like(padded, dtype=torch.float64).masked_fill(~padded, torch.finfo(torch.float64).min)
    for mask, visible in ((None, padded | True), (padded, padded), (heads, heads), (additive, padded)):
        with attention_kernel("plain"):
            out = banded_attention(
                branches, value, at_key[:, 80:81], at_key, mask=mask, aligned=False, scaling=0.3, **options
            )
        exact = dense(branches, value, at_key[:, 80:81], at_key, mask=visible, scaling=0.3, **options)
        torch.testing.assert_close(out, exact, atol=1e-12, rtol=0)  # float64, sums in another order
        assert out.shape == (2, 1, 4, 8) and out.is_contiguous()
        if learning:
            grads, expected_grads = (
                torch.autograd.grad(result.square().sum(), [*query, key, value]) for result in (out, exact)
            )
            for grad, expected_grad in zip(grads, expected_grads, strict=True):
                torch.testing.assert_close(grad, expected_grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", [ReRoPE(window=64), SelfExtend(group=8, window=32), DualChunk(chunk=48, local=16)])
@pytest.mark.parametrize("kernel", ["cpu", "plain"])
@pytest.mark.parametrize("learning", [False, True])
def test_memory_is_linear(learning: bool, kernel: str, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that no tensor, and no sum of saved tensors, has a quadratic size without padding."""
    monkeypatch.setattr(banded, "SCORE_BYTES", 2**20)
    monkeypatch.setattr(banded, "FUSED_ROWS", 64)
    model = tiny_llama(num_hidden_layers=1)
    patch_model(model, method, factor=64)
    sizes, elements = [], [0, 0]

    def hold(index: int, tensor: torch.Tensor) -> torch.Tensor:
        elements[index] += tensor.numel()
        return tensor

    for index, length in enumerate((2048, 4096)):
        holding = torch.autograd.graph.saved_tensors_hooks(functools.partial(hold, index), lambda tensor: tensor)
        with Largest() as largest, torch.set_grad_enabled(learning), holding, attention_kernel(kernel):
            out = model(tokens(length), use_cache=False).logits
            if learning:
                out.sum().backward()
        sizes.append(largest.elements)
    assert sizes[0] < 2048 * 256 and sizes[1] == 4096 * 128, "at 4096 tokens the logits are the largest"
    assert elements[1] <= 2.1 * elements[0]
