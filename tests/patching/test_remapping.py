"""Every remapping and dynamic method against a float64 loop over pairs of its formula, many windows long."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_posext import detect_scheme, patch_model
from hf_posext.errors import InvalidParameterError
from hf_posext.methods import (
    DPE,
    EABF,
    NTK,
    Decay,
    DualChunk,
    DynamicNTK,
    DynamicYaRN,
    Fade,
    JetLong,
    LaMPE,
    LeakyReRoPE,
    Llama4Temperature,
    LogN,
    Method,
    ReRoPE,
    SelfExtend,
    SelfLogistic,
    Sinks,
    StringShift,
    YaRN,
)
from hf_posext.patching.modes import cache_of, with_cache
from hf_posext.patching.remap.attention import query_factor

from ..conftest import TRAINED, logits, tiny_llama, tokens
from ..helpers import padded, positions_of

LENGTH = 5 * TRAINED
Relative = Callable[[int, int], float | list[float] | None]
"""Map from query i and key j <= i to the distance of their phases: one for all pairs of channels or one for each.
`None` if the query does not attend to the key."""


def naive_llama(
    model: LlamaForCausalLM,
    ids: torch.Tensor,
    relative: Relative,
    *,
    theta: float = 10_000.0,
    inv_freq: list[float] | None = None,
    attention_factor: float = 1.0,
    query_factor: Callable[[int], float] = lambda i: 1.0,
    bias: Callable[[int, int], float] = lambda i, j: 0.0,
    first_layer: int = 0,
) -> torch.Tensor:
    """Return the logits (tokens, vocabulary) of a row in float64, with each pair of tokens rotated by its distance."""
    model = model.double()
    config = model.config
    heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    pairs = torch.tensor(inv_freq or [theta ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
    count = ids.shape[-1]
    distance = torch.full((count, count, dim // 2), math.nan, dtype=torch.float64)
    for i in range(count):
        for j in range(i + 1):
            relative_position = relative(i, j)
            if relative_position is not None:
                distance[i, j] = torch.tensor(relative_position, dtype=torch.float64)
    angle = distance.nan_to_num() * pairs
    cos, sin = angle.cos() * attention_factor**2, angle.sin() * attention_factor**2
    added = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(i + 1):
            added[i, j] = bias(i, j)
    grow = torch.tensor([query_factor(i) for i in range(count)], dtype=torch.float64)

    x = model.model.embed_tokens(ids.reshape(-1))
    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        h = layer.input_layernorm(x)
        q = attention.q_proj(h).view(count, heads, dim)
        k = attention.k_proj(h).view(count, groups, dim).repeat_interleave(heads // groups, 1)
        v = attention.v_proj(h).view(count, groups, dim).repeat_interleave(heads // groups, 1)
        q1, q2, k1, k2 = q[..., : dim // 2], q[..., dim // 2 :], k[..., : dim // 2], k[..., dim // 2 :]
        # Re[(q1 + i q2) conj(k1 + i k2) e^(i angle)], summed over pairs
        aligned = torch.einsum("ihp,jhp->hijp", q1, k1) + torch.einsum("ihp,jhp->hijp", q2, k2)
        cross = torch.einsum("ihp,jhp->hijp", q1, k2) - torch.einsum("ihp,jhp->hijp", q2, k1)
        scores = ((aligned * cos + cross * sin).sum(-1)) / math.sqrt(dim)
        scores = scores * (grow[:, None] if number >= first_layer else 1) + added
        weights = scores.masked_fill(distance[..., 0].isnan(), -math.inf).softmax(-1)
        x = x + attention.o_proj(torch.einsum("hij,jhd->ihd", weights, v).reshape(count, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    result: torch.Tensor = model.lm_head(model.model.norm(x))
    return result


def dual_chunk(i: int, j: int, chunk: int = 24, local: int = 8) -> float:
    """Return a distance of dual chunk, in chunks of `chunk - local` tokens, exact for `local` tokens into the last."""
    size = chunk - local
    if i // size == j // size:
        return i - j
    if i // size == j // size + 1:
        distance = min(i % size + size, chunk) - j % size
        assert distance == i - j or i - j > local
        return distance
    return min(2 * size - 1, chunk) - j % size


def dpe(i: int, j: int) -> list[float]:
    """Return the distances of four groups of two pairs."""
    if i - j < 16:
        return [i - j] * 8
    return [i // g + 16 - 16 // g - j // g for g in (4, 4, 1, 1, 2, 2, 16, 16)]


def jet_frequencies(i: int, j: int) -> list[float]:
    """Return distances that slow a pair like YaRN's frequencies beyond 6 tokens."""
    if i - j <= 6:
        return [i - j] * 8
    slowed = yarn_frequencies((LENGTH - 6) / (TRAINED - 6))
    return [6 + (i - j - 6) * slowed[p] / 10_000 ** (-p / 8) for p in range(8)]


