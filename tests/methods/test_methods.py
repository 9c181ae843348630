"""Every frequency method against golden values, transformers' own rope types, and its formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_posext import NTK, Linear, Llama3, LongRoPE, NoPE, Partial, Resonance, Theta, YaRN
from hf_posext.errors import InvalidParameterError, MethodNotApplicableError, UnknownMethodError
from hf_posext.methods import DPE, EABF, CoPE, JetLong, LaMPE, Llama4Temperature, Method, SelfLogistic, as_method
from hf_posext.patching.kernels.bands import mapped
from hf_posext.plan import RotaryPlan
from hf_posext.scheme import PositionalScheme, Rotary

DIM, BASE, TRAINED, FACTOR = 128, 10_000.0, 4096, 8.0


def scheme(**overrides: object) -> PositionalScheme:
    rotary = Rotary("", BASE, DIM, DIM // 2, DIM // 2)
    fields = {"kind": "rotary", "model_type": "llama", "trained_length": TRAINED, "trained_length_source": "config"}
    return PositionalScheme(**{**fields, "shipped_length": TRAINED, "rotaries": (rotary,), **overrides})  # type: ignore[arg-type]


def planned(method: str | Method, factor: float = FACTOR, **kwargs: object) -> RotaryPlan:
    return as_method(method).plan(scheme(), factor=factor, **kwargs).rotaries[0]  # type: ignore[arg-type]


GOLDEN = {
    # published formulas evaluated by hand in float64 at d=128, theta=1e4, L=4096, s=8; pairs 0, 16, 32, 48, 63
    "linear": (Linear(), [0.125, 1.25e-2, 1.25e-3, 1.25e-4, 1.443477e-5]),
    "ntk": (NTK(), [1, 5.897173e-2, 3.477664e-3, 2.050838e-4, 1.443477e-5]),
    "yarn": (YaRN(), [1, 0.1, 5.961539e-3, 1.25e-4, 1.443477e-5]),
    "yarn-untruncated": (YaRN(truncate=False), [1, 0.1, 5.983133e-3, 1.25e-4, 1.443477e-5]),
    "llama3": (Llama3(), [1, 0.1, 1e-2, 1.25e-4, 1.443477e-5]),
    "theta": (Theta(theta=500_000), [500_000.0 ** (-i / 64) for i in (0, 16, 32, 48, 63)]),
    "partial": (Partial(proportion=0.5), [1, 0.1, 0, 0, 0]),
    "nope": (NoPE(), [0, 0, 0, 0, 0]),
    "resonance": (Resonance(), [2 * math.pi / round(2 * math.pi * 10 ** (i / 16)) for i in (0, 16, 32, 48, 63)]),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_values(case: str) -> None:
    method, values = GOLDEN[case]
    frequencies = [planned(method).inv_freq[pair] for pair in (0, 16, 32, 48, 63)]
    assert frequencies == pytest.approx(values, rel=1e-6)


@pytest.mark.parametrize(
    ("variant", "values"),
    [
        ("code", [2.7366e-2, 1.2995e-2, 5.9615e-3, 2.5954e-3, 1.0338e-3, 3.4198e-4]),
        ("paper", [2.1461e-2, 7.5396e-3, 2.8078e-3, 1.1261e-3, 4.9003e-4, 2.3028e-4]),
        ("pose", [1.5226e-2, 5.6384e-3, 2.3636e-3, 1.0595e-3, 4.9530e-4, 2.3833e-4]),
        ("radix", [2.980375e-2, 1.436731e-2, 6.299605e-3, 2.512377e-3, 9.113596e-4, 3.006964e-4]),
    ],
)
def test_the_four_yarns_differ_as_measured(variant: str, values: list[float]) -> None:
    frequencies = [planned(YaRN(variant=variant)).inv_freq[pair] for pair in (24, 28, 32, 36, 40, 44)]
    assert frequencies == pytest.approx(values, rel=3e-5)  # the table has five digits


@pytest.mark.parametrize("variant", ["code", "paper", "pose", "radix"])
def test_yarn_variants_equal_their_formulas_in_float64(variant: str) -> None:
    for i, actual in enumerate(planned(YaRN(variant=variant)).inv_freq):
        wavelength = 2 * math.pi * BASE ** (2 * i / DIM)
        if variant == "paper":
            keep = min(max((TRAINED / wavelength - 1) / 31, 0), 1)
        else:
            low = math.floor(DIM * math.log(TRAINED / (32 * 2 * math.pi)) / (2 * math.log(BASE)))
            high = math.ceil(DIM * math.log(TRAINED / (2 * math.pi)) / (2 * math.log(BASE)))
            keep = 1 - min(max((i - low) / (high - low), 0), 1)
        frequency = BASE ** (-2 * i / DIM)
        if variant == "radix":
            power = min(max((i - low) * (i - low + 1) / ((high - low) * (high - low + 1)), 0), 1) if i > low else 0
            expected = frequency / FACTOR**power
        elif variant == "pose":
            expected = frequency / ((1 - keep) * FACTOR + keep)
        else:
            expected = frequency / FACTOR * (1 - keep) + frequency * keep
        assert actual == pytest.approx(expected, rel=1e-6)


def sized(theta: float, trained: int, dim: int = DIM) -> PositionalScheme:
    return scheme(rotaries=(Rotary("", theta, dim, dim // 2, dim // 2),), trained_length=trained)


def test_cope_slows_the_slow_pairs_as_published() -> None:
    """Golden values for 128 channels, base 5e5, clip 20."""
    frequencies = CoPE(clip=20).plan(sized(5e5, 8192)).rotaries[0].inv_freq
    expected = {44: 1.2076973741e-4, 45: 9.771021437e-5, 54: 7.129065036e-6, 62: 2.055254846e-8, 63: 0}
    assert {pair: frequencies[pair] for pair in expected} == pytest.approx(expected, rel=2e-6, abs=1e-20)  # float32
    assert frequencies[:45] == Partial(proportion=1).plan(sized(5e5, 8192)).rotaries[0].inv_freq[:45]
    mask = [frequencies[44 + m] / 5e5 ** (-(44 + m) / 64) for m in (1, 10, 18)]
    assert mask == pytest.approx([0.9931806517, 0.4587103273, 0.0068193483], rel=2e-6)


@pytest.mark.parametrize(
    ("theta", "trained", "dim", "clip"),
    [(5e5, 8192, 128, 29), (1e4, 4096, 128, 18), (1e7, 262144, 64, 10), (1e4, 512, 64, 16)],
)
def test_cope_clips_the_pairs_that_do_not_turn_once(theta: float, trained: int, dim: int, clip: int) -> None:
    unclipped, clipped = (
        method.plan(sized(theta, trained, dim)).rotaries[0].inv_freq for method in (Partial(proportion=1), CoPE())
    )
    slower = [pair for pair in range(dim // 2) if clipped[pair] < unclipped[pair] * (1 - 1e-6)]
    assert slower == list(range(dim // 2 - clip + 1, dim // 2)), "the fastest of them is as it was"


def test_groups_of_self_grow_as_published() -> None:
    """Sizes before the floor at groups 50, 100, 150, 200, 300, and the groups of two keys."""
    sizes = SelfLogistic().sizes(40_000)
    assert [sizes[g] for g in (0, 50, 100, 150, 200, 300)] == [1, 2, 6, 12, 20, 30]
    assert max(sizes) == 32

    def group_of(token: int) -> int:
        covered = 0
        for group, size in enumerate(sizes):
            covered += size
            if covered > token:
                return group
        raise AssertionError

    assert (group_of(4095), group_of(32767)) == (300, 1197)


@pytest.mark.parametrize(
    ("trained", "options", "groups"),
    [
        (32_768, {}, {32_768: 1, 32_769: 2, 131_072: 4}),
        (512, {}, {1024: 2, 2048: 4, 4096: 8, 4097: 9}),
        (512, {"window": 256, "offset": True}, {512: 1, 1024: 3, 2048: 7, 4096: 15}),
    ],
)
def test_groups_of_jet_long(trained: int, options: dict[str, int], groups: dict[int, int]) -> None:
    far = JetLong(**options).plan(sized(1e4, trained), factor=8).bands[1].key  # type: ignore[arg-type]
    positions = torch.arange(40)
    for length, group in groups.items():
        assert torch.equal(mapped(positions, far, torch.tensor([[length]]))[0], positions // group)


@pytest.mark.parametrize(
    ("table", "i", "j", "expected"),
    [
        ("llama-3", 5000, 100, [1993, 1993, 2962, 1266, 1145, 1145, 1266, 1055]),
        ("llama-3", 8191, 0, [2815, 2815, 4607, 1471, 1247, 1247, 1471, 1079]),
        ("llama-3", 1023, 0, [1023] * 8),
    ],
)
def test_distances_of_dpe_as_published(table: str, i: int, j: int, expected: list[int]) -> None:
    near, far = DPE(table=table).plan(sized(5e5, 8192), factor=2).bands
    band = near if i - j < 1024 else far
    query, key = (mapped(torch.tensor([[position]]), rule) for position, rule in ((i, band.query), (j, band.key)))
    distances = (query - key).flatten().expand(64).tolist()
    assert distances == [distance for distance in expected for _ in range(8)]


def test_dpe_guesses_no_scales() -> None:
    with pytest.raises(InvalidParameterError, match="Expected dpe scales that were tuned to the model, got none"):
        DPE().plan(sized(5e5, 8192), factor=2)
    with pytest.raises(InvalidParameterError, match="llama-3, llama-3-config, llama-3.1, mistral, qwen-2.5"):
        DPE(table="llama-4")
    with pytest.raises(InvalidParameterError, match="divides 64 rotary pairs, got 3"):
        DPE(scales=[1, 2, 4]).plan(sized(5e5, 8192), factor=2)
    for scales in ([0.5, 2], [0, 1], []):
        with pytest.raises(InvalidParameterError, match="whole numbers from 1"):
            DPE(scales=scales)


@pytest.mark.parametrize(
    ("curve", "trained", "mapped_lengths"),
    [
        ("llama-3", 8192, {16384: 1993.957, 32768: 4501.089, 65536: 6129.908}),
        ("llama-3.1", 131072, {262144: 82348.58}),
    ],
)
def test_lampe_maps_as_many_positions_as_published(curve: str, trained: int, mapped_lengths: dict[int, float]) -> None:
    """The published M, by way of the last token of a row, which is mapped to its whole part."""
    far = LaMPE(curve=curve).plan(sized(5e5, trained), factor=8).bands[1]
    for length, places in mapped_lengths.items():
        last = mapped(torch.tensor([[length - 1]]), far.key, torch.tensor([[length]]))
        assert last.item() == math.floor(places)
    within = torch.arange(trained)[None]
    for rule in (far.query, far.key):
        assert torch.equal(mapped(within, rule, torch.tensor([[trained]])), within)


@pytest.mark.parametrize(
    ("trained", "lengths"), [(32_768, {131_072: 4.2}), (512, {1024: 2.0667, 2048: 4.2, 4096: 8.4667})]
)
def test_frequencies_of_jet_long_follow_the_row(trained: int, lengths: dict[int, float]) -> None:
    """The slowest pair is slowed by the whole of s, the fastest not at all, and distances go on at the window."""
    window = trained // 16
    far = JetLong(frequencies=True).plan(sized(1e6, trained), factor=8).bands[1]
    for length, scale in lengths.items():
        apart = [
            (mapped(torch.tensor([[i]]), far.query, n) - mapped(torch.tensor([[0]]), far.key, n))[0, 0]
            for n in [torch.tensor([[length]])]
            for i in (window, length - 1)
        ]
        assert apart[0].tolist() == pytest.approx([window] * 64)
        assert apart[1][0] == length - 1
        slow = (length - 1 - window) / (apart[1][-1].item() - window)
        assert slow == pytest.approx(scale, abs=5e-5)  # as printed


def test_bands_of_self_meet_and_follow_the_groups() -> None:
    method = SelfLogistic(window=1024)
    parts = method.plan(scheme(), factor=8).bands
    sizes = method.sizes(8 * TRAINED)
    position, distance = 1024, 1024
    for near, far in zip(parts, parts[1:], strict=False):
        assert near.high == far.low
        at_edge = [band.query.rate * far.low + band.query.offset for band in (near, far)]  # key at 0
        assert at_edge[0] == pytest.approx(at_edge[1], abs=1e-9)
        while distance < far.low:
            distance, position = distance + sizes[position - 1024], position + 1
        assert distance == far.low and at_edge[1] == pytest.approx(position, abs=1e-9)
    assert len(parts) == 7 and parts[-1].high is None
    with pytest.raises(InvalidParameterError, match="within 4096 positions"):
        SelfLogistic(capacity=3).plan(scheme(), factor=8)


@pytest.mark.parametrize("factor", [2.0, 8.0, 33.3])
@pytest.mark.parametrize(
    "method",
    [
        Linear(),
        YaRN(),
        YaRN(beta_fast=16, beta_slow=2, truncate=False, attention_factor=1.5),
        Llama3(low_freq_factor=2, high_freq_factor=8),
        LongRoPE(long_factor=[1 + i / 9 for i in range(DIM // 2)]),
    ],
    ids=lambda method: method.name,
)
def test_equals_the_rope_type_of_transformers_to_the_bit(method: Method, factor: float) -> None:
    entry = planned(method, factor=factor)
    sizes = {"hidden_size": 4 * DIM, "num_attention_heads": 4, "max_position_embeddings": round(TRAINED * factor)}
    config = LlamaConfig(**sizes, rope_parameters=dict(entry.rope_parameters or {}))
    native, temperature = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, torch.device("cpu"))
    assert entry.inv_freq == tuple(native.tolist())
    assert entry.attention_factor == temperature


def test_temperatures() -> None:
    assert planned(YaRN()).attention_factor == pytest.approx(1.207944, abs=1e-6)
    longrope = LongRoPE(long_factor=[1.0] * 64)
    assert planned(longrope).attention_factor == pytest.approx(1.118034, abs=1e-6)
    assert planned("linear").attention_factor == planned("ntk").attention_factor == 1.0


def test_deepseek_keeps_its_rule_for_the_temperature() -> None:
    shipped = {"rope_type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 0.5}
    rotary = Rotary("", BASE, DIM, DIM // 2, DIM // 2, shipped=shipped)
    entry = YaRN().plan(scheme(rotaries=(rotary,), shipped_length=TRAINED), factor=80).rotaries[0]
    assert entry.attention_factor == pytest.approx((0.1 * math.log(80) + 1) / (0.05 * math.log(80) + 1))
    assert entry.rope_parameters is not None and entry.rope_parameters["mscale_all_dim"] == 0.5
    assert YaRN(attention_factor=1.1).plan(scheme(rotaries=(rotary,)), factor=80).rotaries[0].attention_factor == 1.1


def test_theta_without_a_base_takes_the_critical_one() -> None:
    """The pair that just turned once within the trained length turns once within the target."""
    entry = planned("theta")
    once = math.log(TRAINED / (2 * math.pi)) / math.log(BASE)  # 2i/d of that pair, as a real number
    theta = entry.rope_parameters["rope_theta"]  # type: ignore[index]
    assert 2 * math.pi * theta**once == pytest.approx(FACTOR * TRAINED, rel=1e-9)


def test_composition_applies_one_after_the_other() -> None:
    alone, composed = planned("yarn"), planned("yarn+resonance")
    expected = [2 * math.pi / round(2 * math.pi / f) for f in alone.inv_freq]
    assert composed.inv_freq == pytest.approx(expected, rel=2e-7)
    assert composed.attention_factor == alone.attention_factor
    assert planned(YaRN() + Resonance()) == composed
    plan = (YaRN(factor=4) + Resonance()).plan(scheme())
    assert (plan.method, plan.factor) == ("yarn+resonance", 4)
    assert [entry["name"] for entry in plan.parameters] == ["yarn", "resonance"]
    separate = (NTK(factor=2) + Resonance(factor=8)).plan(scheme())
    assert (separate.factor, separate.target_length) == (8, 8 * TRAINED)
    twice = (NTK() + Resonance()).plan(scheme(), factor=2)
    assert separate.rotaries[0].inv_freq == twice.rotaries[0].inv_freq
    assert as_method("resonance+partial").plan(scheme()).factor == 1


def test_partial_on_ntk_is_not_natively_sayable_but_planned() -> None:
    ntk, composed = planned("ntk"), planned("ntk+partial")
    assert composed.inv_freq == (*ntk.inv_freq[:48], *[0.0] * 16)


def test_sliding_layers_are_left_alone_where_they_see_no_farther_than_trained() -> None:
    sets = (Rotary("full_attention", 1e6, 64, 32, 32), Rotary("sliding_attention", 1e4, 64, 32, 32, window=1024))
    names = lambda method: [entry.name for entry in as_method(method).plan(scheme(rotaries=sets), factor=2).rotaries]  # noqa: E731
    assert names("yarn") == ["full_attention"]
    assert names("nope") == ["full_attention", "sliding_attention"]
    wide = (sets[0], Rotary("sliding_attention", 1e4, 64, 32, 32, window=8192))
    assert len(YaRN().plan(scheme(rotaries=wide), factor=2).rotaries) == 2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"factor": 0}, "a number above 0 and up to 16,777,216, got factor=0"),
        ({"factor": -1}, "got factor=-1"),
        ({"factor": math.nan}, "got factor=nan"),
        ({"factor": math.inf}, "got factor=inf"),
        ({"factor": 1e9}, r"got factor=1000000000.0"),
        ({"factor": 4097}, "at most 16,777,216 tokens, got 4096 trained x 4097. Pass a smaller factor"),
        ({"target_length": 2**24 + 1}, "got target_length=16777217"),
        ({"factor": 0.5}, "below the trained length of 4096"),
        ({"target_length": 1024}, "below the trained length of 4096"),
        ({}, "needs factor= or target_length="),
        ({"factor": 2, "trained_length": 0}, "a whole number of tokens above 0 .*, got trained_length=0"),
    ],
)
def test_lengths_that_cannot_be(kwargs: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        YaRN().plan(scheme(), **kwargs)  # type: ignore[arg-type]


def test_a_factor_given_twice_has_to_be_the_same() -> None:
    for method in (YaRN(factor=16), NTK(factor=2) + Resonance(factor=16), as_method("yarn(factor=16)")):
        assert method.plan(scheme(), factor=16).factor == method.plan(scheme()).factor == 16
        with pytest.raises(
            InvalidParameterError, match="Expected one factor, got 16 in the name and 8 as the argument"
        ):
            method.plan(scheme(), factor=8)
    assert YaRN().plan(scheme(), target_length=8 * TRAINED).factor == 8
    with pytest.raises(InvalidParameterError, match="Pass one of the two"):
        YaRN(factor=16).plan(scheme(), target_length=8 * TRAINED)


def test_a_target_below_the_shipped_length_is_refused_with_both_numbers() -> None:
    shipped = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    extended = scheme(
        trained_length=8192, shipped_length=131072, rotaries=(Rotary("", 5e5, 128, 64, 64, shipped=shipped),)
    )
    with pytest.raises(InvalidParameterError, match=r"32768 tokens \(8192 trained x 4\) is below the 131072"):
        YaRN().plan(extended, factor=4)
    assert YaRN().plan(extended, factor=4, trained_length=8192).target_length == 32768
    assert YaRN().plan(extended, factor=32).target_length == 262144


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: YaRN(variant="mine"), "yarn variant to be one of code, paper, pose, radix, got 'mine'"),
        (lambda: YaRN(beta_fast=1, beta_slow=32), "beta_slow"),
        (lambda: YaRN(attention_factor=0), "attention_factor to be a number above 0 or None, got 0"),
        (lambda: Llama3(low_freq_factor=4, high_freq_factor=1), "low_freq_factor"),
        (lambda: Theta(theta=0), "Expected theta theta to be a number above 1 or None, got 0"),
        (lambda: Partial(proportion=2), "Expected partial proportion to be a number from 0 to 1, got 2"),
        (lambda: CoPE(clip=1), "a whole number of at least 2 or None, got 1"),
        (lambda: planned(CoPE(clip=65)), "2 to 64 pairs, got 65"),
        (lambda: SelfLogistic(capacity=1), "capacity to be a whole number of at least 2, got 1"),
        (lambda: SelfLogistic(rate=0), "rate to be a number above 0, got 0"),
        (lambda: EABF(skip=-1), "skip to be a whole number of at least 0, got -1"),
        (lambda: EABF(theta=0), "eabf theta to be a number above 1, got 0"),
        (lambda: Llama4Temperature(scale=0), "scale to be a number above 0, got 0"),
        (lambda: planned(JetLong(window=TRAINED, offset=True)), "window below 4096"),
        (lambda: Llama4Temperature(step=0), "step to be a whole number of at least 1 or None, got 0"),
        (lambda: planned("longrope"), "of 64 finite numbers above 0.*got none"),
        (lambda: planned(LongRoPE(long_factor=[1.0])), "got 1 numbers"),
        (lambda: planned(LongRoPE(long_factor=[math.nan] * 64)), "a list of numbers"),
        (lambda: planned(LongRoPE(long_factor=[0.0] * 64)), "finite numbers above 0"),
        (lambda: as_method(8), "Pass a name such as 'yarn'"),  # type: ignore[arg-type]
    ],
)
def test_hyper_parameters_that_cannot_be(make: object, message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        make()  # type: ignore[operator]


def test_unknown_method_suggests_the_nearest() -> None:
    with pytest.raises(UnknownMethodError, match="did you mean 'yarn'"):
        as_method("yarm")


def test_method_for_another_scheme_says_what_applies() -> None:
    bert = PositionalScheme("learned", "bert", 512, "config", 512)
    with pytest.raises(
        MethodNotApplicableError, match="yarn extends rotary positions; bert has learned; what applies"
    ):
        YaRN().plan(bert, factor=2)
    table = scheme(obstacle="gptj keeps a table of sines", rotaries=())
    with pytest.raises(MethodNotApplicableError, match="gptj keeps a table of sines; nothing applies"):
        YaRN().plan(table, factor=2)


def test_trained_length_that_nobody_tells() -> None:
    with pytest.raises(InvalidParameterError, match="Pass trained_length="):
        YaRN().plan(scheme(trained_length=None, trained_length_source="the config does not tell"), factor=2)


@pytest.mark.parametrize(("window", "group"), [(256, 32), (448, 64)])
def test_groups_of_self_extend_fit_what_a_window_leaves(window: int, group: int) -> None:
    """Trained on 512, read to 4096: (4096 - 256) / (384 - 256) = 30; a window above 384 leaves 512 - 448, so 57."""
    far = as_method(f"self-extend(window={window})").plan(sized(1e4, 512), factor=8).bands[-1]
    assert far.key.group == group
    assert 4095 // group + window - window // group < 512  # no position that training did not show
