"""Tokens are kept in the cache of `datasets`: what is found there, what is not, and what happens without it."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pytest
from tokenizers import normalizers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from hf_posext.evaluation import Document
from hf_posext.evaluation.tokens import tokenize_documents

from ..helpers import run_python
from .helpers import character_tokenizer, random_texts


class Slow(PreTrainedTokenizer):
    """Characters, without offsets."""

    calls: ClassVar[list[str]] = []

    def __init__(self, shift: int = 1, **kwargs: Any) -> None:
        self.shift = shift
        super().__init__(unk_token="\x00", **kwargs)

    @property
    def vocab_size(self) -> int:
        return 128

    def get_vocab(self) -> dict[str, int]:
        return {chr(code): (code + self.shift) % 128 for code in range(128)}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        self.calls.append(text)
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return (ord(token) + self.shift) % 128


class Counting(PreTrainedTokenizerFast):
    """Writes down what it tokenizes."""

    calls: ClassVar[list[str]] = []
    pause: ClassVar[float] = 0.0

    def __call__(self, text: str, **kwargs: Any) -> Any:
        if text != "a":  # asked for by special_tokens
            self.calls.append(text)
            time.sleep(self.pause)
        return super().__call__(text, **kwargs)


def counting(bos: bool = False) -> Counting:
    """The character tokenizer, counting; without a BOS if it does not add one."""
    tokenizer = character_tokenizer(bos).backend_tokenizer
    return Counting(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>" if bos else None)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Counting.calls.clear()
    Slow.calls.clear()
    return tmp_path / "cache" / "hf_posext"


def same(first: Any, second: Any) -> bool:
    return first.tokens.tolist() == second.tokens.tolist() and first.byte_ends.tolist() == second.byte_ends.tolist()


@pytest.fixture
def documents() -> list[Document]:
    return [Document(f"d{index}", text) for index, text in enumerate(random_texts(3, 30))]


@pytest.mark.parametrize("bos", [False, True])
def test_the_second_time_nothing_is_tokenized(documents: list[Document], bos: bool, own_cache: Path) -> None:
    tokenizer = counting(bos)
    first = tokenize_documents(documents, tokenizer, 10)
    assert len(Counting.calls) == 3
    renamed = [Document(f"other {document.id}", document.text) for document in documents]
    assert same(first, tokenize_documents(renamed, counting(bos), 10))
    # Truncation of some other call is no part of what is asked for here.
    PreTrainedTokenizerFast.__call__(tokenizer, "abc", truncation=True, max_length=2)
    longer = tokenize_documents(documents, tokenizer, 20, start=3)
    assert longer.tokens.shape == (3, 20) and len(Counting.calls) == 3
    assert len(list(own_cache.glob("*.arrow"))) == 1


@pytest.mark.parametrize("change", ["text", "joined", "order", "vocabulary", "normaliser", "special", "class"])
def test_what_tokens_depend_on_is_in_the_fingerprint(documents: list[Document], change: str, own_cache: Path) -> None:
    tokenizer = counting()
    tokenize_documents(documents, tokenizer, 10)
    if change == "text":
        documents = [*documents[:2], Document("d2", documents[2].text + "x")]
    elif change == "joined":
        documents = [Document("d0", documents[0].text + documents[1].text[0]), Document("d1", documents[1].text[1:])]
        documents.append(Document("d2", random_texts(3, 30)[2]))
    elif change == "order":
        documents = documents[::-1]
    elif change == "vocabulary":
        tokenizer.add_tokens("z")
    elif change == "normaliser":
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    elif change == "special":
        tokenizer.split_special_tokens = True
    else:
        tokenizer = character_tokenizer()
    rows = tokenize_documents(documents, tokenizer, 10)
    assert len(list(own_cache.glob("*.arrow"))) == 2
    assert rows.tokens.tolist() == [tokenizer(document.text)["input_ids"][:10] for document in documents]


def test_a_slow_tokenizer_has_no_byte_ends() -> None:
    rows = tokenize_documents([Document("x", "abcde")], Slow(), 4)
    assert rows.byte_ends is None
    assert rows.tokens.tolist() == [[ord(character) + 1 for character in "abcd"]]


def test_a_slow_tokenizer_is_cached_by_all_that_it_is(documents: list[Document], own_cache: Path) -> None:
    first = tokenize_documents(documents, Slow(), 10)
    Slow.calls.clear()
    again = tokenize_documents(documents, Slow(), 10)
    assert again.tokens.tolist() == first.tokens.tolist() and again.byte_ends is None
    assert documents[0].text not in Slow.calls
    shifted = tokenize_documents(documents, Slow(shift=2), 10)
    assert (shifted.tokens == (first.tokens + 1) % 128).all()
    assert len(list(own_cache.glob("*.arrow"))) == 2


def test_a_tokenizer_that_cannot_be_pickled_is_not_cached(
    documents: list[Document], own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = Slow()
    tokenizer.stream = (line for line in ())
    assert tokenize_documents(documents, tokenizer, 10).tokens.shape == (3, 10)
    assert "not cached, since the tokenizer cannot be pickled" in caplog.text
    assert not own_cache.exists()


def test_without_caching_it_is_done_again(documents: list[Document], own_cache: Path) -> None:
    tokenizer = counting()
    cached = tokenize_documents(documents, tokenizer, 10)
    datasets.disable_caching()
    try:
        assert same(cached, tokenize_documents(documents, tokenizer, 10))
    finally:
        datasets.enable_caching()
    assert len(Counting.calls) == 6
    assert len(list(own_cache.glob("*.arrow"))) == 1


@pytest.mark.parametrize("trouble", ["no folder", "torn file"])
def test_a_cache_that_cannot_be_used_is_said_and_done_without(
    documents: list[Document], trouble: str, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = counting()
    expected = tokenize_documents(documents, tokenizer, 10)
    (file,) = own_cache.glob("*.arrow")
    if trouble == "torn file":
        file.write_bytes(file.read_bytes()[:300])
    else:
        for path in own_cache.iterdir():
            path.unlink()
        own_cache.rmdir()
        own_cache.write_text("a file where the folder should be")
    assert same(expected, tokenize_documents(documents, tokenizer, 10))
    assert "tokens cannot be kept at" in caplog.text
    assert len(Counting.calls) == 6


def tokenize_and_count(documents: list[Document], start: Any, total: Any, good: Any) -> None:
    """In a process of its own: begins together with the others, and tells how much it tokenized."""
    Counting.pause = 0.1
    start.wait()
    rows = tokenize_documents(documents, counting(), 10)
    expected = [character_tokenizer()(document.text)["input_ids"][:10] for document in documents]
    with total.get_lock():
        total.value += len(Counting.calls)
        good.value += int(rows.tokens.tolist() == expected)


def test_of_processes_that_begin_together_one_tokenizes(documents: list[Document], own_cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, total, good = context.Barrier(3), context.Value("i", 0), context.Value("i", 0)
    processes = [context.Process(target=tokenize_and_count, args=(documents, start, total, good)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert (total.value, good.value) == (3, 3)


RUN = """
import json
from hf_posext.evaluation import Document
from hf_posext.evaluation.tokens import tokenize_documents
from tests.evaluation.helpers import random_texts
from tests.evaluation.test_token_cache import Counting, counting

documents = [Document(f"d{index}", text) for index, text in enumerate(random_texts(3, 30))]
found = tokenize_documents(documents, counting(), 10)
print(json.dumps([len(Counting.calls), found.tokens.tolist(), found.byte_ends.tolist()]))
"""


def test_a_second_run_tokenizes_nothing(documents: list[Document], own_cache: Path) -> None:
    rows = tokenize_documents(documents, counting(), 10)
    assert len(Counting.calls) == 3
    process = run_python("-c", RUN, HF_DATASETS_CACHE=str(own_cache.parent), PYTHONHASHSEED="7")
    calls, tokens, ends = json.loads(process.stdout)
    assert rows.byte_ends is not None
    assert (calls, tokens, ends) == (0, rows.tokens.tolist(), rows.byte_ends.tolist())
