"""Patched models in lm-evaluation-harness, on tasks of local files: `make test-lm-eval`.

Marked, and not part of `make test`: lm-eval brings some forty packages, 200 MB, that nothing else here needs.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedModel

from hf_posext import patch_model
from hf_posext.evaluation.scorer import TokenScorer

from ..conftest import EXAMPLES, TRAINED, tiny_llama
from .helpers import BOS, character_tokenizer, random_texts

pytestmark = pytest.mark.lm_eval

WINDOW = 4 * TRAINED
TEXTS = [*random_texts(2, 3 * WINDOW + 40), "Short."]
TASK = """
task: local_texts
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: byte_perplexity
metadata:
  version: 1.0
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one task on one small JSON-lines file."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "local_texts.yaml").write_text(TASK.format(path=data), encoding="utf-8")
    return folder


def log_likelihoods(model: PreTrainedModel, tasks: Path) -> list[float]:
    """Log-likelihoods of lm-eval for each text."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model, tokenizer=character_tokenizer(), max_length=WINDOW, batch_size=1)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    report = simple_evaluate(model=lm, tasks=["local_texts"], task_manager=manager, bootstrap_iters=0)
    samples: list[dict[str, Any]] = sorted(report["samples"]["local_texts"], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"][0] for sample in samples]


def ours(model: PreTrainedModel, text: str) -> float:
    """The same windows with our scorer: disjoint ones, the last reaching back so that it is as long as the others."""
    scorer = TokenScorer(model)
    ids = torch.tensor([BOS, *character_tokenizer()(text, add_special_tokens=False)["input_ids"]])
    total = 0.0
    for begin in range(1, len(ids), WINDOW):
        end = min(begin + WINDOW, len(ids))
        row = ids[max(0, end - 1 - WINDOW) : end]
        nll = scorer.token_nll(row[None], first=len(row) - (end - begin))
        assert nll.shape[1] == end - begin
        total -= float(nll.double().sum())
    return total


def test_a_patched_model_is_scored_as_we_score_it(tasks: Path) -> None:
    model = tiny_llama()
    without = log_likelihoods(model, tasks)
    assert without == pytest.approx([ours(model, text) for text in TEXTS], rel=1e-6)
    with patch_model(model, "yarn", factor=4):
        patched = log_likelihoods(model, tasks)
        # lm-eval sums each window in float32, over up to 256 tokens of about 5 nats: some 1e-7 of the sum.
        assert patched == pytest.approx([ours(model, text) for text in TEXTS], rel=1e-6)
    assert len(patched) == len(TEXTS) == 3
    assert min(abs(a - b) for a, b in zip(without, patched, strict=True)) > 1e-2, "the patch changes every text"
    assert log_likelihoods(model, tasks) == without, "undone to the bit"


def test_lm_eval_reads_the_longer_limit_from_the_patched_config() -> None:
    """Three lines are enough: nobody has to repeat the length."""
    from lm_eval.models.huggingface import HFLM

    model = tiny_llama()
    assert HFLM(pretrained=model, tokenizer=character_tokenizer()).max_length == TRAINED
    with patch_model(model, "yarn", factor=4):
        assert HFLM(pretrained=model, tokenizer=character_tokenizer()).max_length == 4 * TRAINED


def test_the_example(tasks: Path) -> None:
    main = runpy.run_path(str(EXAMPLES / "lm_eval_bridge.py"))["main"]
    where = ["--model", str(EXAMPLES / "tiny" / "tiny-rope"), "--include-path", str(tasks), "--tasks", "local_texts"]
    report = main([*where, "--max-length", "1024", "--limit", "1"])
    none, yarn = (report[method]["local_texts"]["byte_perplexity,none"] for method in ("none", "yarn"))
    assert none != yarn


def test_the_task_of_the_example_reads_the_novels() -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(EXAMPLES / "lm_eval_tasks"), include_defaults=False)
    assert manager.all_tasks == ["heldout_novels"]
