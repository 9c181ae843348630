"""Number of forwards, what each of them sees, and that nothing of an earlier one is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from hf_posext import LongRoPE, detect_scheme, patch_model
from hf_posext.errors import EvaluationError
from hf_posext.evaluation.forwards import Boundaries, boundaries_of
from hf_posext.evaluation.protocols import Pseudo, Seq2Seq
from hf_posext.evaluation.scorer import Memory
from hf_posext.evaluation.tasks import cost_of
from hf_posext.evaluation.tokens import TokenizedDocuments
from hf_posext.evaluation.windows import LegacyLongLoRA, LegacyYaRN, Prefix, Rolling, Sliding, Tail
from hf_posext.patching import find_patch

from ..conftest import tiny_gpt2, tiny_llama, tokens
from .helpers import naive_nll
from .protocol_helpers import LENGTHS, TOTAL, TRAINED, assert_equal, named, rows

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 32.0}
PAIRS = 8
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "short_factor": [1.0] * PAIRS,
    "long_factor": [1.0 + i for i in range(PAIRS)],
    "original_max_position_embeddings": TRAINED,
}


def tiny_longrope() -> LlamaForCausalLM:
    return tiny_llama(max_position_embeddings=64, original_max_position_embeddings=TRAINED, rope_parameters=LONGROPE)


def tiny_dynamic() -> LlamaForCausalLM:
    return tiny_llama(max_position_embeddings=TRAINED, rope_parameters=DYNAMIC)


def patched(method: Any) -> Callable[[], LlamaForCausalLM]:
    def made() -> LlamaForCausalLM:
        model = tiny_llama(max_position_embeddings=TRAINED)
        patch_model(model, method)
        return model

    return made


LONG_AND_SHORT = LongRoPE(factor=4, short_factor=LONGROPE["short_factor"], long_factor=LONGROPE["long_factor"])
MODELS: dict[str, tuple[Callable[[], LlamaForCausalLM], list[list[int]]]] = {
    "static": (tiny_llama, [[8, 14, 24]]),
    "longrope": (tiny_longrope, [[8], [14, 24]]),
    "dynamic": (tiny_dynamic, [[8], [14], [24]]),
    "longrope-by-patch": (patched(LONG_AND_SHORT), [[8], [14, 24]]),
    "dynamic-by-patch": (patched("dynamic-ntk(factor=4)"), [[8], [14], [24]]),
}


@pytest.mark.parametrize("protocol", [Prefix(), Tail(7)], ids=named)
@pytest.mark.parametrize("name", MODELS)
def test_as_many_passes_as_the_positions_need(protocol: Any, name: str) -> None:
    """Forwards are counted, and what they give is what a fresh model gives for each length."""
    make, passes = MODELS[name]
    model, documents = make(), rows()
    scorer = protocol.scorer(model, None, Memory())
    scorer.token_nll(tokens(8))  # the first has the checks of the scorer with it
    calls: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda *args: calls.append(args[1][0].shape[1]))
    for index in (0, 1):
        calls.clear()
        for lengths in passes:
            for measurement in protocol.measure(scorer, documents, index, lengths):
                fresh = naive_nll(make(), documents.tokens[index, : measurement.length])
                assert_equal(measurement.nll, fresh[-len(measurement.nll) :])
        guards = [[lengths[0]] if len(lengths) > 1 and index == 0 else [] for lengths in passes]
        assert calls == [read for lengths, guard in zip(passes, guards, strict=True) for read in (lengths[-1], *guard)]


@pytest.mark.parametrize("name", MODELS)
def test_the_passes_follow_from_the_model(name: str) -> None:
    make, passes = MODELS[name]
    model = make()
    patch = find_patch(model)
    boundaries = boundaries_of(detect_scheme(model), patch and patch.plan)
    assert Prefix().passes(LENGTHS, boundaries) == Tail(7).passes(LENGTHS, boundaries) == passes
    for protocol in (Sliding(3), Rolling(), LegacyYaRN(3), LegacyLongLoRA(3), Pseudo(), Seq2Seq()):
        assert protocol.passes(LENGTHS, boundaries) == [[8], [14], [24]]


def test_a_switch_belongs_to_the_shorter_lengths() -> None:
    assert Boundaries((10,)).groups([9, 10, 11, 12]) == [[9, 10], [11, 12]]
    assert Boundaries((10, 20)).groups([9, 30]) == [[9], [30]]


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
@pytest.mark.parametrize("protocol", [Sliding(5), Rolling()], ids=named)
def test_windows_are_read_as_a_fresh_model_reads_them(name: str, protocol: Any) -> None:
    """Longest length first, and a last window that is shorter: nothing of an earlier input is left."""
    make, _ = MODELS[name]
    model, documents = make(), rows(count=1)
    scorer = protocol.scorer(model, None, Memory())
    for length in (24, 14, 8):
        fresh = []
        for w in protocol.windows(TOTAL, length, False):
            ids, targets = (
                documents.tokens[:1, w.begin : w.end - (not w.last_read)],
                documents.tokens[0, w.first : w.end],
            )
            with torch.no_grad():
                log_probabilities = make()(ids).logits[0, w.first - 1 - w.begin :].double().log_softmax(-1)
            fresh += [-float(log_probabilities[i, target]) for i, target in enumerate(targets)]
        (measurement,) = protocol.measure(scorer, documents, 0, [length])
        assert_equal(measurement.nll, np.array(fresh))


def test_guard_refuses_a_model_whose_positions_depend_on_the_length() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, documents = tiny_dynamic().to(dtype), rows(length=100)
        scorer = Prefix().scorer(model, None, Memory())
        with pytest.raises(EvaluationError, match="100 tokens to agree with a fresh one over 14"):
            Prefix().measure(scorer, documents, 0, [14, 100])
        static = tiny_llama().to(dtype)
        assert len(Prefix().measure(Prefix().scorer(static, None, Memory()), documents, 0, [14, 100])) == 2


def test_rolling_reads_no_more_than_its_length() -> None:
    """Of a learned table of 64 positions, lm-eval's windows of 64 tokens need all, and no more."""
    documents = TokenizedDocuments(["a"], tokens(100), False)
    (measurement,) = Rolling().measure(Rolling().scorer(tiny_gpt2(), None, Memory()), documents, 0, [64])
    assert len(measurement.nll) == 99


def test_the_control_of_a_tail_reads_no_more_than_it_needs(llama: LlamaForCausalLM) -> None:
    scorer, documents = Tail(7).scorer(llama, None, Memory()), rows()
    scorer.token_nll(tokens(8))
    read: list[tuple[int, ...]] = []
    llama.model.layers[0].register_forward_pre_hook(lambda *args: read.append(tuple(args[1][0].shape[:2])))
    Tail(7).measure(scorer, documents, 0, [24], TRAINED)
    assert read == [(7, TRAINED)], "each of the seven tokens ends a window"


def test_costs_grow_with_what_is_read() -> None:
    def cost(protocol: Any, lengths: list[int]) -> float:
        return cost_of(protocol.reads(lengths, 24))

    assert cost(Prefix(), [8, 24]) == cost(Prefix(), [24]) < cost(Sliding(3), [14])
    assert cost(Rolling(), [8]) < cost(Sliding(3), [8]) < cost(Sliding(1), [8])
    assert cost(Pseudo(), [24]) > cost(Seq2Seq(), [24]) == cost(Prefix(), [24])
    assert cost(Tail(3), [24]) == cost(Prefix(), [24])
