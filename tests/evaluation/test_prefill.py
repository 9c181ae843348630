"""Texts read in chunks with a cache: the NLL of one forward, with the activations of a chunk."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from hf_posext import compare, evaluate_perplexity, patch_model
from hf_posext.errors import InvalidParameterError, UnsupportedModelError
from hf_posext.evaluation import EvaluationConfig
from hf_posext.evaluation.forwards import Boundaries, chunk_bounds
from hf_posext.evaluation.protocols import Pseudo, Seq2Seq
from hf_posext.evaluation.scorer import Memory, TokenScorer
from hf_posext.evaluation.setup import check_reads, check_request
from hf_posext.methods import (
    DualChunk,
    DynamicNTK,
    DynamicYaRN,
    LogN,
    LongRoPE,
    Method,
    NoExtension,
    ReRoPE,
    SelfExtend,
    YaRN,
)
from hf_posext.patching import detect_scheme

from ..conftest import TRAINED, tiny_bloom, tiny_gpt2, tiny_llama, tiny_t5, tiny_xglm, tokens
from ..zoo import build
from .helpers import character_tokenizer, naive_nll, random_texts

LENGTH = 150
CHUNK = 13
"""Twelve chunks, the last one of seven tokens; longer ones than the windows of 16 see two of the one before."""

SHORT, LONG = [1.0] * 8, [1.0 + pair for pair in range(8)]
TWO_LISTS = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": SHORT, "long_factor": LONG, "factor": 4.0}
TWO_LISTS["original_max_position_embeddings"] = TRAINED

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_llama,
    "llama, eager": functools.partial(tiny_llama, attn_implementation="eager"),
    "llama, two LongRoPE lists": functools.partial(tiny_llama, rope_parameters=TWO_LISTS),
    "gemma2": functools.partial(build, "gemma2"),  # softcaps; a window of 16 in every other layer
    "gemma3": functools.partial(build, "gemma3_text"),  # a window of 16 in five layers of six
    "gpt_oss": functools.partial(build, "gpt_oss"),  # a learned sink in each head
    "qwen2": functools.partial(build, "qwen2"),
    "deepseek": functools.partial(build, "deepseek_v3"),  # latent keys and values
    "gpt2": functools.partial(tiny_gpt2, n_positions=LENGTH),  # a table
    "opt": functools.partial(build, "opt", max_position_embeddings=LENGTH),  # a table from row 2 on
    "xglm": tiny_xglm,  # sines
    "bloom": tiny_bloom,  # ALiBi, from the mask
    "mpt": functools.partial(build, "mpt", max_seq_len=LENGTH),  # ALiBi, from the number of keys
    "granite hybrid": functools.partial(build, "granitemoehybrid"),  # Mamba2 and attention by turns
    "zamba2": functools.partial(build, "zamba2"),  # the same, and both in one layer
    "lfm2": functools.partial(build, "lfm2"),  # convolutions and attention
}

METHODS: dict[str, Method] = {
    "yarn": YaRN(factor=4),
    "longrope, two lists": LongRoPE(factor=4, long_factor=LONG, short_factor=SHORT),
    "self-extend": SelfExtend(factor=4),
    "rerope": ReRoPE(factor=4, window=24),
    "dual-chunk": DualChunk(factor=4, chunk=48, local=16),
    "log-n": LogN(factor=4),
}

SHARED, IDS = tiny_llama(num_hidden_layers=1), tokens(60)
EXPECTED = naive_nll(SHARED, IDS[0])

# Logits come from the products of other shapes: 3e-6 of NLL near 5 at most here, and 3e-8 of a sum, since the errors
# of tokens have either sign. Keys that are forgotten, or at other positions, move NLL by 1e-2 and more.
ROUNDING = {"rel": 2e-6, "abs": 2e-6}


def chunked(model: nn.Module, ids: torch.Tensor, chunk: int = CHUNK, first: int = 1) -> torch.Tensor:
    return TokenScorer(model, Memory(prefill_chunk=chunk)).token_nll(ids, first=first)


@pytest.mark.parametrize("name", MODELS)
def test_equals_one_forward(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = MODELS[name]()
    ids = tokens(LENGTH)
    nll, expected = chunked(model, ids)[0].double().numpy(), naive_nll(model, ids[0])
    assert nll == pytest.approx(expected, **ROUNDING)
    assert nll.sum() == pytest.approx(expected.sum(), rel=1e-7)
    assert not [record for record in caplog.records if record.name.startswith("hf_posext")]


@pytest.mark.parametrize("name", METHODS)
def test_equals_one_forward_under_a_patch(name: str) -> None:
    model, ids = tiny_llama(), tokens(LENGTH)
    with patch_model(model, METHODS[name]):
        expected = naive_nll(model, ids[0])
        for chunk in (CHUNK, TRAINED, LENGTH - 1):
            assert chunked(model, ids, chunk)[0].double().numpy() == pytest.approx(expected, **ROUNDING)
    assert abs(expected - naive_nll(model, ids[0])).mean() > 1e-3, "the patch counts"


@pytest.mark.parametrize("length", [TRAINED, TRAINED + 1, LENGTH])
def test_two_longrope_lists_are_not_mixed_in_a_text(length: int) -> None:
    """The list is chosen by the last position of a forward: of the first chunk alone it would be the short one."""
    model, ids = MODELS["llama, two LongRoPE lists"](), tokens(length)
    assert chunked(model, ids)[0].double().numpy() == pytest.approx(naive_nll(model, ids[0]), **ROUNDING)


def test_batches_and_later_first_tokens() -> None:
    model, ids = tiny_llama(), tokens(LENGTH, rows=3)
    shapes: list[tuple[int, ...]] = []
    scorer = TokenScorer(model, Memory(prefill_chunk=CHUNK))
    scorer.token_nll(ids)
    model.lm_head.register_forward_hook(lambda *args: shapes.append(tuple(args[2].shape[:2])))
    nll = scorer.token_nll(ids, first=100)
    # Beside the one row with which each chunk goes through the model, the head runs for what is scored.
    assert sum(count for _, count in shapes) == 12 + 50
    assert nll.shape == (3, 50) and nll.dtype == torch.float32
    for row in range(3):
        assert nll[row].double().numpy() == pytest.approx(naive_nll(model, ids[row])[99:], **ROUNDING)


def test_peft_model() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    ids = tokens(LENGTH)
    assert chunked(model, ids)[0].double().numpy() == pytest.approx(naive_nll(model, ids[0]), **ROUNDING)


def test_bfloat16() -> None:
    """Rounded differently, each logit by some 2 ** -9 of its size; on average far less."""
    model, ids = tiny_llama().to(torch.bfloat16), tokens(LENGTH)
    nll, expected = chunked(model, ids)[0].double().numpy(), naive_nll(model, ids[0])
    assert abs(nll - expected).max() < 0.05
    assert nll.mean() == pytest.approx(expected.mean(), abs=2e-3)


def test_the_last_token_need_not_be_read() -> None:
    model, ids = tiny_gpt2(n_positions=LENGTH), tokens(LENGTH + 1)
    nll = TokenScorer(model, Memory(prefill_chunk=CHUNK)).token_nll(ids, last_read=False)[0].double().numpy()
    assert nll[:-1] == pytest.approx(naive_nll(model, ids[0, :-1]), **ROUNDING)
    assert len(nll) == LENGTH


def test_only_a_chunk_of_activations_exists_at_a_time() -> None:
    model = tiny_llama()
    sizes: list[int] = []
    alive: list[int] = []
    hidden: list[weakref.ref[Any]] = []

    def watch(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        sizes.append(output.shape[1])
        hidden.append(weakref.ref(output))
        alive.append(sum(reference() is not None for reference in hidden))

    model.model.norm.register_forward_hook(watch)
    chunked(model, tokens(LENGTH))
    in_full = [size for size in sizes if size > CHUNK]
    assert in_full == [16] * 4, "only the checks of the first 16 tokens: causal (2), head in slices, chunks"
    assert sizes[-12:] == [CHUNK] * 11 + [7]
    assert max(alive) == 2, "the one before goes when the next one is there"


@pytest.mark.parametrize(
    ("length", "chunk", "switches", "expected"),
    [
        (10, 4, (), [(0, 4), (4, 8), (8, 10)]),
        (8, 4, (), [(0, 4), (4, 8)]),
        (3, 4, (), [(0, 3)]),
        (20, 4, (10,), [(0, 11), (11, 15), (15, 19), (19, 20)]),
        (10, 4, (10,), [(0, 4), (4, 8), (8, 10)]),
        (11, 4, (10,), [(0, 11)]),
        (20, 4, (6, 10, 30), [(0, 11), (11, 15), (15, 19), (19, 20)]),
    ],
)
def test_bounds(length: int, chunk: int, switches: tuple[int, ...], expected: list[tuple[int, int]]) -> None:
    assert chunk_bounds(length, chunk, Boundaries(switches)) == expected


@given(st.integers(1, 500), st.integers(1, 600), st.lists(st.integers(1, 600), max_size=3))
def test_every_token_is_in_exactly_one_chunk(length: int, chunk: int, switches: list[int]) -> None:
    bounds = chunk_bounds(length, chunk, Boundaries(tuple(sorted(switches))))
    assert [token for begin, end in bounds for token in range(begin, end)] == list(range(length))
    assert all(0 < end - begin <= chunk for begin, end in bounds[1:])
    for switch in switches:
        assert len({end > switch for _, end in bounds}) == 1, "all chunks on one side"


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 60), st.integers(1, 61), st.data())
def test_every_token_is_scored_once_whatever_the_chunk(length: int, chunk: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(1, length - 1))
    nll = chunked(SHARED, IDS[:, :length], chunk, first)[0].double().numpy()
    assert nll == pytest.approx(EXPECTED[first - 1 : length - 1], **ROUNDING)


FOLLOWING = {
    "native dynamic NTK": (
        functools.partial(tiny_llama, rope_parameters={"rope_type": "dynamic", "factor": 4.0}),
        None,
    ),
    "dynamic-ntk": (tiny_llama, DynamicNTK(factor=4)),
    "dynamic-yarn": (tiny_llama, DynamicYaRN(factor=4)),
}


@pytest.mark.parametrize("name", FOLLOWING)
def test_positions_that_follow_the_length_are_refused_by_name(name: str) -> None:
    make, method = FOLLOWING[name]
    model = make()
    label = "llama" if method is None else name
    with patch_model(model, method or NoExtension()) as patch:
        with pytest.raises(UnsupportedModelError, match=f"positions of {label} follow .*. Leave prefill_chunk out"):
            chunked(model, tokens(LENGTH))
        nll = chunked(model, tokens(LENGTH), chunk=LENGTH)[0]
        assert nll.double().numpy() == pytest.approx(naive_nll(model, tokens(LENGTH)[0]), **ROUNDING), "one chunk"
    scheme = detect_scheme(model)
    requests = {
        chunk: check_request(EvaluationConfig(lengths=[LENGTH], prefill_chunk=chunk), scheme, model)
        for chunk in (CHUNK, LENGTH, None)
    }
    with pytest.raises(
        InvalidParameterError, match=f"to be left out, since .* of {label} .*, got 13 for texts of 150"
    ):
        check_reads(requests[CHUNK], patch.plan)
    check_reads(requests[LENGTH], patch.plan)
    check_reads(requests[None], patch.plan)


def test_chunks_are_checked_for_each_patch() -> None:
    model, ids = tiny_llama(), tokens(LENGTH)
    scorer = TokenScorer(model, Memory(prefill_chunk=CHUNK))
    before = scorer.token_nll(ids)
    with patch_model(model, DynamicYaRN(factor=4)), pytest.raises(UnsupportedModelError, match="dynamic-yarn"):
        scorer.token_nll(ids)
    with patch_model(model, METHODS["longrope, two lists"]):
        nll = scorer.token_nll(ids)[0].double().numpy()
        assert nll == pytest.approx(naive_nll(model, ids[0]), **ROUNDING)
    assert torch.equal(scorer.token_nll(ids), before)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mamba", "its logits differ by"),  # its convolution begins anew with several tokens
        ("jamba", "its logits differ by"),
        ("recurrent_gemma", "its logits differ by"),  # keeps its state inside the model
    ],
)
def test_models_that_lose_their_state_are_refused(model_type: str, reason: str) -> None:
    scorer = TokenScorer(build(model_type), Memory(prefill_chunk=CHUNK))
    with pytest.raises(UnsupportedModelError, match=f"can read in chunks, got .*: {reason}.*Leave prefill_chunk out"):
        scorer.token_nll(tokens(LENGTH))


def test_a_model_without_a_cache_is_refused_before_anything_is_read() -> None:
    with pytest.raises(UnsupportedModelError, match="can read in chunks, got OpenAIGPTLMHeadModel: it has no cache"):
        TokenScorer(build("openai-gpt"), Memory(prefill_chunk=CHUNK))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefill_chunk": 0}, "Expected prefill_chunk to be a whole number of 1 or more, got 0"),
        ({"offload_cache": True}, "Expected prefill_chunk with offload_cache, .* Pass prefill_chunk=2048, too"),
    ],
)
def test_impossible_memory_is_refused(arguments: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    with pytest.raises(InvalidParameterError, match=message):
        check_request(EvaluationConfig(lengths=[LENGTH], **arguments), detect_scheme(model), model)


def test_from_the_front_door() -> None:
    """The perplexity of chunks is that of whole texts; what cannot be is refused before anything is measured."""
    model, texts = tiny_llama(), random_texts(2, 200)
    settings = {"lengths": [40, LENGTH]}
    unchunked = evaluate_perplexity(model, character_tokenizer(), texts, **settings)
    nll = evaluate_perplexity(model, character_tokenizer(), texts, **settings, prefill_chunk=CHUNK)
    assert nll.provenance["prefill_chunk"] == CHUNK
    for row, expected in zip(nll.rows, unchunked.rows, strict=True):
        assert row["nll_sum"] == pytest.approx(expected["nll_sum"], rel=1e-7)
    with pytest.raises(InvalidParameterError, match="the positions of dynamic-yarn follow"):
        methods = ["none", "dynamic-yarn"]
        compare(model, character_tokenizer(), texts, methods, **settings, factor=4, prefill_chunk=CHUNK)


def test_models_that_read_both_ways_are_refused_chunks() -> None:
    memory, tokenizer = Memory(prefill_chunk=CHUNK), character_tokenizer()
    for protocol, model in ((Seq2Seq(), tiny_t5()), (Pseudo(), build("bert", task="masked-lm"))):
        with pytest.raises(InvalidParameterError, match=f"{type(model).__name__} reads a text as a whole, got 13"):
            protocol.scorer(model, tokenizer, memory)


def test_offloading_needs_a_cuda_device() -> None:
    """transformers' own offloading waits for CUDA streams, whatever the device; in main memory the cache is anyway."""
    with pytest.raises(InvalidParameterError, match="got LlamaForCausalLM on 'cpu'. Leave offload_cache out"):
        TokenScorer(tiny_llama(), Memory(prefill_chunk=CHUNK, offload_cache=True))
