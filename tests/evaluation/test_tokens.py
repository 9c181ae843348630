"""Rows of tokens: where each token ends in the text, one BOS, and odd texts from every file format."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_posext.errors import DocumentError
from hf_posext.evaluation import Document, load_documents
from hf_posext.evaluation.tokens import bytes_before, tokenize_documents

from ..helpers import shipped_tokenizer
from .helpers import BOS, character_tokenizer

TEXT = "a\u00e9 \U0001f600b  \n\n cafe\u0301 \ufb01n \u0100B \u05e9\u05dc\u05d5\u05dd, a. \u4f60\u597d"
"""Of characters of one to four bytes, with what normalisers compose, part or drop."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte."""
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def fallback_tokenizer(*normalisers: normalizers.Normalizer) -> PreTrainedTokenizerFast:
    """As Llama's: a mark for each space and before the text, and bytes for what it does not know."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcefn"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    marks = normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([*normalisers, *marks])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


NORMALISED = (normalizers.NFKC(), normalizers.Lowercase(), normalizers.StripAccents())
TOKENIZERS = {
    "bytes": byte_tokenizer,
    "fallback": fallback_tokenizer,
    "normalised": lambda: fallback_tokenizer(normalizers.Replace("\n", ""), *NORMALISED),
    "characters": character_tokenizer,
    "pieces": shipped_tokenizer,
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("start", [0, 7])
def test_byte_ends_are_a_plain_loop(name: str, start: int) -> None:
    tokenizer = TOKENIZERS[name]()
    encoded = tokenizer(TEXT, add_special_tokens=False, return_offsets_mapping=True)
    ends, reached = [], 0
    for _, end in encoded["offset_mapping"]:
        reached = max(reached, end)
        ends.append(len(TEXT[:reached].encode()))
    bos = name in ("fallback", "normalised")
    length = len(ends) - start + bos
    rows = tokenize_documents([Document("x", TEXT)], tokenizer, length, start)
    before = [ends[start - 1] if start else 0] if bos else []
    assert rows.byte_ends is not None and rows.byte_ends.shape == rows.tokens.shape
    assert rows.byte_ends[0].tolist() == before + ends[start:]
    assert len(set(ends)) > 10
    if name != "normalised":  # which drops accents
        assert ends[-1] == len(TEXT.encode())


def test_a_token_of_one_byte_ends_one_byte_further() -> None:
    """No offsets in this reference: after n tokens there are n bytes, wherever n bytes are whole characters."""
    encoded = TEXT.encode()
    rows = tokenize_documents([Document("x", TEXT)], byte_tokenizer(), len(encoded))
    assert rows.byte_ends is not None
    ends = [0, *rows.byte_ends[0].tolist()]
    for count in range(len(encoded) + 1):
        size_of_whole = len(encoded[:count].decode(errors="ignore").encode())
        size = len(
            (encoded[:count].decode(errors="ignore") + TEXT[len(encoded[:size_of_whole].decode()) :][:1]).encode()
        )
        assert ends[count] == (count if size_of_whole == count else size), (
            "a split character counts with its first token"
        )


@given(st.text(max_size=20))
def test_bytes_before_each_character(text: str) -> None:
    assert bytes_before(text).tolist() == [len(text[:index].encode()) for index in range(len(text) + 1)]


@pytest.mark.parametrize("how", ["template", "template twice", "template, and BOS in the text", "all three"])
@pytest.mark.parametrize("start", [0, 2])
def test_what_the_tokenizer_adds_is_there_once_also_if_the_text_begins_with_it(how: str, start: int) -> None:
    tokenizer, bos = character_tokenizer(bos=True), [BOS]
    if how in ("template twice", "all three"):
        twice = processors.TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", BOS)])
        tokenizer.backend_tokenizer.post_processor = twice
        bos = [BOS, BOS]
        assert tokenizer("a")["input_ids"][:2] == bos
    literal = {"template, and BOS in the text": "<s>", "all three": "<s><s>"}.get(how, "")
    rows = tokenize_documents([Document("x", literal + "Hello there")], tokenizer, 6, start)
    plain = character_tokenizer()("Hello there")["input_ids"]
    assert rows.tokens.tolist() == [[*bos, *plain[start : start + 6 - len(bos)]]]
    assert (rows.bos, rows.counts) == (len(bos), [11 + len(bos)])
    assert rows.byte_ends is not None
    begin = len(literal) + start
    assert rows.byte_ends.tolist() == [[begin] * len(bos) + [begin + 1 + index for index in range(6 - len(bos))]]


def test_a_bos_that_the_tokenizer_does_not_add_is_text() -> None:
    rows = tokenize_documents([Document("x", "<s>Hello")], character_tokenizer(), 6)
    assert rows.tokens[0, 0] == BOS and not rows.bos
    assert rows.counts == [6]
    only = Document("y", "<s><s>")
    with pytest.raises(DocumentError, match="got 1 of at most 1"):
        tokenize_documents([only], character_tokenizer(bos=True), 2)


def test_a_vocabulary_above_16_bits() -> None:
    vocabulary = {"<unk>": 0, **{f"w{index}": index for index in range(1, 80_000)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    for _ in range(2):  # also from the cache
        rows = tokenize_documents([Document("x", "w1 w65535 w65536 w79999")], wrapped, 4)
        assert rows.tokens.tolist() == [[1, 65_535, 65_536, 79_999]]


ODD = {
    "nul": "before\x00after, and more",
    "right to left": "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd, \u200fabc \u202e cba",
    "mark": "\ufeffa mark, and \ufeff another",
    "line ends": "one\r\ntwo\rthree\nfour, five",
    "word": "NA",
    "spaces": "  \t  \n\n   ",
    "empty": "",
}


def write(folder: Path, suffix: str, texts: dict[str, str]) -> Path:
    """Every text under its id, in a file of that format; for `.txt` a file each."""
    path = folder / f"odd{suffix}"
    rows = [{"id": id, "text": text} for id, text in texts.items()]
    if suffix == ".txt":
        path.mkdir()
        for id, text in texts.items():
            (path / f"{id}.txt").write_bytes(text.encode())
    elif suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["id", "text"], quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_odd_texts_from_every_format(tmp_path: Path, suffix: str) -> None:
    documents = load_documents(write(tmp_path, suffix, ODD))
    expected = dict(ODD)
    if suffix == ".txt":
        expected |= {"mark": ODD["mark"][1:], "line ends": "one\ntwo\nthree\nfour, five"}
    assert {document.id.removesuffix(".txt"): document.text for document in documents} == expected
    rows = tokenize_documents(documents, byte_tokenizer(), 4)
    ids = {id: byte_tokenizer()(text)["input_ids"] for id, text in expected.items()}
    assert {record["document"].removesuffix(".txt"): record["tokens"] for record in rows.left_out} == {
        "empty": 0,
        "word": 2,
    }
    for id, row, count in zip(rows.ids, rows.tokens, rows.counts, strict=True):
        tokens = ids[id.removesuffix(".txt")]
        assert (row.tolist(), count) == (tokens[:4], len(tokens))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_byte_order_mark_before_a_file_is_no_text(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, suffix, {"a": "one", "b": "two"})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_documents(path) == [Document("a", "one"), Document("b", "two")]


def test_a_line_of_ten_megabytes(tmp_path: Path) -> None:
    """A quadratic step would take hours; what there is takes some seconds for all the formats."""
    words = "abcdefghi " * 1_100_000
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "abcdefghi": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("abcdefghi " * 1000, "isolated")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    for suffix in (".txt", ".jsonl", ".csv", ".parquet"):
        path = write(tmp_path, suffix, {"long": words})
        begin = time.process_time()
        documents = load_documents(path)
        rows = tokenize_documents(documents, wrapped, 1000)
        assert time.process_time() - begin < 20
        assert documents[0].text == words
        assert rows.counts == [1100]
        assert rows.byte_ends is not None
        assert rows.byte_ends[0].tolist() == list(range(10_000, 10_000_001, 10_000))


SURROGATES = {
    "a\ud83db": "a\ufffdb",
    "\udc00": "\ufffd",
    "\ud83d\ude00": "\U0001f600",
    "a\ud83d\ud83d": "a\ufffd\ufffd",
}


def test_lone_surrogates_become_the_replacement_character(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = list(SURROGATES.values())
    assert [document.text for document in load_documents(list(SURROGATES))] == expected
    assert "the text of document '0' has lone surrogates; they become U+FFFD" in caplog.text
    assert Document("x", "a\ud83db").text == "a\ufffdb"
    rows = [{"id": f"d{index}", "text": text} for index, text in enumerate(SURROGATES)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for path in (tmp_path / "a.jsonl", tmp_path / "a.json"):
        assert [document.text for document in load_documents(path)] == expected
    (row,) = tokenize_documents([Document("x", "a\ud83db")], byte_tokenizer(), 5).tokens.tolist()
    assert byte_tokenizer().decode(row) == "a\ufffdb"


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_bytes_that_are_no_utf_8_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, suffix, {"d": "SURROGATE"})
    file = path / "d.txt" if suffix == ".txt" else path
    file.write_bytes(file.read_bytes().replace(b"SURROGATE", b"\xed\xa0\xbd"))
    with pytest.raises(DocumentError, match=f"can be read, got .*{path.name}.*utf-8") as error:
        load_documents(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", "header", "folder", "list"])
def test_an_empty_data_set_is_a_clear_error(tmp_path: Path, suffix: str) -> None:
    source: Any = tmp_path / f"none{suffix}"
    if suffix == "list":
        source = []
    elif suffix == "folder":
        source.mkdir()
    elif suffix == "header":
        source = tmp_path / "header.csv"
        source.write_text("id,text\n")
    elif suffix == ".parquet":
        datasets.Dataset.from_dict({"text": ["a"]}).select([]).to_parquet(source)
    else:
        source.write_text("[]" if suffix == ".json" else "")
    with pytest.raises(DocumentError, match="Expected documents in .*, got none|can be read, got .*none") as error:
        load_documents(source)
    assert "\n" not in str(error.value)
    with pytest.raises(DocumentError, match="Expected documents, got none"):
        tokenize_documents([], character_tokenizer(), 4)
