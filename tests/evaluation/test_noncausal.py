"""Pseudo-perplexity of encoders and teacher-forced perplexity of encoder-decoders, against loops."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import BertForMaskedLM, PreTrainedModel, PreTrainedTokenizerFast, XLMConfig, XLMWithLMHeadModel

from hf_posext import patch_model
from hf_posext.cli.loading import load_model
from hf_posext.errors import InvalidParameterError, UnsupportedModelError
from hf_posext.evaluation import Results, compare, evaluate_perplexity
from hf_posext.evaluation.protocols import MaskedScorer, Pseudo
from hf_posext.evaluation.rows import document_record, gain_by_position
from hf_posext.evaluation.scorer import Memory
from hf_posext.evaluation.tokens import TokenizedDocuments, special_tokens
from hf_posext.evaluation.windows import Measurement
from hf_posext.patching.detect import model_kind
from hf_posext.reporting import write_report

from ..conftest import TRAINED, tiny_llama, tiny_t5
from ..zoo import ENCODERS, build
from .helpers import character_tokenizer, random_texts

TEXTS = random_texts(2, 140)
LENGTHS = [40, 120]
CLS, SEP, MASK = 101, 102, 69  # the first that the character tokenizer leaves free is the mask


def tokenizer(before: bool = True) -> PreTrainedTokenizerFast:
    """A token per character, `[SEP]` after a text, and `[CLS]` before it or not."""
    characters = character_tokenizer()
    characters.add_special_tokens({"mask_token": "[MASK]"})
    characters._tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]" if before else "$A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    assert characters.mask_token_id == MASK
    return characters


def texts() -> list[list[int]]:
    return [character_tokenizer()(text)["input_ids"] for text in TEXTS]


@torch.no_grad()
def pseudo_nll(model: nn.Module, ids: list[int], length: int, window: int, samples: int = 64) -> list[float]:
    """The definition, a token at a time: `window` is the trained length, or the length itself."""
    n, size, nll = length - 2, min(length, window) - 2, []
    for j in range(min(samples, n)):
        place = (2 * j + 1) * n // (2 * min(samples, n))
        begin = min(max(place - size // 2, 0), n - size)
        masked = ids[begin:place] + [MASK] + ids[place + 1 : begin + size]
        logits = model(input_ids=torch.tensor([[CLS, *masked, SEP]])).logits[0, 1 + place - begin]
        nll.append(-logits.double().log_softmax(-1)[ids[place]].item())
    return nll


@torch.no_grad()
def seq2seq_nll(model: nn.Module, ids: list[int], length: int, window: int) -> list[float]:
    """The definition, a target at a time, for a tokenizer that puts `[SEP]` after a text."""
    k = min(128, length // 4)
    end = length - k - 1
    read = torch.tensor([[*ids[max(0, end - (window - 1)) : end], SEP]])
    start, nll = model.config.decoder_start_token_id, []
    for i in range(k):
        decoder_ids = torch.tensor([[start, *ids[end : end + i]]])
        logits = model(input_ids=read, decoder_input_ids=decoder_ids).logits[0, -1]
        nll.append(-logits.double().log_softmax(-1)[ids[end + i]].item())
    return nll


def tiny_pegasus() -> PreTrainedModel:
    """The zoo scales all matrices by 4, the sines among them, which no longer are what the method moves then."""
    model = build("pegasus", task="seq2seq-lm")
    for stack in (model.model.encoder, model.model.decoder):
        stack.embed_positions.weight.data /= 4
    return model


def perplexity(pieces: list[list[float]]) -> float:
    return math.exp(np.concatenate(pieces).mean())


@pytest.mark.parametrize("model_type", sorted(set(ENCODERS) - {"longformer"}))
def test_every_encoder_of_the_zoo_equals_the_loop(model_type: str) -> None:
    """Its head is given one token only, so this is about each head."""
    model = build(model_type, task="masked-lm")
    row = evaluate_perplexity(model, tokenizer(), TEXTS, [40]).row("none", 40)
    assert row["protocol"] == "pseudo" and row["tokens"] == 2 * 38
    expected = perplexity([pseudo_nll(model, ids, 40, 40) for ids in texts()])
    assert row["perplexity"] == pytest.approx(expected, rel=1e-5)  # float32 products of other shapes


@pytest.mark.parametrize("samples", [1, 5, 64])
def test_pseudo_perplexity_and_its_control_equal_the_loop(samples: int) -> None:
    model = build("bert", task="masked-lm", max_position_embeddings=128)
    documents = [*map(torch.tensor, texts())]
    rows = TokenizedDocuments(["a", "b"], torch.stack(documents)[:, :120], bos=False)
    protocol = Pseudo(samples)
    scorer = protocol.scorer(model, tokenizer(), Memory())
    for index, ids in enumerate(texts()):
        for window, measurements in (
            (120, [protocol.measure(scorer, rows, index, [length])[0] for length in LENGTHS]),
            (30, protocol.measure(scorer, rows, index, LENGTHS, 30)),
        ):
            for measurement in measurements:
                nll = pseudo_nll(model, ids, measurement.length, window, samples)
                assert measurement.nll == pytest.approx(nll, rel=1e-5, abs=1e-5)
                assert measurement.tail == (len(nll) + 1) // 2 and measurement.first is None
                n = measurement.length - 2
                assert measurement.places.tolist() == [(2 * j + 1) * n // (2 * len(nll)) for j in range(len(nll))]


@pytest.mark.parametrize("bos", [False, True])
def test_the_bytes_of_a_sample_are_those_of_its_tokens(bos: bool) -> None:
    sizes = [0] * bos + [len(piece.encode()) for piece in ("a", "\u00e9", "\u4e2d\u6587", " b", "\U0001f600", "cd")]
    ends = torch.tensor(sizes).cumsum(0)[None]
    rows = TokenizedDocuments(["a"], torch.zeros_like(ends), bos, byte_ends=ends)
    for places in ([2, 4], [0, 3, 5]):
        places = np.array(places) + bos
        sample = Measurement(8, np.ones(len(places)), first=None, places=places)
        record = document_record(sample, rows, 0, "none", 1.0, with_positions=True)
        assert record["bytes"] == sum(sizes[place] for place in places)
        assert record["position_nll_sums"] is None, "not as many in each of sixteen stretches"
    later = replace(rows, start=3)
    record = document_record(sample, later, 0, "none", 1.0, with_positions=True)
    assert (record["bytes"] is None) is not bos, "without BOS nothing tells where such a row begins"


def test_an_encoder_from_end_to_end(tmp_path: Path) -> None:
    model = build("bert", task="masked-lm")
    results = compare(model, tokenizer(), TEXTS, ["table-linear"], lengths=LENGTHS, factor=2.0)
    row = results.row("table-linear", 120)
    control = [pseudo_nll(model, ids, 120, TRAINED) for ids in texts()]
    with patch_model(model, "table-linear", factor=2.0):
        after = [pseudo_nll(model, ids, 120, 120) for ids in texts()]
    assert row["perplexity"] == pytest.approx(perplexity(after), rel=1e-5)
    assert row["perplexity_tail"] == pytest.approx(perplexity([nll[32:] for nll in after]), rel=1e-5)
    assert row["perplexity_truncated"] == pytest.approx(perplexity(control), rel=1e-5)
    gain = perplexity([nll[32:] for nll in control]) / perplexity([nll[32:] for nll in after])
    assert row["gain"] == pytest.approx(gain, rel=1e-5) and row["tokens"] == 2 * 64
    assert results.row("table-linear", 40)["change"] is not None, "within the trained length control is the model"
    assert row["bits_per_byte"] == pytest.approx(np.concatenate(after).mean() / math.log(2), rel=1e-5)
    extended, cut = (
        [record for record in results.per_document if (record["method"], record["length"]) == (name, 120)]
        for name in ("table-linear", "truncated")
    )
    stretches = gain_by_position(extended, cut, seed=0)
    assert [(stretch.begin, stretch.end) for stretch in stretches] == [
        (i * 120 // 16, (i + 1) * 120 // 16) for i in range(16)
    ]
    for i, stretch in enumerate(stretches):  # four of the 64 tokens lie in each
        assert stretch.gain == pytest.approx(
            perplexity([nll[4 * i : 4 * i + 4] for nll in control])
            / perplexity([nll[4 * i : 4 * i + 4] for nll in after]),
            rel=1e-5,
        )
    write_report(results, tmp_path)
    assert "**Protocol `pseudo`**" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "gain_by_position.png").exists()
    assert Results.load_json(tmp_path / "results.json").rows == results.rows


@pytest.mark.parametrize(
    ("model", "methods", "options"),
    [
        (tiny_t5, ["none", "bucket-linear"], {"trained_length": TRAINED}),
        (lambda: build("bart", task="seq2seq-lm"), ["table-linear"], {}),
        (tiny_pegasus, ["sinusoid-linear"], {}),
    ],
    ids=["t5", "bart", "pegasus"],
)
def test_seq2seq_equals_the_loop(model: Any, methods: list[str], options: dict[str, int]) -> None:
    network = model()
    results = compare(network, tokenizer(before=False), TEXTS, methods, lengths=LENGTHS, factor=2.0, **options)
    for length in LENGTHS:
        control = perplexity([seq2seq_nll(network, ids, length, TRAINED) for ids in texts()])
        for name in methods:
            row = results.row(name, length)
            with patch_model(network, name, factor=None if name == "none" else 2.0, **options):
                after = perplexity([seq2seq_nll(network, ids, length, length) for ids in texts()])
            assert row["protocol"] == "seq2seq" and row["tokens"] == 2 * (length // 4)
            assert row["perplexity"] == row["perplexity_tail"] == pytest.approx(after, rel=1e-5)
            assert row["perplexity_truncated"] == pytest.approx(control, rel=1e-5)
            assert row["gain"] == pytest.approx(control / after, rel=1e-5)
    assert abs(control / after - 1) > 1e-3, "the context counts"


def test_tokens_before_a_text_go_before_the_targets_too() -> None:
    """BART is trained on `</s> <s> text`: the decoder starts with one and goes on with the other."""
    model = build("bart", task="seq2seq-lm")
    row = evaluate_perplexity(model, tokenizer(), TEXTS[:1], [40]).row("none", 40)
    ids = texts()[0]
    decoder_ids = torch.tensor([[model.config.decoder_start_token_id, CLS, *ids[28:37]]])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[CLS, *ids[:28], SEP]]), decoder_input_ids=decoder_ids).logits[0, 1:]
    assert row["nll_sum"] == pytest.approx(cross_entropy(logits, torch.tensor(ids[28:38]), reduction="sum").item())


def test_an_unknown_trained_length_is_asked_for() -> None:
    with pytest.raises(InvalidParameterError, match="Pass trained_length="):
        compare(tiny_t5(), tokenizer(), TEXTS, ["bucket-linear"], lengths=LENGTHS, factor=2.0)
    assert evaluate_perplexity(tiny_t5(), tokenizer(), TEXTS, LENGTHS).row("none", 120)["perplexity"] > 1


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("bert", {"protocol": "prefix"}, "protocol to be 'pseudo' for BertForMaskedLM, got 'prefix'"),
        ("bert", {"protocol": "seq2seq"}, "'pseudo' for BertForMaskedLM, got 'seq2seq'"),
        ("t5", {"protocol": "sliding", "stride": 8}, "'seq2seq' for T5ForConditional.*got 'sliding'"),
        ("llama", {"protocol": "pseudo"}, "'prefix' or 'sliding' or .* for LlamaForCausalLM"),
        ("bert", {"protocol": "rolling"}, "'pseudo' for BertForMaskedLM, got 'rolling'"),
        ("bert", {"protocol": "suffix"}, "to be one of prefix, sliding, .*, pseudo, seq2seq"),
        ("bert", {"stride": 8}, "left out for protocol 'pseudo', got 8"),
        ("bert", {"lengths": [2]}, "Expected texts of 3 tokens or more, which can be scored, got 2"),
        ("t5", {"lengths": [3]}, "Expected texts of 4 tokens or more, which can be scored, got 3"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(model: str, options: dict[str, Any], message: str) -> None:
    network = {"bert": lambda: build("bert", task="masked-lm"), "t5": tiny_t5, "llama": tiny_llama}[model]()
    with pytest.raises(InvalidParameterError, match=message) as error:
        evaluate_perplexity(network, tokenizer(), TEXTS, **{"lengths": [40], **options})
    assert "\n" not in str(error.value)


def test_pass_keys_are_for_decoders() -> None:
    model = build("bert", task="masked-lm")
    with pytest.raises(InvalidParameterError, match="BertForMaskedLM does not continue a text"):
        compare(model, tokenizer(), TEXTS, ["table-linear"], lengths=[40], factor=2.0, passkey=1)


def test_a_tokenizer_without_mask_and_a_model_without_start_are_refused() -> None:
    with pytest.raises(InvalidParameterError, match="a mask token"):
        evaluate_perplexity(build("bert", task="masked-lm"), character_tokenizer(), TEXTS, [40])
    model = build("mbart", task="seq2seq-lm", decoder_start_token_id=None)
    model.generation_config.decoder_start_token_id = None
    with pytest.raises(InvalidParameterError, match="what its decoder starts with"):
        evaluate_perplexity(model, tokenizer(), TEXTS, [40])


class SeesNeighbours(BertForMaskedLM):
    """A head that looks at the whole text."""

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, **kwargs)
        output.logits = output.logits * torch.linspace(1, 2, output.logits.shape[1])[:, None]
        return output


def test_a_head_that_sees_neighbours_is_refused() -> None:
    model = SeesNeighbours(build("bert", task="masked-lm").config).eval()
    with pytest.raises(UnsupportedModelError, match="reads only the token"):
        MaskedScorer(model, tokenizer()).token_nll(torch.tensor(texts())[:, :20], torch.tensor([7, 9]))


def test_kinds_are_told_from_class_and_config() -> None:
    def kind(model: PreTrainedModel) -> str:
        return model_kind(model)[0]

    assert [kind(build(name, task="masked-lm")) for name in ("bert", "roberta")] == ["masked"] * 2
    assert kind(SeesNeighbours(build("bert", task="masked-lm").config)) == "masked", "a class of somebody's own"
    assert kind(tiny_t5()) == kind(build("bart", task="seq2seq-lm")) == "seq2seq"
    assert kind(build("t5", task="base")) == kind(build("bert", task="base")) == kind(tiny_llama()) == "causal"
    sizes = {"vocab_size": 128, "emb_dim": 32, "n_layers": 1, "n_heads": 2}
    kinds = [kind(XLMWithLMHeadModel(XLMConfig(**sizes, causal=causal))) for causal in (False, True)]
    assert kinds == ["masked", "causal"], "one class for both"


def test_special_tokens_are_the_tokenizers() -> None:
    assert special_tokens(tokenizer()) == ([CLS], [SEP])
    assert special_tokens(tokenizer(before=False)) == ([], [SEP])
    assert special_tokens(character_tokenizer(bos=True)) == ([1], [])
    assert special_tokens(character_tokenizer()) == ([], [])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: build("bert", task="masked-lm"), "BertForMaskedLM"),
        (tiny_t5, "T5ForConditionalGeneration"),
        (tiny_llama, "LlamaForCausalLM"),
    ],
)
def test_the_command_line_loads_the_class_that_the_config_names(make: Any, expected: str, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), "float32", "cpu")
    assert type(model).__name__ == expected
