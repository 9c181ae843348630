"""Whatever the documents, lengths, strides and chunks: every token counts once, and sums are those of a naive loop."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from hf_posext.evaluation.scorer import Memory
from hf_posext.evaluation.tokens import TokenizedDocuments
from hf_posext.evaluation.windows import Prefix, Rolling, Sliding, Tail, Window, rolling_windows, sliding_windows

from ..conftest import tiny_llama
from .helpers import BOS, naive_protocol_nll

MANY = settings(max_examples=100, deadline=None, derandomize=True)
FEW = settings(max_examples=20, deadline=None, derandomize=True)
MOST = 24


@functools.cache
def model() -> LlamaForCausalLM:
    """One layer of float64: what is left is the rounding of the logits to float32, 1e-7 of each."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return tiny_llama(**sizes, num_key_value_heads=1, vocab_size=32).double()


@st.composite
def documents(draw: st.DrawFn) -> TokenizedDocuments:
    total, bos = draw(st.integers(6, MOST)), draw(st.integers(0, 3))
    row = st.lists(st.integers(2, 31), min_size=total, max_size=total)
    rows = torch.tensor(draw(st.lists(row, min_size=1, max_size=2)))
    rows[:, :bos] = BOS
    return TokenizedDocuments([str(index) for index in range(len(rows))], rows, bos)


@st.composite
def lengths_of(draw: st.DrawFn, longest: int, least: int = 2) -> list[int]:
    """Ascending, the last one that of the documents."""
    shorter = st.lists(st.integers(least, longest), max_size=2, unique=True)
    return sorted({*draw(shorter), longest})


@MANY
@given(total=st.integers(5, 300), window=st.integers(5, 80), data=st.data(), bos=st.integers(0, 3))
def test_sliding_windows_score_every_token_once(total: int, window: int, data: st.DataObject, bos: int) -> None:
    stride = data.draw(st.integers(1, window - max(1, bos)))
    windows = sliding_windows(total, window, stride, bos)
    assert [token for w in windows for token in range(w.first, w.end)] == list(range(max(1, bos), total))
    for w in windows:
        assert 2 <= w.size <= window and w.end > w.first
        assert w.first - w.begin + bos >= (max(1, bos) if w is windows[0] else window - stride), (
            "context of its first token"
        )


@MANY
@given(total=st.integers(2, 300), window=st.integers(1, 80))
def test_rolling_windows_score_every_token_once_and_are_full(total: int, window: int) -> None:
    windows = rolling_windows(total, window)
    assert [token for w in windows for token in range(w.first, w.end)] == list(range(1, total))
    assert {w.size for w in windows} == {min(window, total - 1)}
    assert all(w.first - w.begin >= 1 and not w.last_read for w in windows)
    assert all(w.first - w.begin == 1 for w in windows[:-1]), "disjoint, but for the last"


@pytest.mark.lm_eval
@MANY
@given(total=st.integers(2, 300), window=st.integers(1, 80))
def test_rolling_windows_are_those_of_lm_eval(total: int, window: int) -> None:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    row = list(range(total))
    pairs = get_rolling_token_windows(row[1:], prefix_token=row[0], max_seq_len=window, context_len=1)
    # As HFLM does: the window's context and what it predicts, of which the last token is not fed to the model.
    fed = [((context + targets)[:-1], targets) for context, targets in map(make_disjoint_window, pairs)]
    windows = [(row[w.begin : w.end - 1], row[w.first : w.end]) for w in rolling_windows(total, window)]
    assert windows == fed


@MANY
@given(begin=st.integers(0, 9), before=st.integers(0, 9), scored=st.integers(1, 9), size=st.integers(1, 30))
def test_a_window_that_is_cut_reads_no_more(begin: int, before: int, scored: int, size: int) -> None:
    for bos, last_read in ((False, True), (True, True), (False, False)):
        first = begin + before + 1
        window = Window(begin, first, first + scored, bos, last_read)
        cut = window.cut(size)
        assert cut._replace(end=window.end) == window and first <= cut.end <= window.end
        assert cut.end == first or cut.size <= size
        assert cut == window or cut.end == first or cut.size == size


@FEW
@given(rows=documents(), data=st.data(), chunk=st.none() | st.integers(1, MOST))
def test_sums_are_those_of_a_naive_loop(rows: TokenizedDocuments, data: st.DataObject, chunk: int | None) -> None:
    """Of every protocol whose tokens weigh the same, read as a whole or in chunks with a cache."""
    memory, longest = Memory(prefill_chunk=chunk), rows.length
    tail = data.draw(st.integers(1, longest - 1))
    free = max(1, rows.bos)  # tokens that are not scored
    stride = data.draw(st.integers(1, longest - free))
    cases: list[tuple[Any, int]] = [
        (Prefix(), free + 1),
        (Rolling(), free + 1),
        (Tail(tail), max(free, tail) + 1),
        (Sliding(stride), stride + free),
    ]
    for protocol, least in cases:
        lengths = data.draw(lengths_of(longest, least))
        scorer = protocol.scorer(model(), None, memory)
        together = isinstance(protocol, Prefix)
        for index, row in enumerate(rows.tokens):
            passes = [lengths] if together else [[length] for length in lengths]
            measurements = [
                measurement for lengths in passes for measurement in protocol.measure(scorer, rows, index, lengths)
            ]
            assert [measurement.length for measurement in measurements] == lengths
            for measurement in measurements:
                expected = naive_protocol_nll(protocol, model(), row, measurement.length, rows.bos)
                assert len(measurement.nll) == len(expected) and measurement.nll.dtype == np.float64
                assert measurement.first == max(free, measurement.length - tail if protocol.name == "tail" else 0)
                assert math.isclose(math.fsum(measurement.nll), math.fsum(expected), rel_tol=1e-6)


@FEW
@given(rows=documents(), data=st.data(), trained=st.integers(4, MOST))
def test_a_control_scores_the_same_tokens_with_no_more_context(
    rows: TokenizedDocuments, data: st.DataObject, trained: int
) -> None:
    free = max(1, rows.bos)
    stride = data.draw(st.integers(1, rows.length - free))
    for protocol, least in ((Prefix(), free + 1), (Rolling(), free + 1), (Sliding(stride), stride + free)):
        lengths = data.draw(lengths_of(rows.length, least))
        scorer = protocol.scorer(model(), None, Memory())
        read: list[int] = []
        handle = model().model.register_forward_pre_hook(
            lambda module, args, kwargs, read=read: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        try:
            scorer.token_nll(rows.tokens[:, :2])
            read.clear()
            control = protocol.measure(scorer, rows, 0, lengths, trained)
        finally:
            handle.remove()
        assert max(read) <= trained
        for measurement in control:
            (normal,) = protocol.measure(scorer, rows, 0, [measurement.length])
            assert (measurement.length, measurement.first, measurement.tail, len(measurement.nll)) == (
                normal.length,
                normal.first,
                normal.tail,
                len(normal.nll),
            )
            if measurement.length <= trained:
                assert math.isclose(math.fsum(measurement.nll), math.fsum(normal.nll), rel_tol=1e-6)
