"""Each protocol and its control, against a forward per token, the published script, or what is known of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from hf_posext.errors import InvalidParameterError, NonFiniteError
from hf_posext.evaluation.protocols import DECODER_PROTOCOLS, PROTOCOLS, protocol_for
from hf_posext.evaluation.rows import Conditions, document_record, make_rows
from hf_posext.evaluation.scorer import Memory, TokenScorer
from hf_posext.evaluation.tokens import TokenizedDocuments
from hf_posext.evaluation.windows import (
    LegacyLongLoRA,
    LegacyYaRN,
    Measurement,
    Prefix,
    Rolling,
    Sliding,
    Tail,
    control_stride,
    is_legacy,
)
from hf_posext.patching.detect import model_kind

from .helpers import BOS, naive_contexts, naive_nll, naive_protocol_nll, naive_windowed_nll
from .protocol_helpers import LENGTHS, TOTAL, TRAINED, assert_equal, measured, named, rows

ALL = [Prefix(), Tail(7), Sliding(3), Sliding(7), Rolling(), LegacyYaRN(3), LegacyLongLoRA(5)]


def controlled(protocol: Any, model: nn.Module, documents: TokenizedDocuments) -> dict[tuple[int, int], Measurement]:
    scorer, arranged = protocol.scorer(model, None, Memory()), protocol.arrange(documents)
    return {
        (measurement.length, index): measurement
        for index in range(len(arranged.ids))
        for measurement in protocol.measure(scorer, arranged, index, LENGTHS, TRAINED)
    }


def expected_control(protocol: Any, model: nn.Module, row: torch.Tensor, length: int, bos: bool) -> np.ndarray:
    """NLL of what fits the trained length as the protocol reads it; of the rest through windows of that length."""
    far = naive_windowed_nll(model, row, TRAINED, control_stride(TRAINED), bos)
    nll = []
    for token, context in naive_contexts(protocol, row, length, bos):
        fits = len(context) + (protocol.name != "rolling") <= TRAINED  # lm-eval does not read the token that it scores
        nll.append(naive_nll(model, torch.tensor([*context, row[token]]))[-1] if fits else far[token - 1])
    return np.array(nll)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("protocol", ALL, ids=named)
def test_every_protocol_equals_a_forward_per_token(llama: LlamaForCausalLM, protocol: Any, bos: bool) -> None:
    documents = rows(bos=bos)
    arranged = protocol.arrange(documents)
    measurements = measured(protocol, llama, documents)
    assert set(measurements) == {(n, i) for n in LENGTHS for i in range(len(arranged.ids))}
    for (length, index), measurement in measurements.items():
        assert_equal(
            measurement.nll, naive_protocol_nll(protocol, llama, arranged.tokens[index], length, arranged.bos)
        )


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("protocol", ALL, ids=named)
def test_every_control_equals_a_forward_per_token(llama: LlamaForCausalLM, protocol: Any, bos: bool) -> None:
    documents = rows(bos=bos)
    arranged = protocol.arrange(documents)
    normal = measured(protocol, llama, documents)
    for (length, index), measurement in controlled(protocol, llama, documents).items():
        row, uncut = arranged.tokens[index], normal[length, index]
        expected = expected_control(protocol, llama, row, length, arranged.bos)
        assert_equal(measurement.nll, expected)
        assert measurement._replace(nll=uncut.nll) == uncut._replace(nll=uncut.nll), (
            "the same tokens in the same groups"
        )
        if length <= TRAINED:
            assert measurement.nll == pytest.approx(uncut.nll, abs=1e-5), "inside the trained length nothing is cut"
        else:
            assert abs(measurement.nll - uncut.nll).max() > 1e-3


def rows_of(protocol: Any, model: nn.Module, documents: TokenizedDocuments) -> list[dict[str, Any]]:
    arranged = protocol.arrange(documents)

    def records(measurements: dict[tuple[int, int], Measurement], label: str) -> list[dict[str, Any]]:
        return [
            document_record(measurement, arranged, index, label, 1.0, with_positions=length == LENGTHS[-1])
            for (length, index), measurement in measurements.items()
        ]

    unpatched = records(measured(protocol, model, documents), "none")
    control = records(controlled(protocol, model, documents), "truncated")
    return make_rows(unpatched, conditions=Conditions.of(protocol, documents, "float32"), control=control)


# The published averages, from the published loops


@torch.no_grad()
def yarn_script(model: Any, texts: list[torch.Tensor], bos: int | None, max_length: int, sliding_window: int) -> float:
    """`compute_perplexity` of YaRN's eval/perplexity.py."""
    max_tokenized_len = max_length - (bos is not None)
    nlls = []
    for text in texts:
        labels, prev_end_loc = text[None], 0
        for begin_loc in range(0, labels.shape[1], sliding_window):
            end_loc = min(begin_loc + max_tokenized_len, labels.shape[1])
            trg_len = end_loc - prev_end_loc
            input_ids = labels[:, begin_loc:end_loc]
            if bos is not None:
                input_ids = torch.cat([torch.tensor([[bos]]), input_ids], dim=1)
            target_ids = input_ids.clone()
            target_ids[:, :-trg_len] = -100
            nlls.append(model(input_ids, labels=target_ids).loss)
            prev_end_loc = end_loc
            if end_loc == labels.shape[1]:
                break
    return float(torch.exp(torch.stack(nlls).mean()))


