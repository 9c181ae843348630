"""Tokens from the cache of `datasets`: the second call, and another process, do not tokenize."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from hf_posext.evaluation import Document, token_cache
from hf_posext.evaluation.token_cache import cached_token_ids
from hf_posext.evaluation.tokens import token_ids

from .conftest import EXAMPLES
from .evaluation_helpers import character_tokenizer, random_texts

DOCUMENTS = [Document(str(index), text) for index, text in enumerate([*random_texts(20, 300), ""])]

OTHER_PROCESS = """
import sys
from transformers import AutoTokenizer
from hf_posext.evaluation import Document, token_cache

if sys.argv[1] == "second":
    def refuse(*args):
        raise AssertionError("tokenized again")
    token_cache.token_ids = refuse
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
print(token_cache.cached_token_ids([Document("a", "It was the best of times."), Document("b", "")], tokenizer))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    return tmp_path / "hf_posext"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by each text that is tokenized."""
    seen: list[str] = []

    def counted(tokenizer: object, text: str) -> list[int]:
        seen.append(text)
        return token_ids(tokenizer, text)

    monkeypatch.setattr(token_cache, "token_ids", counted)
    return seen


def test_the_second_call_does_not_tokenize(calls: list[str], cache: Path) -> None:
    tokenizer = character_tokenizer()
    expected = [token_ids(tokenizer, document.text) for document in DOCUMENTS]
    assert cached_token_ids(DOCUMENTS, tokenizer) == expected
    assert len(calls) == len(DOCUMENTS) == 21
    renamed = [Document("renamed " + document.id, document.text) for document in DOCUMENTS]
    assert cached_token_ids(renamed, character_tokenizer()) == expected
    assert len(calls) == 21
    assert len(list(cache.iterdir())) == 1, "one file, and nothing temporary beside it"


def test_nor_does_another_process(cache: Path) -> None:
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache.parent)}
    tokenizer = str(EXAMPLES / "tiny" / "tiny-rope")
    printed = []
    for turn in ("first", "second"):
        command = [sys.executable, "-c", OTHER_PROCESS, turn, tokenizer]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert printed[0] == printed[1]
    assert len(list(cache.iterdir())) == 1


def test_other_texts_and_other_tokenizers_are_other_files(calls: list[str], cache: Path) -> None:
    cached_token_ids(DOCUMENTS, character_tokenizer())
    cached_token_ids(DOCUMENTS[:-1], character_tokenizer())
    larger = character_tokenizer()
    larger.add_tokens(["the"])
    cached_token_ids(DOCUMENTS, larger)
    assert len(calls) == 21 + 20 + 21
    assert len(list(cache.iterdir())) == 3


def test_without_caching_nothing_is_written(calls: list[str], cache: Path) -> None:
    datasets.disable_caching()
    try:
        for _ in range(2):
            cached_token_ids(DOCUMENTS, character_tokenizer())
    finally:
        datasets.enable_caching()
    assert len(calls) == 42
    assert not cache.exists()
    assert cached_token_ids([], character_tokenizer()) == []


def test_texts_that_arrow_cannot_hold(calls: list[str]) -> None:
    """A lone surrogate is no valid UTF-8; what a tokenizer makes of it is the tokenizer's business."""

    class Lengths:
        def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
            return {"input_ids": [len(text)]}

    strange = [Document("0", "a\ud800b"), Document("1", "NUL \x00 inside")]
    assert cached_token_ids(strange, Lengths()) == cached_token_ids(strange, Lengths()) == [[3], [12]]
    assert len(calls) == 2
