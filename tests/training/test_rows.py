"""Rows: which tokens are in which row, and that nothing reads across the border of two documents."""

from __future__ import annotations

import logging

import pytest
import torch

from hf_posext.errors import DocumentError, UnsupportedModelError
from hf_posext.evaluation import Document
from hf_posext.patching.long_rows import check_packing
from hf_posext.training.trainer import NO_LABEL, Collator, Skips, make_rows, schedule

from ..conftest import longer_gpt2, tiny_bloom, tiny_llama
from ..evaluation.helpers import BOS, character_tokenizer, random_texts


def documents(*texts: str) -> list[Document]:
    return [Document(f"text-{index}", text) for index, text in enumerate(texts)]


def test_a_row_is_a_part_of_one_document_and_none_is_repeated() -> None:
    tokenizer, texts = character_tokenizer(), random_texts(3, 100)
    rows = make_rows(documents(*texts), tokenizer, 32)
    expected = [tokenizer(text[start : start + 32])["input_ids"] for text in texts for start in (0, 32, 64)]
    assert rows.dataset["input_ids"][:].tolist() == expected
    assert rows.dataset.column_names == ["input_ids"]
    assert rows.facts["rows"] == 9 and rows.facts["tokens"] == 9 * 32 and rows.facts["left_out"] == []


def test_each_row_begins_with_bos_where_the_tokenizer_adds_one() -> None:
    tokenizer, (text,) = character_tokenizer(bos=True), random_texts(1, 62)
    rows = make_rows(documents(text), tokenizer, 32)
    plain = character_tokenizer()(text)["input_ids"]
    assert rows.dataset["input_ids"][:].tolist() == [[BOS, *plain[:31]], [BOS, *plain[31:]]]


def test_short_documents_are_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_posext"):
        rows = make_rows(documents(*random_texts(1, 64), "short"), character_tokenizer(), 32)
    assert rows.facts["left_out"] == ["text-1"] and rows.facts["rows"] == 2
    assert "1 of 2 documents are shorter than 32 tokens" in caplog.text


def test_text_shorter_than_a_row_is_refused() -> None:
    with pytest.raises(
        DocumentError, match="2 documents do not fill a row of 32 tokens: the longest has 20. Pass lon"
    ):
        make_rows(documents(*random_texts(2, 20)), character_tokenizer(), 32)
    with pytest.raises(
        DocumentError, match="of 64 tokens: all of them together have 40. Pass longer documents or a s"
    ):
        make_rows(documents(*random_texts(2, 20)), character_tokenizer(), 64, pack=True)


def test_packing_uses_every_token_once_in_as_few_rows_as_they_need() -> None:
    tokenizer = character_tokenizer()
    texts = [text[:size] for text, size in zip(random_texts(6, 70), (70, 20, 12, 9, 23, 3), strict=True)]
    rows = make_rows(documents(*texts), tokenizer, 32, pack=True)
    assert rows.facts["tokens"] == 137 and rows.facts["left_out"] == []
    pieces_read = []
    for row in rows.dataset:
        begins = [*(row["position_ids"] == 0).nonzero().flatten().tolist(), 32]
        pieces = [slice(*pair) for pair in zip(begins, begins[1:], strict=False)]
        for piece in pieces:
            ids, labels = row["input_ids"][piece], row["labels"][piece]
            assert row["position_ids"][piece].tolist() == list(range(len(ids)))
            if (ids == 0).all():  # padding
                assert (labels == NO_LABEL).all()
                continue
            assert labels.tolist() == [NO_LABEL, *ids[1:].tolist()], "what another document ends with predicts nothing"
            pieces_read.append(ids.tolist())
    pieces = [texts[0][:32], texts[0][32:64], texts[0][64:], *texts[1:]]
    assert sorted(pieces_read) == sorted(tokenizer(piece)["input_ids"] for piece in pieces)
    # 6 + 20 + 12 + 9 + 23 + 3 tokens fill three rows (23 + 9, 20 + 12, 6 + 3), and two are full as they are
    assert rows.facts["rows"] == 5


def test_the_loss_of_packed_rows_is_that_of_each_document_alone() -> None:
    tokenizer, model = character_tokenizer(), tiny_llama()
    texts = [text[:size] for text, size in zip(random_texts(3, 30), (14, 10, 5), strict=True)]
    rows = make_rows(documents(*texts), tokenizer, 28, pack=True)
    batch = Collator()(list(schedule(rows.dataset, len(rows.dataset), seed=0)))
    with torch.no_grad():
        packed = model(**batch, use_cache=False).loss
        total, count = 0.0, 0
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert float(packed) == pytest.approx(total / count, rel=1e-6)  # float32, summed in another order


def test_a_model_that_reads_across_documents_is_refused() -> None:
    check_packing(tiny_llama())
    check_packing(longer_gpt2())
    with pytest.raises(UnsupportedModelError, match="BloomForCausalLM takes no position_ids, which pack"):
        check_packing(tiny_bloom())


def test_each_sample_is_a_function_of_the_seed_and_its_number() -> None:
    rows = make_rows(documents(*random_texts(1, 320)), character_tokenizer(), 32).dataset
    read = [sample["input_ids"].tolist() for sample in schedule(rows, 25, seed=0)]
    rows_in_order = [row.tolist() for row in rows["input_ids"]]
    assert sorted(read[:10]) == sorted(rows_in_order) == sorted(read[10:20]), "each row once in each round"
    assert read[:10] != read[10:20] and read[:10] != rows_in_order, "in another order each time"
    assert [sample["input_ids"].tolist() for sample in schedule(rows, 40, seed=0)][:25] == read
    assert [sample["input_ids"].tolist() for sample in schedule(rows, 25, seed=1)] != read
    assert [int(sample["sample"]) for sample in schedule(rows, 25, seed=0)] == list(range(25))


def test_many_chunks_fit_into_a_short_row() -> None:
    for sample in range(400):
        positions = Skips(target=64, chunks=4, seed=0).positions(5, sample)
        assert len(positions) == 5 and (positions.diff() >= 1).all() and positions[-1] < 64
