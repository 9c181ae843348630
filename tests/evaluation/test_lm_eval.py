"""Patched models in lm-evaluation-harness, on tasks of local files: `make test-lm-eval`.

Marked, and not part of `make test`: lm-eval brings some forty packages, 200 MB, that nothing else here needs.
"""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedModel

from hf_posext import find_patch, patch_model
from hf_posext.evaluation.scorer import TokenScorer

from ..conftest import EXAMPLES, TRAINED, tiny_llama
from ..helpers import ROOT
from .helpers import BOS, character_tokenizer, random_texts

pytestmark = pytest.mark.lm_eval

DOCS = ROOT / "docs" / "lm_eval.md"

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


RULER = (
    "niah_single_1 niah_single_2 niah_single_3 niah_multikey_1 niah_multikey_2 niah_multikey_3 niah_multiquery "
    "niah_multivalue ruler_fwe ruler_qa_squad ruler_qa_hotpot"
).split()
"""Tasks of the group but `ruler_vt` and `ruler_cwe`, which take minutes to write 500 prompts of 512 tokens."""


@pytest.fixture
def without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of this test in place of those that RULER's tasks download: essays, questions, a splitter of sentences."""
    import nltk
    import requests

    facts = [f"Fact {index}." for index in range(600)]
    asked = [{"question": "Which fact?", "answers": [{"text": fact}], "is_impossible": False} for fact in facts]
    pairs = list(zip(facts, asked, strict=True))
    squad = {"data": [{"paragraphs": [{"context": fact, "qas": [entry]}]} for fact, entry in pairs]}
    hotpot = [{"question": "Which fact?", "answer": fact, "context": [[fact, [fact]]]} for fact in facts]

    def get(url: str, **_: Any) -> Any:
        content = hotpot if "hotpot" in url else squad
        return SimpleNamespace(raise_for_status=lambda: None, json=lambda: content)

    load = datasets.load_dataset
    essays = {"text": [f"Essay {index} says this. It goes on for long." for index in range(400)]}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **kw: essays if "essays" in path else load(path, **kw))
    monkeypatch.setattr(requests, "get", get)
    monkeypatch.setattr(nltk, "sent_tokenize", lambda text: text.split(". "))


@pytest.mark.usefixtures("without_network")
def test_tasks_of_ruler_by_the_documented_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every task asks the model as it is and then under the patch, in whole prompts of the requested length."""
    from lm_eval.models.huggingface import HFLM

    asked: list[tuple[bool, int]] = []
    generate = HFLM._model_generate

    def watched(self: Any, context: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        asked.append((find_patch(self.model) is not None, context.shape[1]))
        return generate(self, context, *args, **kwargs)

    monkeypatch.setattr(HFLM, "_model_generate", watched)
    main = runpy.run_path(str(EXAMPLES / "lm_eval_bridge.py"))["main"]
    (command,) = re.findall(
        r"```bash\npython examples/lm_eval_bridge.py (--model[^`]*)```", DOCS.read_text(encoding="utf-8")
    )
    words = command.replace("\\\n", " ").split()
    for flag, value in {"--model": str(EXAMPLES / "tiny" / "tiny-rope"), "--max-length": "512"}.items():
        words[words.index(flag) + 1] = value
    begin = words.index("--ruler-lengths") + 1
    words[begin : begin + 2] = ["512"]
    begin = words.index("--tasks") + 1
    assert words[begin] == "ruler"
    words[begin : begin + 1] = RULER
    results = main([*words, "--limit", "1"])
    lengths: dict[bool, list[int]] = {False: [], True: []}
    for is_patched, length in asked:
        lengths[is_patched].append(length)
    assert lengths[False] == lengths[True] and len(lengths[True]) == len(RULER)
    assert all(64 < length <= 512 for length in lengths[True]), lengths
    for method in ("none", "yarn"):
        scores = [results[method][task]["512,none"] for task in RULER]
        assert all(0 <= score <= 1 for score in scores), "a task without a prompt of this length has -1"


def test_the_group_ruler_has_the_tasks_that_are_tried_here() -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(EXAMPLES / "lm_eval_tasks"), include_defaults=True)
    assert {"ruler"} | {*RULER, "ruler_vt", "ruler_cwe"} <= set(manager.all_tasks)