@torch.no_grad()
def longlora_script(model: Any, data: torch.Tensor, seq_length: int, sliding_window: int) -> float:
    """`evaluate` of LongLoRA's eval.py."""
    all_ix = list(range(0, len(data) - seq_length, sliding_window))
    all_ix.pop()
    losses = []
    for start in range(0, len(all_ix), 32):
        x = torch.stack([data[i : i + seq_length] for i in all_ix[start : start + 32]])
        losses.append(model(input_ids=x, labels=x).loss.item())
    return float(2.71828 ** torch.as_tensor(losses).mean().item())


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("stride", [3, 7])
def test_legacy_yarn_is_what_the_script_prints(llama: LlamaForCausalLM, bos: bool, stride: int) -> None:
    documents = rows(count=3, bos=bos)
    texts = [row[int(bos) :] for row in documents.tokens]
    honest = rows_of(Sliding(stride), llama, documents)
    for row, by_token in zip(rows_of(LegacyYaRN(stride), llama, documents), honest, strict=True):
        script = yarn_script(llama, texts, BOS if bos else None, row["length"], stride)
        assert row["perplexity"] == row["perplexity_tail"] == pytest.approx(script, rel=1e-5)
        assert row["protocol"] == "legacy-yarn"
        assert (
            (row["nll_sum"], row["tokens"])
            == (by_token["nll_sum"], by_token["tokens"])
            == (row["nll_sum"], 3 * (TOTAL - 1))
        )
        if stride == 3 and row["length"] != LENGTHS[-1]:
            assert row["perplexity"] != pytest.approx(by_token["perplexity"], rel=1e-3), "the fault that it has"


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("stride", [1, 7])
def test_legacy_longlora_is_what_the_script_prints(llama: LlamaForCausalLM, bos: bool, stride: int) -> None:
    documents = rows(count=3, bos=bos)
    stream = documents.tokens[:, int(bos) :].flatten()
    for row in rows_of(LegacyLongLoRA(stride), llama, documents):
        script = longlora_script(llama, stream, row["length"], stride)
        assert row["perplexity"] == pytest.approx(script, rel=1e-5)  # whose e is 2.71828
        windows = len(range(0, len(stream) - row["length"], stride)) - 1
        assert row["tokens"] == windows * (row["length"] - 1) and row["documents"] == 3
        assert row["bos"].startswith("none") and row["ci95"] is None


def test_means_of_legacy_groups_weigh_the_same() -> None:
    nll = np.array([1.0, 1.0, 1.0, 4.0])
    documents = rows(count=1)
    record = document_record(
        Measurement(5, nll, first=None, groups=(3, 1)), documents, 0, "none", 1.0, with_positions=True
    )
    assert (record["nll_sum"], record["tokens"], record["groups"], record["group_mean_sum"]) == (7.0, 4, 2, 5.0)
    assert (record["tail_nll_sum"], record["tail_tokens"]) == (7.0, 4), "a mean of means has no second half"
    (row,) = make_rows([record], conditions=Conditions("legacy-yarn", "none", "float32"))
    assert row["perplexity"] == pytest.approx(math.exp(2.5)) and row["nll_sum"] == 7.0


