"""The module for `evaluate`: loaded by its path, offline, in another process; and as a class."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import evaluate
import pytest

import hf_posext.metrics
from hf_posext.evaluation.rows import pooled_perplexity
from hf_posext.metrics import LongDocumentPerplexity

from ..helpers import run_python

FOLDER = Path(hf_posext.metrics.__file__).parent / "long_document_perplexity"
NLL = [2100.25, 96.5, 0.125]
TOKENS = [700, 30, 1]
BYTES = [3000, 125, 4]

LOAD = """
import json
import sys

import evaluate

inputs, *paths = sys.argv[1:]
for path in paths:
    metric = evaluate.load(path)
    results = metric.compute(**json.loads(inputs))
    evaluate.save("saved.json", **results)
    print(json.dumps({"results": results, "module": type(metric).__module__}))
"""


@pytest.fixture
def metric(tmp_path: Path) -> LongDocumentPerplexity:
    return LongDocumentPerplexity(cache_dir=str(tmp_path))


def test_loaded_by_path_offline(tmp_path: Path) -> None:
    environment = {"HF_EVALUATE_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    inputs = json.dumps({"nll_sums": NLL, "tokens": TOKENS, "byte_counts": BYTES})
    words = ["-c", LOAD, inputs, FOLDER, FOLDER / "long_document_perplexity.py"]
    stdout = run_python(*words, cwd=tmp_path, **environment).stdout
    printed = [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]
    assert len(printed) == 2, "the folder, and the file"
    for line in printed:
        assert line["module"].startswith("evaluate_modules"), "a copy, apart from the package"
        assert line["results"] == {
            "perplexity": float(pooled_perplexity(NLL, TOKENS)),
            "bits_per_byte": pytest.approx(math.fsum(NLL) / math.log(2) / 3129, rel=1e-15),
            "n_tokens": 731,
            "n_documents": 3,
        }
    saved = json.loads((tmp_path / "saved.json").read_text(encoding="utf-8"))
    assert saved["perplexity"] == printed[1]["results"]["perplexity"]


def test_equals_the_pooled_perplexity_to_the_bit(metric: LongDocumentPerplexity) -> None:
    result = metric.compute(nll_sums=NLL, tokens=TOKENS)
    assert result == {"perplexity": float(pooled_perplexity(NLL, TOKENS)), "n_tokens": 731, "n_documents": 3}
    assert result["perplexity"] == pytest.approx(math.exp(2196.875 / 731), rel=1e-15)
    assert [type(value) for value in result.values()] == [float, int, int], "evaluate.save takes no NumPy scalars"


def test_documents_come_one_by_one_and_in_batches(metric: LongDocumentPerplexity) -> None:
    metric.add(nll_sums=NLL[0], tokens=TOKENS[0])
    metric.add_batch(nll_sums=NLL[1:], tokens=TOKENS[1:])
    together = metric.compute(byte_counts=BYTES)
    assert together == LongDocumentPerplexity().compute(nll_sums=NLL, tokens=TOKENS, byte_counts=BYTES)


def test_every_token_weighs_the_same(metric: LongDocumentPerplexity) -> None:
    """The mean of the perplexities, e^1 and e^3, would be 11.4; nine tokens in ten are of the first."""
    assert metric.compute(nll_sums=[90.0, 30.0], tokens=[90, 10])["perplexity"] == pytest.approx(math.exp(1.2))


def test_combines_with_others(metric: LongDocumentPerplexity) -> None:
    combined = evaluate.combine({"a": metric, "b": LongDocumentPerplexity()}, force_prefix=True)
    values = combined.compute(nll_sums=NLL, tokens=TOKENS)
    assert values["a_perplexity"] == values["b_perplexity"] == pooled_perplexity(NLL, TOKENS)


def test_a_broken_model_is_infinite(metric: LongDocumentPerplexity) -> None:
    assert metric.compute(nll_sums=[8000.0], tokens=[10])["perplexity"] == math.inf


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"nll_sums": [], "tokens": []}, "Expected documents, got none. Pass one NLL sum"),
        ({"nll_sums": [0.0], "tokens": [0]}, "counts of 0 only"),
        ({"nll_sums": [1.0, math.nan], "tokens": [1, 1]}, r"nll_sums\[1\] to be finite, got nan"),
        ({"nll_sums": [math.inf], "tokens": [1]}, r"nll_sums\[0\] to be finite, got inf"),
        ({"nll_sums": [1.0], "tokens": [-1]}, r"tokens\[0\] to be 0 or more, got -1"),
        # Sums of log p would give a perplexity of 0.05, and NLL of no tokens would count for the others.
        ({"nll_sums": [-210.0], "tokens": [70]}, r"nll_sums\[0\] to be a sum of -log p over 70 tokens, got -210\.0"),
        ({"nll_sums": [5.0, 100.0], "tokens": [0, 100]}, r"sum of -log p over 0 tokens, got 5\.0"),
        ({"nll_sums": [1.0, 2.0], "tokens": [1]}, "Mismatch in the number of nll_sums"),
        ({"nll_sums": [1.0], "tokens": [1], "byte_counts": [3, 4]}, "one for each of 1 documents"),
        ({"nll_sums": [1.0], "tokens": [1], "byte_counts": [0]}, "not all 0"),
        ({"nll_sums": [1.0, 1.0], "tokens": [1, 1], "byte_counts": [3, -1]}, "0 or more"),
    ],
)
def test_what_cannot_be_is_one_clear_line(
    metric: LongDocumentPerplexity, inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        metric.compute(**inputs)
    assert "\n" not in str(error.value)


def test_one_import_to_a_line() -> None:
    """`evaluate` takes `import a, b` for a package named `a,`."""
    lines = (FOLDER / "long_document_perplexity.py").read_text(encoding="utf-8").splitlines()
    imports = [line for line in lines if line.lstrip().startswith("import ")]
    assert len(imports) >= 4
    assert [line for line in imports if "," in line] == []


def test_the_example_of_the_card_is_true(metric: LongDocumentPerplexity) -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    values = metric.compute(nll_sums=[210.0, 96.0], tokens=[70, 30], byte_counts=[300, 125])
    perplexity, bits = (str(values[name])[:4] for name in ("perplexity", "bits_per_byte"))
    example = f"# {{'perplexity': {perplexity}..., 'bits_per_byte': {bits}..., 'n_tokens': 100, 'n_documents': 2}}"
    assert example in card
    for name in ("datasets", "evaluate", "numpy"):
        assert name in (FOLDER / "requirements.txt").read_text(encoding="utf-8")
