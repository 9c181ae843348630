"""Logits that are not finite name the document, the token and the layers."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from hf_posext.diagnosis.reading import short_context_losses, token_losses
from hf_posext.errors import NonFiniteError
from hf_posext.evaluation.protocols import MaskedScorer, Seq2SeqScorer
from hf_posext.evaluation.scorer import Memory, TokenScorer, family, require_finite
from hf_posext.evaluation.tokens import TokenizedDocuments

from ..conftest import tiny_t5, tokens
from ..zoo import build
from .helpers import character_tokenizer


def spoil(module: nn.Module, value: float, times: int = 10**9) -> None:
    """From now on, one number of what a module gives for token 30 is `value`."""
    remaining = itertools.repeat(None, times)

    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        if output.shape[1] <= 30 or next(remaining, "over") == "over":
            return output
        output = output.clone()
        output[:, 30, 0] = value
        return output

    module.register_forward_hook(hook)


SPOILED = {
    "model.embed_tokens": (1, "model.embed_tokens"),
    "model.layers.1.mlp.down_proj": (31, r"model.layers.\*.mlp.down_proj \(first in layer 1\)"),
    "model.layers.0.self_attn.v_proj": (1, r"model.layers.\*.self_attn.v_proj \(first in layer 0\)"),
    "model.norm": (31, "model.norm"),
}
"""The first token without a finite NLL, and the layers. A layer of attention spreads what token 30 has to those before
it, too: they give it no weight, but nothing times NaN is NaN."""


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("path", SPOILED)
def test_not_finite_logits_name_document_token_and_layers(llama: LlamaForCausalLM, path: str, value: float) -> None:
    first, layers = SPOILED[path]
    spoil(llama.get_submodule(path), value)
    before = [len(module._forward_hooks) for module in llama.modules()]
    scorer = TokenScorer(llama)
    rows = [scorer.token_nll(tokens(count, rows=2))[1].numpy() for count in (30, 50)]
    require_finite(rows[0], "Emma", culprit=scorer.culprit)
    with pytest.raises(NonFiniteError, match=f"'Emma', got others, first at token {first}, from {layers}. Load"):
        require_finite(rows[1], "Emma", culprit=scorer.culprit)
    with pytest.raises(NonFiniteError, match=f"first at token {100 + first}\\. Load"):
        require_finite(rows[1], "Emma", range(101, 150))
    assert [len(module._forward_hooks) for module in llama.modules()] == before


def test_not_finite_logits_in_chunks(llama: LlamaForCausalLM) -> None:
    """Token 30 of the last chunk but one."""
    spoil(llama.model.layers[1].mlp, float("nan"))
    scorer = TokenScorer(llama, Memory(prefill_chunk=40))
    nll = scorer.token_nll(tokens(90))[0].numpy()
    with pytest.raises(NonFiniteError, match=r"first at token 31, from model.layers.\*.mlp \(first in layer 1\)"):
        require_finite(nll, "Emma", culprit=scorer.culprit)


def test_not_finite_logits_of_the_head_and_after_it() -> None:
    model = build("gemma2")
    nan = torch.full((), float("nan"))
    model.lm_head.register_forward_hook(lambda *args: args[2] * nan)
    scorer = TokenScorer(model)
    scorer.token_nll(tokens(50))
    assert scorer.culprit is not None and scorer.culprit() == "lm_head"
    model = build("gemma2", final_logit_softcapping=float("nan"))
    scorer = TokenScorer(model)
    scorer.token_nll(tokens(50))
    assert scorer.culprit is not None and scorer.culprit() == "what the model does after its head"


def test_encoders_and_encoder_decoders_name_the_layers_too() -> None:
    masking = character_tokenizer()
    masking.add_special_tokens({"mask_token": "<mask>"})
    encoder = build("bert", task="masked-lm")
    spoil(encoder.get_submodule("bert.encoder.layer.2.output.dense"), float("nan"))
    masked = MaskedScorer(encoder, masking)
    for count, finite in ((20, True), (40, False)):
        nll = masked.token_nll(tokens(count, rows=3), torch.tensor([2, 3, 4]))
        assert bool(torch.isfinite(nll).all()) is finite
    assert masked.culprit is not None
    assert masked.culprit() == "bert.encoder.layer.*.output.dense (first in layer 2)"

    encoder_decoder = tiny_t5()
    spoil(encoder_decoder.get_submodule("encoder.block.1.layer.1.DenseReluDense.wo"), float("inf"))
    seq2seq = Seq2SeqScorer(encoder_decoder, character_tokenizer())
    seq2seq.token_nll(tokens(20)[0], tokens(5)[0])
    assert seq2seq.culprit is None
    nll = seq2seq.token_nll(tokens(40)[0], tokens(5)[0])
    with pytest.raises(NonFiniteError, match=r"token 41, from encoder.block.\*.layer.\*.* \(first in layer 1.1\)"):
        require_finite(nll, "Emma", range(41, 46), seq2seq.culprit)


def test_a_diagnosis_names_the_layers(llama: LlamaForCausalLM) -> None:
    spoil(llama.model.norm, float("nan"))
    documents = TokenizedDocuments(["Emma"], tokens(60), bos=False)
    for measure in (token_losses, partial(short_context_losses, context=40)):
        with pytest.raises(NonFiniteError, match="'Emma', got others, first at token 31, from model.norm. Load"):
            measure(TokenScorer(llama), documents)


def test_weights_that_are_damaged_are_named_and_no_dtype_is_advised(llama: LlamaForCausalLM) -> None:
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    scorer = TokenScorer(llama)
    nll = scorer.token_nll(tokens(50))[0].numpy()
    weights = r"weights that are not finite themselves: model.layers.\*.mlp.down_proj.weight \(first in layer 1\)"
    with pytest.raises(NonFiniteError, match=f"from {weights}. Load another checkpoint, since this one is damaged"):
        require_finite(nll, "Emma", culprit=scorer.culprit)


def test_what_does_not_happen_again_is_said(llama: LlamaForCausalLM) -> None:
    spoil(llama.model.norm, float("nan"), times=1)
    scorer = TokenScorer(llama)
    nll = scorer.token_nll(tokens(50))[0].numpy()
    with pytest.raises(NonFiniteError, match="first at token 31, from no module when it was run again."):
        require_finite(nll, "Emma", culprit=scorer.culprit)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("model.layers.12.mlp", "model.layers.*.mlp (first in layer 12)"),
        ("h.0", "h.* (first in layer 0)"),
        ("model.layers.3.mlp.experts.41.w2", "model.layers.*.mlp.experts.*.w2 (first in layer 3.41)"),
        ("lm_head", "lm_head"),
    ],
)
def test_family(path: str, expected: str) -> None:
    assert family(path) == expected