def lampe(i: int, j: int) -> float:
    """Return the distances of Llama 3's curve, in units of the trained length."""
    if i - j <= 12:
        return i - j
    places = 6204.409324666837 / (
        1 + math.exp(-(0.00010493097327094324 * LENGTH * 8192 / TRAINED - 2.466638011138158))
    )
    rate = places * TRAINED / 8192 / (LENGTH - 1)
    return math.floor(i * rate) + 12 - (math.floor(12 * rate) + 1) - math.floor(j * rate)


def sinks(i: int, j: int) -> float | None:
    if i - j < 20:
        return i - j
    return min(i, 4 + 20 - 1) - j if j < 4 else None


def self_logistic(i: int, j: int, window: int = 16, capacity: int = 17, rate: float = 0.2) -> float:
    """Return a map that is linear between the distances at which the size of groups doubles."""
    if i - j < window:
        return i - j
    sizes = [
        min(max(math.floor(capacity / (1 + (capacity - 1) * math.exp(-rate * g)) + 1e-9), 1), capacity - 1)
        for g in range(200)
    ]
    edges, group, tokens = [(window, window)], 0, 0
    total = 8 * TRAINED - window  # what the plan is for
    for g, size in enumerate(sizes):
        if size >= 2 * sizes[group] or tokens >= total:
            edges.append((window + tokens, window + g))
            group = g
        if tokens >= total:
            break
        tokens += size
    for (near, at_near), (far, at_far) in zip(edges, edges[1:], strict=False):
        if i - j < far or far == edges[-1][0]:
            return at_near + (i - j - near) * (at_far - at_near) / (far - near)
    raise AssertionError


def fade(count: int, reference: int, strength: float = 1.0) -> float:
    """Return the shift that a count fade adds to the logits of a query with `far` far keys."""
    return -strength * math.log(max(1, count / reference))


def decay(distance: int, start: int, strength: float = 1.0) -> float:
    """Return the shift of a decay: constant within an octave of distances, exact at its geometric middle."""
    for octave in range(40):
        if start * 2**octave <= distance < start * 2 ** (octave + 1):
            return -strength * math.log(math.sqrt(2) * 2**octave)
    return 0.0


