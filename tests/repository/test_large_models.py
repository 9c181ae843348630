"""The formulas of `docs/large_models.md` give what was measured, and the page is written from them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hf_posext import evaluate_perplexity
from hf_posext.evaluation import Document
from hf_posext.evaluation.scorer import TokenScorer

from ..helpers import ROOT

CONFIGS = {
    "Llama-3.2-1B": LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8
    ),
    "Llama-3.1-8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
    ),
    "Qwen3-8B": Qwen3Config(
        hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8
    ),
    "Llama-3.1-70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    ),
}
"""The published sizes; vocabularies, and whether embeddings are tied, follow below."""


@pytest.fixture(scope="module")
def script(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("large_models")


@pytest.fixture(scope="module")
def page(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("large_models_page")


def results(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text(encoding="utf-8"))
    return content


def test_sizes_are_those_of_transformers(script: ModuleType) -> None:
    """Parameters are counted on models without memory."""
    assert [shape.name for shape in script.LARGE] == list(CONFIGS)
    for shape in script.LARGE:
        config = CONFIGS[shape.name]
        config.vocab_size, config.tie_word_embeddings = shape.vocabulary, shape.name == "Llama-3.2-1B"
        with torch.device("meta"):
            model = (Qwen3ForCausalLM if shape.name.startswith("Qwen") else LlamaForCausalLM)(config)
        parameters = sum(weight.numel() for weight in model.parameters())
        assert script.Shape.of(shape.name, config, parameters) == shape


def test_formulas_give_what_a_gpu_took(page: ModuleType) -> None:
    """Memory within 2 %, time within 10 %: of two rows whose readings the rates do not come from."""
    rows = [row for row in page.checks(results("gpu"), []) if "1.2 B" in row[0] or "8 B layer" in row[0]]
    assert [unit for _, unit, *_ in rows] == ["MB", "MB", "s", "s"]
    for _, unit, reading, formula in rows:
        assert formula == pytest.approx(reading, rel=0.02 if unit == "MB" else 0.10)


def test_chunks_on_a_cpu_give_the_same_nll_and_less_memory() -> None:
    """The committed readings: the formula is within a third of them, the allocator's share included."""
    rows = [row for row in results("large_models")["parts"]["chunks"] if "left_out" not in row]
    assert [row["chunk"] for row in rows] == [None, 4096, 1024]
    assert all(row["nll"] == pytest.approx(rows[0]["nll"], abs=1e-6) for row in rows)
    assert all(row["formula_mb"] == pytest.approx(row["extra_mb"], rel=1 / 3) for row in rows)


def test_the_control_reads_as_many_windows(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are scored with a control, less the one that is scored without."""
    models = importlib.import_module("models")
    model, tokenizer = models.llama("tiny", 300, trained=64), models.tokenizer(300)
    document = Document("some", models.words(models.text(256, 300)[1:]))
    rows, token_nll = [], TokenScorer.token_nll

    def count(self: TokenScorer, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows.append(len(input_ids))
        return token_nll(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(TokenScorer, "token_nll", count)
    for tokens in (64, 72, 100, 192):
        rows.clear()
        evaluate_perplexity(model, tokenizer, [document], [tokens], control=model)
        assert sum(rows) - 1 == script.control_windows(tokens, 64), tokens


def test_tiny_run(script: ModuleType) -> None:
    unchunked, chunked = script.measure("tiny", 300, 128, (None, 32))
    assert unchunked["nll"] == pytest.approx(chunked["nll"], abs=1e-5)


def test_the_page_has_the_commands_for_public_models(page: ModuleType) -> None:
    text = page.render()
    for command in ("Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B", "--dataset pg19", "--parallelism_config_cp_size"):
        assert command in text
