"""Special tokens that a tokenizer puts before a text: read by every measurement, scored by none, named in the row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors

from hf_posext import evaluate_perplexity
from hf_posext.errors import InvalidParameterError
from hf_posext.evaluation import find_key_tokens
from hf_posext.evaluation.documents import Document
from hf_posext.evaluation.prompts import passkey_prompts, task_prompt
from hf_posext.evaluation.tokens import special_prefix
from hf_posext.training.rows import make_rows
from tests.conftest import tiny_llama
from tests.evaluation.helpers import BOS, character_tokenizer, naive_nll, random_texts

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
    found = evaluate_perplexity(model, tokenizer, TEXTS, [20, 40])
    for row in found.rows:
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
    found = evaluate_perplexity(model, tokenizer, TEXTS, [40], bos=bos)
    assert found.rows[0]["perplexity"] == pytest.approx(expected_perplexity(model, ids, 40), rel=1e-5)
    assert found.rows[0]["bos"] == found.provenance["bos"] == rule
    assert special_prefix(tokenizer, bos) == ids
    for tokens in (
        passkey_prompts(tokenizer, 400, 1, 0, bos)[0].tokens,
        task_prompt(tokenizer, "passkey", 900, 0.5, bos=bos).tokens,
    ):
        assert tokens[: len(ids)] == ids and tokens[len(ids)] > 2


def test_bos_that_is_not_there_and_other_values_are_refused() -> None:
    tokenizer = character_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(InvalidParameterError, match="bos is 'always', and the tokenizer has no BOS token"):
        special_prefix(tokenizer, "always")
    with pytest.raises(InvalidParameterError, match="Expected bos to be one of auto, always, never, got 'yes'"):
        special_prefix(tokenizer, "yes")  # type: ignore[arg-type]
    with pytest.raises(InvalidParameterError, match="2 special tokens stand before each text; give lengths above 2"):
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
    found = [index for indices in keys.indices.values() for index in indices]
    assert min(found) == 2, "every token is key by these thresholds, but for the prefix"
