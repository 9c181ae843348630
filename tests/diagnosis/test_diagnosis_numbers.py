"""Numbers of the diagnosis against the model itself, formulas of the papers, and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hf_posext import detect_scheme, patch_model
from hf_posext.diagnosis import position_signal
from hf_posext.diagnosis.reading import curve_table, sample, sharpness, short_context_losses, token_losses
from hf_posext.diagnosis.weights import critical_dimension, farthest_position, phase_table, relative_positions
from hf_posext.errors import UnsupportedModelError
from hf_posext.evaluation.scorer import TokenScorer
from hf_posext.evaluation.tokens import TokenizedDocuments
from hf_posext.methods import DPE, DualChunk, LeakyReRoPE, ReRoPE, SelfExtend, as_method
from hf_posext.patching.detect import rotary_sites
from hf_posext.patching.observe import bucket_biases, buckets_of, frequencies_in_force, last_query_scores, slope_scale
from hf_posext.plan import Band, BucketPlan, PositionMap
from hf_posext.scheme import Rotary

from ..conftest import TRAINED, longer_gpt2, tiny_bloom, tiny_llama, tiny_t5, tiny_xglm, tokens
from ..zoo import build

LONG = 4 * TRAINED


def test_the_critical_dimension_of_llama_2_is_92() -> None:
    """Liu et al. 2023, table 1: a head of 128 dimensions, base 10,000, 4,096 tokens."""
    assert critical_dimension(Rotary("", 10_000.0, 128, 64, 64), 4096) == 92
    assert critical_dimension(Rotary("", 10_000.0, 128, 64, 64), 6) == 0


@pytest.mark.parametrize(
    ("method", "formula"),
    [
        (SelfExtend(group=8, window=32), lambda i, j: i - j if i - j < 32 else i // 8 + 32 - 32 // 8 - j // 8),
        (ReRoPE(window=24), lambda i, j: min(i - j, 24)),
        (LeakyReRoPE(window=24, stride=8), lambda i, j: i - j if i - j < 24 else 24 + (i - j - 24) / 8),
        (DualChunk(chunk=48, local=16), None),
    ],
)
def test_remapped_positions_are_those_of_the_papers(method: object, formula: object) -> None:
    plan = method.plan(detect_scheme(tiny_llama()), factor=4)
    positions = relative_positions(plan, torch.arange(LONG), torch.arange(LONG))

    def dual_chunk(i: int, j: int) -> int:  # An et al. 2024: chunks of 48 - 16 tokens
        apart = i // 32 - j // 32
        query = (i % 32, min(i % 32 + 32, 48), min(63, 48))[min(apart, 2)]
        return query - j % 32

    expected = torch.full_like(positions, math.nan)
    for i in range(LONG):
        for j in range(i + 1):
            expected[i, j] = (formula or dual_chunk)(i, j)
    torch.testing.assert_close(positions, expected, equal_nan=True, rtol=1e-6, atol=0)  # float32 of leaky distances
    # queries are sampled, so that it may miss the largest by as much as they are apart
    assert farthest_position(plan, LONG) == pytest.approx(float(expected.nan_to_num(0).max()), abs=LONG / 63)


def test_positions_of_each_pair_are_those_of_the_papers() -> None:
    plan = DPE(scales=[2, 8], window=32).plan(scheme := detect_scheme(tiny_llama()), factor=4)
    places = torch.arange(LONG)
    for pair, group in ((0, 2), (3, 2), (4, 8), (7, 8)):
        positions = relative_positions(plan, places[-1:], places, pair)[0].tolist()
        last = LONG - 1
        expected = [last - j if last - j < 32 else last // group + 32 - 32 // group - j // group for j in range(LONG)]
        assert positions == expected
    in_force = {"": torch.tensor([10_000.0 ** (-p / 8) for p in range(8)])}
    table = phase_table(scheme, in_force, {"dpe": plan}, 64, LONG).set_index("pair")
    turns = [float(in_force[""][p]) * ((LONG - 1) // g + 32 - 32 // g) / (2 * math.pi) for p, g in ((0, 2), (7, 8))]
    assert table.turns[[0, 7]].tolist() == pytest.approx(turns)


SAME = PositionMap()
PARTS = {
    "a window": (Band(SAME, SAME, high=32),),
    "chunks in a window": (Band(SAME, SAME, low=1, high=4, chunk=9),),
    "keys that begin anew": (Band(PositionMap(rate=0, offset=90), PositionMap(modulo=40), high=45),),
    "keys that do not yet": (Band(SAME, PositionMap(modulo=2000), high=32),),
    "begin anew in groups": (
        Band(PositionMap(modulo=200), PositionMap(modulo=50, group=3, limit=9), high=9, chunk=8),
    ),
    "a window and the first keys": (
        Band(SAME, SAME, high=32),
        Band(PositionMap(limit=50), SAME, low=32, keys_below=4),
    ),
}


@pytest.mark.parametrize("length", [LONG, 1000, 1001])
@pytest.mark.parametrize("name", [*PARTS, "self-extend(group=8, window=32)", "dual-chunk(chunk=48, local=16)", "yarn"])
def test_the_farthest_of_few_keys_is_the_farthest_of_all(name: str, length: int) -> None:
    plan = as_method("yarn" if name in PARTS else name).plan(detect_scheme(tiny_llama()), target_length=length)
    plan = plan.with_edits(Band, *PARTS.get(name, plan.bands))
    queries = torch.linspace(0, length - 1, 64, dtype=torch.float64).round().long()
    all_keys = relative_positions(plan, queries, torch.arange(length))
    assert farthest_position(plan, length) == float(all_keys.nan_to_num(0).max()) > 0


@pytest.mark.parametrize("method", ["none", "linear", "yarn", "ntk", "llama3"])
def test_a_rotary_signal_is_what_the_patched_model_turns_by(method: str) -> None:
    model = tiny_llama()
    scheme = detect_scheme(model)
    plan = None if method == "none" else as_method(method).plan(scheme, factor=4)
    signal = position_signal(model, scheme, plan, LONG, TRAINED)
    assert signal is not None and signal.over == "distance" and signal.method == method
    with patch_model(model, plan or as_method("none"), **({} if plan else {"factor": 1.0})):
        (site,) = rotary_sites(model)
        phases = site.phases(torch.arange(LONG))  # cosines of all pairs twice, then sines
        factor = site.module.attention_scaling
    # float32 phases of the model against float64 ones: 256 radians times an eps of 6e-8
    np.testing.assert_allclose(signal.values, phases[:, :8].T / factor, atol=5e-5)
    turns = plan.rotaries[0].inv_freq if plan else site.module.inv_freq.tolist()
    unscaled = [10_000 ** (-2 * pair / 16) for pair in range(8)]
    expected = [
        [
            frequency * position > unscaled_frequency * TRAINED and unscaled_frequency * TRAINED < 2 * math.pi
            for position in range(LONG)
        ]
        for frequency, unscaled_frequency in zip(turns, unscaled, strict=True)
    ]
    apart = np.arange(LONG) != TRAINED  # there, rounding decides
    np.testing.assert_array_equal(signal.unseen[:, apart], np.array(expected)[:, apart])


def test_a_table_signal_is_the_rows_of_the_patched_model() -> None:
    model = longer_gpt2()  # three times as many rows as it was trained on
    scheme = detect_scheme(model)
    plan = as_method("table-linear").plan(scheme, target_length=LONG, trained_length=TRAINED)
    for signal in (
        position_signal(model, scheme, None, LONG, TRAINED),
        position_signal(model, scheme, plan, LONG, 64),
    ):
        assert signal is not None
        with patch_model(model, plan if signal.method != "none" else "none"):
            rows = model.transformer.wpe.weight.detach().numpy()
        values = signal.values[:, : len(rows)]
        np.testing.assert_array_equal(values.astype(np.float32), rows[:LONG, signal.channels].T)
        assert np.isnan(signal.values[:, len(rows) :]).all()
        unseen = np.arange(LONG) >= TRAINED if signal.method == "none" else np.zeros(LONG, dtype=bool)
        assert (signal.unseen == unseen).all()


def test_an_alibi_signal_goes_on_past_training() -> None:
    model = tiny_bloom()
    scheme = detect_scheme(model)
    plan = as_method("alibi-linear").plan(scheme, factor=4, trained_length=TRAINED)
    plain = position_signal(model, scheme, None, LONG, TRAINED)
    extended = position_signal(model, scheme, plan, LONG, TRAINED)
    assert plain is not None and extended is not None
    slopes = [2 ** (-8 * (head + 1) / 4) for head in range(4)]
    np.testing.assert_allclose(plain.values, -np.outer(slopes, np.arange(LONG)), rtol=1e-6)
    np.testing.assert_allclose(extended.values, plain.values / 4, rtol=1e-6)
    assert plain.unseen.sum() == 4 * (LONG - TRAINED - 1) and not extended.unseen.any()


def test_sines_are_squeezed() -> None:
    model = tiny_xglm()
    scheme = detect_scheme(model)
    plan = as_method("sinusoid-linear").plan(scheme, factor=4)
    plain = position_signal(model, scheme, None, LONG, TRAINED)
    squeezed = position_signal(model, scheme, plan, LONG, TRAINED)
    assert plain is not None and squeezed is not None
    # position 4 p of the squeezed sines is position p of the others
    np.testing.assert_allclose(squeezed.values[:, ::4], plain.values[:, :TRAINED], atol=1e-7)
    assert plain.unseen.any() and not squeezed.unseen.any()
    sines = model.model.embed_positions
    for signal, method in ((plain, "none"), (squeezed, plan)):
        with patch_model(model, method):
            rows = sines.get_embedding(LONG + sines.offset, sines.embedding_dim, sines.padding_idx)[sines.offset :]
        # angles of up to 256 radians are float32 in the model
        np.testing.assert_allclose(signal.values, rows[:, signal.channels].T.numpy(), rtol=0, atol=256 * 2**-24)


def test_sines_of_another_order_are_those_that_the_model_makes() -> None:
    model = build("musicgen")  # cosines first
    sines = model.model.decoder.embed_positions
    near, far = (position_signal(model, detect_scheme(model), None, length, TRAINED) for length in (LONG, 10**8))
    assert near is not None and far is not None
    np.testing.assert_array_equal(near.values, sines.get_embedding(LONG, sines.embedding_dim).T[near.channels])
    assert np.isfinite(far.values[:, 0]).all() and np.isnan(far.values[:, 1:]).all(), "no such table is made"


def test_bucket_signals_are_the_biases_of_the_model() -> None:
    model = tiny_t5()
    scheme = detect_scheme(model)
    attention = model.encoder.block[0].layer[0].SelfAttention
    bias = attention.compute_bias(LONG, LONG)[0, :, -1].flip(-1).detach()  # of the last query, nearest key first
    signal = position_signal(model, scheme, None, LONG, TRAINED)
    assert signal is not None and not signal.unseen.any()
    np.testing.assert_array_equal(signal.values.astype(np.float32), bias.numpy())
    squeezed = buckets_of(model, torch.arange(0, LONG, 4), BucketPlan(factor=4))
    assert torch.equal(squeezed, buckets_of(model, torch.arange(LONG // 4), BucketPlan()))
    assert bucket_biases(model).shape == (32, 4)


def test_long_signals_are_means_of_positions() -> None:
    model = tiny_bloom()
    signal = position_signal(model, detect_scheme(model), None, 32_768, None)
    assert signal is not None and signal.values.shape == (4, 2048) and not signal.unseen.any()
    np.testing.assert_allclose(signal.values[0], -0.25 * (16 * np.arange(2048) + 7), rtol=1e-6)  # 0, 2, ... 14 of 16


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope"])
def test_frequencies_in_force_are_those_of_a_long_input_and_leave_the_model(kind: str) -> None:
    rope: dict[str, object] = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0}
    rope |= {} if kind == "dynamic" else {"original_max_position_embeddings": TRAINED}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8} if kind == "longrope" else {}
    model = tiny_llama(rope_parameters=rope, max_position_embeddings=TRAINED if kind == "dynamic" else LONG)
    before = model.model.rotary_emb.inv_freq.clone()
    (frequencies,) = frequencies_in_force(model, LONG).values()
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    with torch.no_grad():
        model(tokens(LONG))
    assert torch.equal(frequencies, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "mpt", "gpt_neox", "phi3", "gemma"])
def test_scores_are_those_of_the_model(model_type: str) -> None:
    model, ids = build(model_type), tokens(60)[0] % 100
    scores_at = dict(last_query_scores(model, ids, 12))
    assert list(scores_at) == [11, 23, 35, 47, 59]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(input_ids=ids[None], output_attentions=True, use_cache=False).attentions
    for position, layers in scores_at.items():
        assert len(layers) == len(weights)
        for scores, layer in zip(layers, weights, strict=True):
            weights_of_query = layer[0, :, position, : position + 1]
            # the cache has keys that were made in other shapes; float32
            torch.testing.assert_close(scores.softmax(-1), weights_of_query, rtol=1e-3, atol=1e-5)


def test_falcon_divides_its_slopes() -> None:
    """With sdpa its mask holds the biases as the softmax gets them; its eager attention adds them once more."""
    model, masks = build("falcon", alibi=True), []
    attention = model.transformer.h[0].self_attention
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with torch.no_grad():
        model(tokens(32) % 100)
    steps = masks[0][0, :, -1].diff(dim=-1).mean(-1)
    expected = torch.tensor(detect_scheme(model).slopes) * slope_scale(model)
    torch.testing.assert_close(steps, expected, rtol=1e-2, atol=0)  # its biases are rounded to bfloat16
    with pytest.raises(UnsupportedModelError, match="twice"):
        next(last_query_scores(model, tokens(32)[0] % 100, 8))


def test_sharpness_is_entropy_and_spread_of_what_is_seen() -> None:
    scores = torch.tensor([[0.3, -1.0, 2.0, -3.4e38], [1.0, 1.0, 1.0, -torch.inf]])
    entropies, spreads = [], []
    for row in scores[:, :3].double():
        weights = [math.exp(x) / sum(math.exp(y) for y in row) for x in row]
        entropies.append(-sum(w * math.log(w) for w in weights))
        spreads.append(float(row.std(correction=0)))
    assert sharpness(scores) == pytest.approx((np.mean(entropies), np.mean(spreads)), rel=1e-6)
    assert sample(6) == [0, 2, 3, 5] and sample(32) == [0, 10, 21, 31] and sample(1) == [0]


@pytest.mark.parametrize("bos", [False, True])
def test_losses_are_those_of_a_plain_loop(bos: bool) -> None:
    model, rows, context = tiny_llama(), tokens(50, rows=2), 12
    documents = TokenizedDocuments(["a", "b"], rows, bos)
    scorer = TokenScorer(model)

    @torch.no_grad()
    def loss(row: torch.Tensor, begin: int, token: int) -> float:
        window = row[begin : token + 1].clone()
        window[0] = row[0] if bos else window[0]
        return float(F.cross_entropy(model(window[None, :-1]).logits[0, -1:], row[token : token + 1]))

    def begins(token: int) -> int:
        """Of the window that scores a token: the first that holds it in its second half, or the last of all."""
        if token < context:
            return 0
        regular = [begin for begin in range(6, 50 - context, 6) if begin + 6 <= token < begin + context]
        return 50 - context if token >= 50 - context // 2 or not regular else regular[0]

    full = [[loss(row, 0, token) for token in range(1, 50)] for row in rows]
    # products of matrices of other shapes round differently in float32
    np.testing.assert_allclose(token_losses(scorer, documents), full, rtol=1e-4)
    short = [[loss(row, begins(token), token) for token in range(1, 50)] for row in rows]
    np.testing.assert_allclose(short_context_losses(scorer, documents, context), short, rtol=1e-4)


def test_a_curve_is_the_mean_of_its_stretches() -> None:
    losses = np.random.default_rng(0).random((4, 319))
    table = curve_table([("none", losses), ("shorter", losses[:, :159])])
    plain = table[table.curve == "none"]
    assert plain.begin.tolist() == [1, *range(10, 320, 10)] and plain.end.tolist() == list(range(10, 321, 10))
    np.testing.assert_allclose(plain.nll.iloc[1], losses[:, 9:19].mean())
    assert ((plain.low < plain.nll) & (plain.nll < plain.high)).all()
    assert table[table.curve == "shorter"].end.max() == 160
    assert curve_table([("one", losses[:1])]).low.isna().all()
