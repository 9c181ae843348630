"""Identity of a run: all that its numbers depend on, wherever a model keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_posext.errors import JournalError
from hf_posext.evaluation import Document, Documents, Results, compare, evaluate_perplexity
from hf_posext.evaluation.documents import as_documents
from hf_posext.evaluation.setup import weights_fingerprint

from ..conftest import tiny_llama
from ..evaluation.helpers import character_tokenizer, random_texts

TEXTS = random_texts(3, 140)


class Quantised(nn.Module):
    """A linear layer whose weights are buffers, as those of GPTQ, AWQ and BitNet."""

    def __init__(self, layer: nn.Linear, scale: float, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("qweight", layer.weight.detach() * scale, persistent=persistent)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.qweight)


def quantised(scale: float, persistent: bool = True) -> Any:
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.down_proj = Quantised(layer.mlp.down_proj, scale, persistent)
    return model


def run(model: Any, documents: Any = TEXTS, journal: Path | None = None) -> Results:
    return evaluate_perplexity(model, character_tokenizer(), documents, [64, 128], journal=journal)


@pytest.mark.parametrize("persistent", [True, False])
def test_a_journal_is_not_continued_by_a_model_with_other_buffers(persistent: bool, tmp_path: Path) -> None:
    first = run(quantised(1.0, persistent), journal=tmp_path / "journal.jsonl")
    with pytest.raises(JournalError, match=r"that of another run.*models\.0\.weights is"):
        run(quantised(0.8, persistent), journal=tmp_path / "journal.jsonl")
    assert run(quantised(1.0, persistent), journal=tmp_path / "journal.jsonl").rows == first.rows
    assert run(quantised(0.8, persistent)).rows[0]["perplexity"] != first.rows[0]["perplexity"]


def test_a_journal_is_not_continued_in_another_precision(tmp_path: Path) -> None:
    results = run(tiny_llama(), journal=tmp_path / "journal.jsonl")
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(JournalError, match=r"models\.0\.autocast is None there and bfloat16 here"):
            run(tiny_llama(), journal=tmp_path / "journal.jsonl")
        autocast = run(tiny_llama())
    assert results.rows[0]["dtype"] == "float32" and autocast.rows[0]["dtype"] == "float32, autocast to bfloat16"
    assert results.rows[0]["perplexity"] != autocast.rows[0]["perplexity"]


def test_a_journal_is_not_continued_by_another_quantisation(tmp_path: Path) -> None:
    model = tiny_llama()
    run(model, journal=tmp_path / "journal.jsonl")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(JournalError, match=r"models\.0\.config\.quantization_config is None there and"):
        run(model, journal=tmp_path / "journal.jsonl")


def test_what_was_read_before_is_not_part_of_the_identity() -> None:
    model = tiny_llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0})
    before = weights_fingerprint(model)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 120)[None] % 60)
    assert weights_fingerprint(model) == before
    model.model.rotary_emb.original_inv_freq.mul_(0.5)
    assert weights_fingerprint(model) != before, "frequencies are buffers that are not saved"


def test_documents_of_one_id_are_measured_each(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model = tiny_llama()
    twins = [Document("a", TEXTS[0]), Document("a", TEXTS[1]), Document("b", TEXTS[2])]
    results, right = run(model, twins, tmp_path / "journal.jsonl"), run(model, TEXTS)
    assert "document ids repeat; they are numbered" in caplog.text
    assert [row["nll_sum"] for row in results.rows] == [row["nll_sum"] for row in right.rows]
    assert list(dict.fromkeys(record["document"] for record in results.per_document)) == ["0-a", "1-a", "2-b"]
    assert [record["nll_sum"] for record in results.per_document] == [r["nll_sum"] for r in right.per_document]
    assert run(model, twins, tmp_path / "journal.jsonl").rows == results.rows, "also from the journal"


def test_gains_of_documents_of_one_id_are_of_each(caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {
        "lengths": [64, 128],
        "factor": 2.0,
        "longppl": "linear",
        "short_length": 16,
    }
    tokenizer, twins = character_tokenizer(), [Document("a", text) for text in TEXTS]
    results, right = (
        compare(tiny_llama(), tokenizer, documents, ["none", "linear"], **settings, alpha=0.1, beta=-9.0)
        for documents in (twins, TEXTS)
    )
    assert results.rows == right.rows and right.rows[-1]["key_tokens"] > 0


def test_numbered_documents_remember_their_source() -> None:
    source = {"dataset": "d", "split": None, "revision": None, "text_column": "text"}
    numbered = as_documents(Documents([Document("a", "x"), Document("a", "y")], source))
    assert isinstance(numbered, Documents) and numbered.source == source
    assert [document.id for document in numbered] == ["0-a", "1-a"]