def test_the_tail_of_a_tail_is_in_the_second_half_of_the_text(llama: LlamaForCausalLM) -> None:
    measurements = measured(Tail(7), llama, rows())
    by_token = {n: naive_nll(llama, rows().tokens[0, :n]) for n in LENGTHS}
    for length, half in ((8, 4), (14, 7), (24, 7)):
        record = document_record(measurements[length, 0], rows(), 0, "none", 1.0, with_positions=False)
        assert (record["first"], record["tokens"], record["tail_tokens"]) == (length - 7, 7, half)
        assert record["tail_nll_sum"] == pytest.approx(by_token[length][-half:].sum(), rel=1e-6)


def test_a_stream_without_a_window_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match="a stream of 49 tokens.*drops the last window of 24, got 48"):
        LegacyLongLoRA(24).arrange(rows())
    assert len(LegacyLongLoRA(23).windows(48, 24, False)) == 1


# What cannot be


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("prefix", {"stride": 5}, "stride to be left out for protocol 'prefix', got 5. Drop it, or choose sliding or"),
        ("rolling", {"stride": 5}, "left out for protocol 'rolling', got 5"),
        ("sliding", {}, "Expected stride for protocol 'sliding', got none. Pass stride=128, in tokens"),
        ("legacy-yarn", {}, "Expected stride for protocol 'legacy-yarn', got none"),
        ("legacy-longlora", {"stride": 8}, "Expected stride to be 1 to 7 for windows of 8 tokens .*, got 8"),
        (
            "sliding",
            {"stride": 0},
            r"to be 1 to 7 for windows of 8 tokens \(a longer one skips tokens\), got 0",
        ),
        ("tail", {}, "Expected tail for protocol 'tail', got none. Pass tail=128, in tokens"),
        ("tail", {"tail": 8}, "tail to be 1 to 7 for texts of 8 tokens, the first .*, got 8. Pass tail=7"),
        ("tail", {"tail": 0}, "tail to be 1 to 7 .*, got 0"),
        ("prefix", {"tail": 4}, "tail to be left out for protocol 'prefix', got 4. Drop it, or choose tail"),
        ("suffix", {}, "protocol to be one of prefix, sliding, rolling, tail, legacy-yarn, legacy-lo"),
    ],
)
def test_what_cannot_be_is_said(llama: LlamaForCausalLM, name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        protocol_for(name, *model_kind(llama), LENGTHS, **options)


def test_every_protocol_is_found_by_its_name(llama: LlamaForCausalLM) -> None:
    options = {"tail": {"tail": 7}, **{name: {"stride": 3} for name in ("sliding", "legacy-yarn", "legacy-longlora")}}
    protocols = [
        protocol_for(name, *model_kind(llama), LENGTHS, **options.get(name, {})) for name in DECODER_PROTOCOLS
    ]
    assert [protocol.name for protocol in protocols] == list(DECODER_PROTOCOLS)
    assert protocols[3] == Tail(7) and protocols[1] == Sliding(3)
    assert [name for name in PROTOCOLS if is_legacy(name)] == ["legacy-yarn", "legacy-longlora"]


class LosesOne(TokenScorer):
    """Finds nothing finite for one token, wherever it is scored."""

    lost = 0

    def token_nll(self, input_ids: torch.Tensor, first: int = 1, last_read: bool = True) -> torch.Tensor:
        nll = super().token_nll(input_ids, first, last_read)
        return nll.masked_fill(input_ids[:, first:] == self.lost, torch.nan)


@pytest.mark.parametrize("protocol", ALL, ids=named)
def test_what_is_not_finite_names_document_and_token(llama: LlamaForCausalLM, protocol: Any) -> None:
    documents = rows()
    documents.tokens[0, 20] = 0  # no other token is the pad token
    arranged, scorer = protocol.arrange(documents), LosesOne(llama)
    for measure in (protocol.measure, lambda *args: protocol.measure(*args, TRAINED)):
        with pytest.raises(NonFiniteError, match=f"in document '{arranged.ids[0]}', got others, first at token 20"):
            measure(scorer, arranged, 0, [24])