def yarn_frequencies(scale: float, dim: int = 16, base: float = 10_000.0) -> list[float]:
    low = math.floor(dim * math.log(TRAINED / (32 * 2 * math.pi)) / (2 * math.log(base)))
    high = math.ceil(dim * math.log(TRAINED / (2 * math.pi)) / (2 * math.log(base)))
    low = max(low, 0)
    ramp = [min(max((i - low) / (high - low), 0), 1) for i in range(dim // 2)]
    return [base ** (-2 * i / dim) * (ramp[i] / scale + 1 - ramp[i]) for i in range(dim // 2)]


CASES: dict[str, tuple[Method, Relative, dict[str, object]]] = {
    "rerope": (ReRoPE(window=16), lambda i, j: min(i - j, 16), {}),
    "leaky-rerope": (
        LeakyReRoPE(window=16, stride=3.5),
        lambda i, j: i - j if i - j < 16 else 16 + (i - j - 16) / 3.5,
        {},
    ),
    "self-extend": (
        SelfExtend(group=4, window=12),
        lambda i, j: i - j if i - j < 12 else i // 4 + 12 - 12 // 4 - j // 4,
        {},
    ),
    "dual-chunk": (DualChunk(chunk=24, local=8), dual_chunk, {}),
    "dual-chunk with a temperature": (
        DualChunk(chunk=24, local=8, temperature=0.1),
        dual_chunk,
        {"query_factor": lambda i: (1 + 0.1 * math.log(max(1, (i + 1) / TRAINED))) ** 2},
    ),
    "string-shift": (StringShift(shift=20, local=6), lambda i, j: i - j if i - j < 20 else i - j - 20 + 6, {}),
    "string-shift with its published temperature": (
        StringShift(shift=20, local=6, attention_factor=0.1 * math.log(2) + 1),
        lambda i, j: i - j if i - j < 20 else i - j - 20 + 6,
        {"attention_factor": 0.1 * math.log(2) + 1},
    ),
    "sinks": (Sinks(sinks=4, window=20), sinks, {}),
    "log-n": (
        LogN(),
        lambda i, j: i - j,
        {"query_factor": lambda i: max(1, math.log(i + 1) / math.log(TRAINED))},
    ),
    "rerope+log-n": (
        ReRoPE(window=16) + LogN(),
        lambda i, j: min(i - j, 16),
        {"query_factor": lambda i: max(1, math.log(i + 1) / math.log(TRAINED))},
    ),
    "llama4-temperature": (
        Llama4Temperature(step=48),
        lambda i, j: i - j,
        {"query_factor": lambda i: 1 + 0.1 * math.log((i + 1) // 48 + 1)},
    ),
    "eabf": (
        EABF(skip=1),
        lambda i, j: i - j,
        {
            "theta": 500_000.0,
            "query_factor": lambda i: max(1, math.log(i + 1) / math.log(TRAINED)),
            "first_layer": 1,
        },
    ),
    "self-logistic": (SelfLogistic(window=16, capacity=17, rate=0.2), self_logistic, {}),
    "jet-long": (
        JetLong(window=6),
        lambda i, j: i - j if i - j <= 6 else i // (LENGTH // TRAINED) - j // (LENGTH // TRAINED),
        {},
    ),
    "jet-long with an offset": (
        JetLong(window=24, offset=True),
        lambda i, j: i - j if i - j < 24 else i // 8 + 24 - 24 // 8 - j // 8,  # ceil((320 - 24) / (64 - 24)) is 8
        {},
    ),
    "jet-long by frequencies": (
        JetLong(window=6, frequencies=True),
        jet_frequencies,
        {"query_factor": lambda i: 0.1 * math.log((LENGTH - 6) / (TRAINED - 6)) + 1},
    ),
    "jet-long by frequencies+decay": (
        JetLong(window=6, frequencies=True) + Decay(start=7),
        jet_frequencies,
        {
            "query_factor": lambda i: 0.1 * math.log((LENGTH - 6) / (TRAINED - 6)) + 1,
            "bias": lambda i, j: decay(i - j, 7) if i - j > 6 else 0.0,
        },
    ),
    "dpe": (DPE(scales=[4, 1, 2, 16], window=16), dpe, {}),
    "dpe+fade": (
        DPE(scales=[4, 1, 2, 16], window=16) + Fade(),
        dpe,
        {"bias": lambda i, j: fade(i + 1 - 16, TRAINED) if i - j >= 16 else 0.0},
    ),
    "yarn+dpe": (
        YaRN() + DPE(scales=[4, 1, 2, 16], window=16),
        dpe,
        {"inv_freq": yarn_frequencies(8), "attention_factor": 0.1 * math.log(8) + 1},
    ),
    "lampe": (LaMPE(head=12), lampe, {"query_factor": lambda i: (0.1 * math.log(2) + 1) ** 2}),
    "rerope+fade": (
        ReRoPE(window=16) + Fade(reference=20, strength=1.5),
        lambda i, j: min(i - j, 16),
        {"bias": lambda i, j: fade(i + 1 - 16, 20, 1.5) if i - j >= 16 else 0.0},
    ),
    "self-extend+fade": (
        SelfExtend(group=4, window=12) + Fade(),
        lambda i, j: i - j if i - j < 12 else i // 4 + 12 - 12 // 4 - j // 4,
        {"bias": lambda i, j: fade(i + 1 - 12, TRAINED) if i - j >= 12 else 0.0},
    ),
    "dual-chunk+fade": (
        DualChunk(chunk=24, local=8) + Fade(reference=20),
        dual_chunk,
        {"bias": lambda i, j: fade((i // 16 - 1) * 16, 20) if i // 16 - j // 16 > 1 else 0.0},
    ),
    "leaky-rerope+decay": (
        LeakyReRoPE(window=16, stride=3.5) + Decay(),
        lambda i, j: i - j if i - j < 16 else 16 + (i - j - 16) / 3.5,
        {"bias": lambda i, j: decay(i - j, 2 * TRAINED) + fade(i + 1 - 16, 2 * TRAINED - 16) if i - j >= 16 else 0.0},
    ),
    "leaky-rerope+fade+decay": (
        LeakyReRoPE(window=16, stride=3.5) + Fade(strength=0.2, reference=20) + Decay(strength=0.7),
        lambda i, j: i - j if i - j < 16 else 16 + (i - j - 16) / 3.5,
        {"bias": lambda i, j: decay(i - j, 2 * TRAINED, 0.7) + fade(i - 15, 20, 0.2) if i - j >= 16 else 0.0},
    ),
    "string-shift+decay": (
        StringShift(shift=20, local=6) + Decay(strength=1.5, start=25),
        lambda i, j: i - j if i - j < 20 else i - j - 20 + 6,
        {"bias": lambda i, j: decay(i - j, 25, 1.5)},
    ),
    "rerope+log-n+decay+fade": (
        ReRoPE(window=16) + LogN() + Decay(strength=0.3, start=20) + Fade(strength=0.2),
        lambda i, j: min(i - j, 16),
        {
            "query_factor": lambda i: max(1, math.log(i + 1) / math.log(TRAINED)),
            "bias": lambda i, j: decay(i - j, 20, 0.3) + fade(i - 15, TRAINED, 0.2) if i - j >= 16 else 0.0,
        },
    ),
    "ntk+dual-chunk": (NTK() + DualChunk(chunk=24, local=8), dual_chunk, {"theta": 10_000.0 * 8 ** (16 / 14)}),
    "dynamic-ntk": (DynamicNTK(), lambda i, j: i - j, {"theta": 10_000.0 * (LENGTH / TRAINED) ** (16 / 14)}),
    "dynamic-yarn": (
        DynamicYaRN(),
        lambda i, j: i - j,
        {
            "inv_freq": yarn_frequencies(LENGTH / TRAINED),
            "attention_factor": 0.1 * math.log(LENGTH / TRAINED) + 1,
        },
    ),
}
IDS = tokens(LENGTH)


@functools.cache
def reference(case: str, length: int = LENGTH) -> torch.Tensor:
    _, relative, kwargs = CASES[case]
    with torch.no_grad():
        return naive_llama(tiny_llama(), IDS[:, :length], relative, **kwargs)  # type: ignore[arg-type]


# the phases of the model are float32 (6e-8 of up to 320 radians); measured: at most 1.5e-6 of logits that spread by 4
TOLERANCE = {"atol": 1e-5, "rtol": 0.0}


@pytest.mark.parametrize("case", CASES)
def test_equals_a_loop_over_pairs(case: str) -> None:
    model = tiny_llama().double()
    patch_model(model, CASES[case][0], factor=8)
    torch.testing.assert_close(logits(model, IDS)[0], reference(case), **TOLERANCE)


FOLLOWING = ("dynamic", "jet-long", "lampe")
"""Names of the methods that follow the length of each row."""

SINGLE_PASS = [case for case in CASES if not case.startswith(FOLLOWING)]


@pytest.mark.parametrize("case", SINGLE_PASS)
def test_prefill_chunk_and_decode_equal_the_loop(case: str) -> None:
    """Compare a prefill past several windows, a chunk, and single tokens with one forward."""
    model = tiny_llama().double()
    patch_model(model, CASES[case][0], factor=8)
    bounds = [0, 3 * TRAINED, 4 * TRAINED, *range(4 * TRAINED + 1, 4 * TRAINED + 20)]
    steps, cache = [], None
    with torch.no_grad():
        for start, stop in zip(bounds, bounds[1:], strict=False):
            out = model(IDS[:, start:stop], use_cache=True, **with_cache(model.forward, cache))
            cache = cache_of(out)
            steps.append(out.logits[0])
    torch.testing.assert_close(torch.cat(steps), reference(case)[: bounds[-1]], **TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_left_padded_rows_of_unequal_length_equal_the_loop(case: str) -> None:
    model = tiny_llama().double()
    patch_model(model, CASES[case][0], factor=8)
    short = IDS[:, : LENGTH - 70]
    ids, mask = padded(short, IDS)
    rows = logits(model, ids, attention_mask=mask, position_ids=positions_of(mask))
    torch.testing.assert_close(rows[1], reference(case), **TOLERANCE)
    # of a method that follows rows, a row's own length counts, not its batch-mate's
    alone = logits(model, short)[0] if case.startswith(FOLLOWING) else reference(case, short.shape[1])
    torch.testing.assert_close(rows[0, 70:], alone, **TOLERANCE)


@pytest.mark.parametrize("method", ["dynamic-ntk", "dynamic-yarn"])
def test_dynamic_methods_leave_short_rows_alone_and_decode_with_a_small_residual(method: str) -> None:
    """Check that cached decoding nearly equals a new forward of each length.

    The rest of the difference comes from deeper layers, which have seen an earlier, smaller scale. transformers' own
    dynamic RoPE also keeps rotated keys.
    """
    model = tiny_llama()
    plain = logits(model, IDS[:, :TRAINED])
    stock = tiny_llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 1.0})
    patch_model(model, method, factor=8)
    assert torch.equal(logits(model, IDS[:, :TRAINED]), plain)

    def residual(llama: LlamaForCausalLM) -> float:
        with torch.no_grad():
            out = llama(IDS[:, :TRAINED], use_cache=True)
            for i in range(TRAINED, 2 * TRAINED):
                out = llama(IDS[:, i : i + 1], use_cache=True, **with_cache(llama.forward, cache_of(out)))
        return float((out.logits[0, -1] - logits(llama, IDS[:, : 2 * TRAINED])[0, -1]).abs().max())

    assert 0 < residual(model) < residual(stock)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (SelfExtend(group=5, window=12), "a multiple of the group, got 12 and 5. Pass e.g. window=10"),
        (ReRoPE(window=0), r"Expected a rerope window of 1 to 64 \(the trained length\), got 0"),
        (ReRoPE(window=65), "got 65"),
        (DualChunk(chunk=16, local=16), "Expected a dual-chunk local of 1 to 15, got 16"),
        (StringShift(shift=16, local=17), r"local of 1 to 16 \(the shift\), got 17"),
        (Sinks(sinks=60, window=5), "together at most 64 .the trained length., got 60 and 5"),
        (ReRoPE() + SelfExtend(), "remaps positions twice"),
        (LogN() + LogN(), "scales queries twice"),
        (Fade(), "after a method with a band of far keys, got 'fade'. Pass e.g. 'rerope\\+fade'"),
        (Fade() + ReRoPE(), "after a method with a band of far keys"),
        (NTK() + Decay(), "after a method with a band of far keys"),
        (Sinks(sinks=4, window=20) + Fade(), "after a method with a band of far keys"),
        (DualChunk() + Decay(), "a far band that begins at a distance, got the chunks of dual-chunk"),
        (ReRoPE() + Fade() + Fade(), "one fade, got two"),
        (ReRoPE() + Decay() + Decay(), "one decay, got two"),
        (ReRoPE() + Decay() + Fade(), "one fade, got two .* A decay without a start contains one"),
        (ReRoPE(window=20) + Decay(start=19), "a decay start of 20 .the window. or more, got 19"),
    ],
)
def test_parameters_that_cannot_be(method: Method, message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        patch_model(tiny_llama(), method, factor=8)
    for make in (lambda: LeakyReRoPE(stride=0.5), lambda: DynamicYaRN(temperature=-1), lambda: SelfExtend(group=0)):
        with pytest.raises(InvalidParameterError, match="Expected"):
            make()
    for fades in (Fade, Decay):
        for strength in (0, -1, math.nan, math.inf):
            with pytest.raises(InvalidParameterError, match=f"Expected {fades.name} strength to be a .*number"):
                fades(strength=strength)
    with pytest.raises(InvalidParameterError, match="fade reference to be a whole number of at least 1"):
        Fade(reference=0)


def test_golden_values_of_the_temperature_of_llama_4() -> None:
    """Compare with transformers' own temperature, at a scale of 0.1 and a step of 8192."""
    scale = Llama4Temperature().plan(replace(detect_scheme(tiny_llama()), trained_length=8192)).query_scale
    positions = torch.tensor([[8190, 8191, 16383, 65535]])
    assert scale is not None
    factors = query_factor(scale, positions, lambda of: of).flatten()
    torch.testing.assert_close(
        factors, torch.tensor([1, 1.069315, 1.109861, 1.219722]), atol=1e-6, rtol=0
    )  # as printed


@pytest.mark.parametrize("method", [JetLong(), JetLong(offset=True), JetLong(window=48, offset=True) + Fade()])
def test_jet_long_leaves_rows_alone_up_to_the_trained_length(method: Method) -> None:
    model = tiny_llama()
    plain = logits(model, IDS[:, :TRAINED])
    patch_model(model, method, factor=8)
    # float32; two bands in place of one softmax
    torch.testing.assert_close(logits(model, IDS[:, :TRAINED]), plain, atol=1e-5, rtol=0)
