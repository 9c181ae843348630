"""Special tokens that a tokenizer puts before a text: read by every measurement, scored by none, named in the row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors

from hf_posext import evaluate_perplexity
from hf_posext.diagnosis import diagnose
from hf_posext.errors import InvalidParameterError
from hf_posext.evaluation import Document, find_key_tokens, load_documents
from hf_posext.evaluation.prompts import passkey_prompts, task_prompt
from hf_posext.evaluation.tokens import special_prefix
from hf_posext.training.trainer import NO_LABEL, Collator, make_rows, schedule
from tests.conftest import tiny_llama
from tests.evaluation.helpers import BOS, character_tokenizer, naive_nll, naive_windowed_nll, random_texts
from tests.helpers import NOVELS, shipped_model, shipped_tokenizer

TEXTS = random_texts(2, 60)
GLM, CLASS, TWO = "<unk> <pad>", "<unk>", "<s> <s>"
IDS = {"<s>": 1, "<unk>": 2, "<pad>": 0}


def tokenizer_of(prefix: str) -> Any:
    """Puts these special tokens before a text; BOS is another token, or one of them."""
    tokenizer = character_tokenizer()
    names = prefix.split()
    template = processors.TemplateProcessing(single=f"{prefix} $A", special_tokens=[(n, IDS[n]) for n in set(names)])
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def expected_perplexity(model: Any, prefix: list[int], length: int) -> float:
    """Plain loop: the prefix before each text, of which no token is scored."""
    plain = character_tokenizer()
    nll = []
    for text in TEXTS:
        row = torch.tensor([*prefix, *plain(text)["input_ids"]][:length])
        nll.extend(naive_nll(model, row)[max(1, len(prefix)) - 1 :])
    return float(np.exp(np.mean(nll)))


@pytest.mark.parametrize(
    ("prefix", "rule"),
    [
        (GLM, "first 2 tokens of each document; special prefix <unk><pad>"),
        (CLASS, "first token of each document; special prefix <unk>"),
        (TWO, "first 2 tokens of each document; special prefix <s><s>"),
        ("<unk> <s>", "first 2 tokens of each document; special prefix <unk><s>"),
        ("<s>", "first token of each document"),
    ],
)
def test_perplexity_is_that_of_a_loop_and_the_row_names_the_prefix(prefix: str, rule: str) -> None:
    model, tokenizer = tiny_llama(), tokenizer_of(prefix)
    ids = [IDS[name] for name in prefix.split()]
    assert tokenizer("a")["input_ids"][: len(ids)] == ids == special_prefix(tokenizer)
    results = evaluate_perplexity(model, tokenizer, TEXTS, [20, 40])
    for row in results.rows:
        # float32 logits against float64 of the loop
        assert row["perplexity"] == pytest.approx(expected_perplexity(model, ids, row["length"]), rel=1e-5)
        assert row["bos"] == rule
        assert row["tokens"] == 2 * (row["length"] - max(1, len(ids)))


@pytest.mark.parametrize(
    ("added", "bos", "ids", "rule"),
    [
        ("", "always", [BOS], "first token of each document; bos='always'; the tokenizer adds none"),
        ("", "auto", [], "none: the tokenizer adds none"),
        ("", "never", [], "none: the tokenizer adds none"),
        ("<s>", "always", [BOS], "first token of each document"),
        ("<s>", "never", [], "none; bos='never'; the tokenizer adds one"),
        (CLASS, "always", [BOS, 2], "first 2 tokens of each document; bos='always'; the tokenizer adds one"),
    ],
)
def test_bos_is_where_it_was_asked_for(added: str, bos: Any, ids: list[int], rule: str) -> None:
    model, tokenizer = tiny_llama(), tokenizer_of(added) if added else character_tokenizer()
    results = evaluate_perplexity(model, tokenizer, TEXTS, [40], bos=bos)
    assert results.rows[0]["perplexity"] == pytest.approx(expected_perplexity(model, ids, 40), rel=1e-5)
    assert results.rows[0]["bos"] == results.provenance["bos"] == rule
    assert special_prefix(tokenizer, bos) == ids
    for tokens in (
        passkey_prompts(tokenizer, 400, 1, 0, bos)[0].tokens,
        task_prompt(tokenizer, "passkey", 900, 0.5, bos=bos).tokens,
    ):
        assert tokens[: len(ids)] == ids and tokens[len(ids)] > 2


def test_bos_that_is_not_there_and_other_values_are_refused() -> None:
    tokenizer = character_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(InvalidParameterError, match="a BOS token for bos='always', got"):
        special_prefix(tokenizer, "always")
    with pytest.raises(InvalidParameterError, match="Expected bos to be one of auto, always, never, got 'yes'"):
        special_prefix(tokenizer, "yes")  # type: ignore[arg-type]
    with pytest.raises(InvalidParameterError, match="lengths to be above 2, the special tokens before each text"):
        evaluate_perplexity(tiny_llama(), tokenizer_of(GLM), TEXTS, [2])


def test_training_rows_and_key_tokens_begin_with_the_prefix() -> None:
    tokenizer = tokenizer_of(GLM)
    rows = make_rows([Document("a", TEXTS[0])], tokenizer, 20)
    table = np.array(rows.dataset["input_ids"])
    assert (table[:, :2] == [2, 0]).all() and (table[:, 2:] > 2).all() and len(table) == 3
    assert rows.facts["bos"] == 2
    keys = find_key_tokens(
        tiny_llama(), tokenizer, TEXTS, length=40, short_length=8, stride=4, alpha=-99.0, beta=-99.0
    )
    indices = [index for indices in keys.indices.values() for index in indices]
    assert min(indices) == 2, "every token is key by these thresholds, but for the prefix"


@pytest.mark.parametrize(
    "protocol",
    [{}, {"protocol": "sliding", "stride": 8}, {"protocol": "rolling"}],
    ids=["prefix", "sliding", "rolling"],
)
def test_longppl_scores_the_key_tokens_behind_a_prefix(protocol: dict[str, Any]) -> None:
    """The first scored token is token 2, so that the values of a measurement begin there."""
    model, tokenizer, alpha = tiny_llama(), tokenizer_of(GLM), 0.01
    settings = {"longppl": "none", "short_length": 8, "alpha": alpha, "beta": -99.0}
    row = evaluate_perplexity(model, tokenizer, TEXTS, [40], **settings, **protocol).rows[0]
    nll, keys = [], 0
    for text in TEXTS:
        ids = torch.tensor([2, 0, *character_tokenizer()(text)["input_ids"]][:40])
        long, short = naive_nll(model, ids)[1:], naive_windowed_nll(model, ids, 8 + 2, 2, bos=2)
        is_key = short - long > alpha
        nll.extend(long[is_key])
        keys += int(is_key.sum())
    assert row["key_tokens"] == keys > 5
    assert row["longppl"] == pytest.approx(float(np.exp(np.mean(nll))), rel=1e-5)  # float32 against float64


def test_special_tokens_have_no_loss_in_training() -> None:
    tokenizer, model = tokenizer_of(GLM), tiny_llama()
    texts = [Document("a", TEXTS[0]), Document("b", TEXTS[1][:25])]
    for pack in (False, True):
        rows = make_rows(texts, tokenizer, 20, pack=pack)
        samples = list(schedule(rows.dataset, len(rows.dataset), seed=0))
        batch = Collator(special=rows.facts["bos"])(samples)
        begins = batch.get("position_ids", torch.arange(20).expand(len(samples), 20)) == 0
        special = begins | begins.roll(1, dims=1)
        if not pack:
            assert (batch["labels"][special] == NO_LABEL).all()
            assert torch.equal(batch["labels"][~special], batch["input_ids"][~special])
        with torch.no_grad():
            loss = float(model(**batch, use_cache=False).loss)
        nll = []
        for text in texts:
            ids = character_tokenizer()(text.text)["input_ids"]
            for start in range(0, len(ids), 18):
                row = torch.tensor([2, 0, *ids[start : start + 18]])
                if len(row) == 20 or pack:
                    nll.extend(naive_nll(model, row)[1:])
        assert loss == pytest.approx(float(np.mean(nll)), rel=1e-5)  # float32, summed in another order


def test_special_tokens_are_not_in_the_curve_of_a_diagnosis() -> None:
    model = shipped_model()
    tokenizer = shipped_tokenizer()
    ids = [tokenizer.bos_token_id or 0] * 3
    token = tokenizer.convert_ids_to_tokens(ids[0])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} {token} {token} $A", special_tokens=[(token, ids[0])]
    )
    texts = load_documents(NOVELS, limit=1)
    losses = diagnose(model, tokenizer, texts, methods=[], target_length=640).tables["losses"]
    first = losses[losses.curve == "none"].iloc[0]
    assert (first.begin, first.end) == (3, 20), "the first stretch of twenty tokens, without the special ones"
    row = torch.tensor([*ids, *tokenizer(texts[0].text, add_special_tokens=False)["input_ids"][:637]])
    assert first.nll == pytest.approx(naive_nll(model, row)[2:19].mean(), rel=1e-5)
