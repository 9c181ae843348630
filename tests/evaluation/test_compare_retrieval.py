"""Retrieval in a comparison, and LongPPL and retrieval in its report."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import decoders

from hf_posext import patch_model
from hf_posext.errors import InvalidParameterError, JournalError
from hf_posext.evaluation import Results, compare, evaluate_perplexity, load_documents, retrieval
from hf_posext.evaluation.questions import Questions
from hf_posext.evaluation.results import RETRIEVAL_KEYS
from hf_posext.reporting import markdown_table, merge_runs, merged_grids, notes, print_tables, run_titles, write_report
from hf_posext.reporting.drawing import file_names, heatmap_files
from hf_posext.reporting.tables import grids

from ..conftest import tiny_llama, tiny_t5
from ..helpers import NOVELS, shipped_model, shipped_tokenizer
from ..reporting.helpers import make_results
from .helpers import character_tokenizer, random_texts

PIECES = shipped_tokenizer()
ASKED: dict[str, Any] = {"tasks": ["passkey", "common-words"], "depths": [0, 1]}
LENGTHS = [384, 640]
SHORT: dict[str, Any] = {"lengths": [140, 160], "trained_length": 64}
"""A run of a second."""


def run(**options: Any) -> Results:
    settings: dict[str, Any] = {"lengths": LENGTHS, "factor": 2.0, "retrieval": 1, **ASKED, **options}
    return compare(shipped_model(), PIECES, load_documents(NOVELS, limit=1), ["none", "yarn"], **settings)


@pytest.fixture(scope="module")
def found() -> Results:
    return run()


def test_rows_are_what_each_method_retrieves_by_itself(found: Results) -> None:
    model, expected = shipped_model(), []
    for method, factor in (("none", 1.0), ("yarn", 2.0)):
        with patch_model(model, method, factor=factor if method == "yarn" else None):
            rows = retrieval(model, PIECES, LENGTHS, trials=1, **ASKED)
        expected += [{"method": method, "factor": factor, **row} for row in rows]
    assert found.retrieval == expected
    assert [tuple(row) for row in found.retrieval] == [RETRIEVAL_KEYS] * len(expected)
    by_place = {(r["method"], r["length"], r["depth"]): r["accuracy"] for r in expected if r["task"] == "passkey"}
    assert by_place == {
        ("none", 384, 0.0): 1.0, ("none", 384, 1.0): 1.0, ("none", 640, 0.0): 0.0, ("none", 640, 1.0): 0.0,
        ("yarn", 384, 0.0): 1.0, ("yarn", 384, 1.0): 1.0, ("yarn", 640, 0.0): 1.0, ("yarn", 640, 1.0): 1.0,
    }, "what the extension is for"  # fmt: skip
    settings = {"trials": 1, "tasks": ("passkey", "common-words"), "depths": (0.0, 1.0)}
    assert found.provenance["retrieval"] == settings


def test_one_model_is_asked_the_same(found: Results) -> None:
    model = shipped_model()
    with patch_model(model, "yarn", factor=2):
        alone = evaluate_perplexity(model, PIECES, load_documents(NOVELS, limit=1), LENGTHS, retrieval=1, **ASKED)
    assert alone.retrieval == [row for row in found.retrieval if row["method"] == "yarn"]
    assert alone.provenance["retrieval"]["tasks"] == ("passkey", "common-words")


def test_results_are_read_again(found: Results, tmp_path: Path) -> None:
    path = found.save_json(tmp_path / "r.json")
    assert Results.load_json(path).retrieval == found.retrieval
    found.save_retrieval_csv(tmp_path / "r.csv")
    with (tmp_path / "r.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["accuracy"] for row in rows] == [str(row["accuracy"]) for row in found.retrieval]
    assert rows[2]["depth"] == "", "common words have none"
    data = json.loads(path.read_text())
    data["retrieval"][0]["trials"] = None
    path.write_text(json.dumps(data))
    with pytest.raises(Exception, match=r"retrieval\.0\.trials to be a whole number, got None"):
        Results.load_json(path)
    assert "retrieval" not in make_results().to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retrieval": -1}, "Expected retrieval to be a whole number from 0 to 10,000, got -1"),
        ({"retrieval": 0, "depths": None}, r"with tasks=\['passkey', 'common-words'\], got 0. Pass retrieval=4"),
        ({"retrieval": 0, "tasks": None}, r"retrieval to be 1 or more with depths=\[0, 1\], got 0. Pass retrieval=4"),
        ({"tasks": ["poetry"]}, "Expected tasks to be some of passkey, multi-key"),
        ({"depths": [0.5, 2]}, "Expected depths"),
        ({"lengths": [60, 640]}, "for a prompt of the task 'common-words', got 60. Leave out"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_measured(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("measured")

    monkeypatch.setattr("hf_posext.evaluation.scorer.TokenScorer.token_nll", read)
    with pytest.raises(InvalidParameterError, match=message):
        run(**options)


def test_who_does_not_continue_texts_is_not_asked() -> None:
    with pytest.raises(InvalidParameterError, match="retrieval to be 0, as T5For.* does not continue .*, got 2"):
        evaluate_perplexity(tiny_t5(), character_tokenizer(), random_texts(2, 200), [128], retrieval=2)


def test_a_task_that_fails_is_a_gap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answered = Questions.ask

    def ask(self: Questions, model: Any, tokenizer: Any, task: str, length: int) -> list[float]:
        if (task, length) == ("passkey", 160):
            raise torch.OutOfMemoryError("out of memory")
        return answered(self, model, tokenizer, task, length)

    undisturbed = run(**SHORT)
    monkeypatch.setattr(Questions, "ask", ask)
    results = run(**SHORT)
    failed = [(row["task"], row["length"]) == ("passkey", 160) for row in results.retrieval]
    assert [row["accuracy"] is None for row in results.retrieval] == failed and sum(failed) == 4
    accuracies = [row for row, gap in zip(undisturbed.retrieval, failed, strict=True) if not gap]
    assert [row for row in results.retrieval if row["accuracy"] is not None] == accuracies
    assert results.provenance["left_out"] == [
        {"retrieval": f"{name} on passkey at 160", "reason": "out of memory"} for name in ("none", "yarn x2")
    ]
    assert results.rows == undisturbed.rows
    (retrieved,) = [grid for grid in grids(results) if grid.title.startswith("Retrieval")]
    assert retrieved.rows[0] == ("passkey", ()) and retrieved.rows[1][1][1] == "-" != retrieved.rows[1][1][0]
    write_report(results, tmp_path)
    assert (tmp_path / "retrieval_yarn_x2.png").exists()


def test_nothing_is_asked_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = tmp_path / "journal.jsonl"
    first = run(journal=journal, **SHORT).retrieval
    kinds = [json.loads(line)["task"]["kind"] for line in journal.read_text().splitlines()[1:]]
    assert kinds == ["nll", *(["nll"] + ["retrieval"] * 4) * 2]
    monkeypatch.setattr(Questions, "ask", None)
    assert run(journal=journal, **SHORT).retrieval == first
    for change in ({"depths": [0]}, {"retrieval": 2}, {"tasks": ["passkey"]}, {"seed": 1}):
        with pytest.raises(JournalError):
            run(journal=journal, **SHORT, **change)


def test_answers_depend_on_the_end_of_an_answer_and_on_how_it_is_decoded(tmp_path: Path) -> None:
    """Neither changes a token of the documents, so that only the questions can tell."""
    model, tokenizer = tiny_llama(), character_tokenizer()
    read: dict[str, Any] = {"documents": random_texts(1, 200), "methods": ["none"], "lengths": [160], "passkey": 1}
    read["journal"] = tmp_path / "journal.jsonl"
    compare(model, tokenizer, **read)
    model.generation_config.eos_token_id = 5
    with pytest.raises(JournalError, match="eos is .* there and 5 here"):
        compare(model, tokenizer, **read)
    model.generation_config.eos_token_id = tiny_llama().generation_config.eos_token_id
    tokenizer.backend_tokenizer.decoder = decoders.Replace("1", "7")
    with pytest.raises(JournalError, match="prompts is"):
        compare(model, tokenizer, **read)


@pytest.fixture
def told() -> Results:
    """Rows made by hand, with LongPPL at the longest length and retrieval of two tasks."""
    results = make_results()
    for row in results.rows:
        row |= dict.fromkeys(("longppl", "longppl_ci95", "longppl_truncated", "key_tokens"))
        if row["length"] == 4096:
            row |= {"longppl": 5.25, "longppl_ci95": [4.5, 140.4], "longppl_truncated": 61.2, "key_tokens": 17}
    results.rows[-1]["longppl_ci95"] = None
    results.provenance["longppl"] = {"evaluator": "org/evaluator", "short_length": 256, "left_out": []}
    for name, factor in (("none", 1.0), ("yarn", 8.0)):
        for task, depths in (("passkey", (0.0, 1.0)), ("common-words", (None,))):
            for length in (512, 4096):
                for depth in depths:
                    row = {"method": name, "factor": factor, "task": task, "length": length, "depth": depth}
                    results.retrieval.append({**row, "accuracy": depth if task == "passkey" else 0.25, "trials": 4})
    return results


def test_tables_of_long_ppl_and_retrieval(told: Results) -> None:
    *_, longppl, _, retrieved = grids(told)
    assert longppl.title == "LongPPL: perplexity of the 17 key tokens that org/evaluator found"
    assert longppl.lengths == (4096,)
    assert longppl.rows[:2] == (("truncated to 512", ("61.2",)), ("none", ("5.25 [4.50, 140]",)))
    assert longppl.rows[-1] == ("yarn x8", ("5.25",))
    assert retrieved.rows == (
        ("passkey", ()), ("none", ("50 %", "-", "-", "50 %")), ("yarn x8", ("50 %", "-", "-", "50 %")),
        ("common-words", ()), ("none", ("25 %", "-", "-", "25 %")), ("yarn x8", ("25 %", "-", "-", "25 %")),
    )  # fmt: skip
    assert "| **passkey** |  |  |  |  |" in markdown_table(retrieved).splitlines()
    console = Console(width=80, record=True, file=io.StringIO())
    print_tables(told, console)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("truncated to 512") and line.endswith("61.2") for line in lines)
    for row in told.rows:
        row["longppl"] = None
    assert "No LongPPL: org/evaluator found no token that needs more than 256 tokens of context." in notes(told)


def test_the_report_shows_a_heat_map_of_each_method(told: Results, tmp_path: Path) -> None:
    text = write_report(told, tmp_path).read_text()
    for name, file in {"none": "retrieval_none.png", "yarn x8": "retrieval_yarn_x8.png"}.items():
        assert f"![{name}: share found by depth and length, a panel for each task]({file})" in text
        assert (tmp_path / file).read_bytes().startswith(b"\x89PNG")
    assert "- **LongPPL** (Fang et al., 2024)" in text and "- **Retrieval** asks" in text
    assert (tmp_path / "retrieval.csv").read_text().count("\n") == 1 + len(told.retrieval)
    assert "| longppl.evaluator | org/evaluator |" in text
    plain = write_report(make_results(), tmp_path / "plain").read_text()
    assert "LongPPL" not in plain and "etrieval" not in plain and len(list((tmp_path / "plain").glob("r*.csv"))) == 1


def test_files_are_named_after_methods_and_never_alike() -> None:
    names = ["rerope(window=384)", "rerope(window:384)", "a/../b", "ntk"]
    rows = [{"method": name, "factor": 2.0} for name in names]
    files = heatmap_files(Results(retrieval=rows))
    assert list(files.values()) == [
        "retrieval_rerope_window_384_x2-1.png",
        "retrieval_rerope_window_384_x2-2.png",
        "retrieval_a_.._b_x2.png",
        "retrieval_ntk_x2.png",
    ]
    for titles in (["a", "a", "a-1"], ["A", "a"], ["\u5b57", "\u8bcd", "-1"], ["x" * 300, "x" * 301]):
        stems = file_names(titles)
        assert len({stem.lower() for stem in stems}) == len(titles), "also on systems that ignore case"
        assert max(map(len, stems)) < 110


def test_merged_runs_keep_what_was_retrieved(told: Results) -> None:
    plain = make_results()
    plain.provenance["longppl"] = told.provenance["longppl"]
    (merged,) = merge_runs({"a": told, "b": plain, "c": told})
    assert merged.retrieval == told.retrieval
    apart = make_results()
    apart.provenance["longppl"] = {**told.provenance["longppl"], "evaluator": "other"}
    runs = merge_runs({"a": told, "b": apart})
    titles = run_titles(runs)
    assert titles == [
        f"tiny|rope (longppl by {evaluator} with short_length 256)" for evaluator in ("org/evaluator", "other")
    ]
    retrieved = merged_grids(runs, titles)[-1]
    assert [name for name, cells in retrieved.rows if not cells] == [titles[0], "passkey", "common-words"]
