"""The cells of the public model equal `compare`'s numbers; the result file resumes, and its page invents nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hf_posext import Results, compare, load_documents

from ..helpers import NOVELS, TINY

TRAINED, LENGTH, START = 512, 1024, 2000
METHODS = ["none", "yarn", "rerope(window=480)"]


@pytest.fixture(scope="module")
def script(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("public_model")


@pytest.fixture(scope="module")
def page(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("public_model_page")


@pytest.fixture(scope="module")
def result(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of two novels, measured in three runs: the second continues, and the third adds a method."""
    path = tmp_path_factory.mktemp("public") / "public_model.json"
    for documents, methods in (("0", METHODS[:2]), ("01", METHODS[:2]), ("01", METHODS)):
        run(script, path, documents, methods)
    return path


def run(script: ModuleType, path: Path, documents: str, methods: list[str]) -> None:
    options = ["--documents", *documents, "--lengths", str(LENGTH), "--methods", *methods]
    script.main(["--model", str(TINY), *options, "--start", str(START), "--output", str(path)])


@pytest.fixture(scope="module")
def compared(script: ModuleType) -> Results:
    model, tokenizer, _ = script.open_model(str(TINY))
    lengths = [TRAINED, LENGTH]
    novels = load_documents(NOVELS)[:2]
    return compare(model, tokenizer, novels, METHODS, lengths=lengths, factor=LENGTH / TRAINED, start=START)


def test_cells_are_the_records_of_compare(result: Path, compared: Results) -> None:
    """Every field of every cell, to the bit; the first half of the sums by stretch is what compare tells at 512."""
    cells = {(cell["document"], cell["asked"]): cell for cell in read(result)["cells"]}
    records = {(record["document"], record["method"], record["length"]): record for record in compared.per_document}
    assert len(cells) == 2 * (1 + len(METHODS)) and len(records) == 2 * len(cells)
    for (document, method), cell in cells.items():
        record = records[document, method, LENGTH]
        assert {key: cell[key] for key in record} == record
        inside = records[document, method, TRAINED]["nll_sum"]
        assert sum(cell["position_nll_sums"][:8]) == pytest.approx(inside, rel=1e-12)


def test_tables_tell_what_compare_tells(result: Path, page: ModuleType, compared: Results) -> None:
    cells = page.Cells(read(result), NOVELS.name, LENGTH)
    for method in METHODS:
        row = compared.row(method, LENGTH)
        gain, interval, documents = cells.gain(method)
        assert documents == 2
        assert gain == pytest.approx(row["gain"], rel=1e-12) and interval == pytest.approx(row["gain_ci95"], rel=1e-12)
        assert cells.change(method) == pytest.approx(compared.row(method, TRAINED)["change"], abs=1e-12)


def test_the_long_question_is_as_long_as_it_says(script: ModuleType) -> None:
    """The template's own tokens around an excerpt of the novel, and the key a quarter of the way into it."""
    _, tokenizer, _ = script.open_model(str(TINY))
    tokenizer.chat_template = "{% for each in messages %}<user>{{ each.content }}<end>{% endfor %}<assistant>"
    novel = load_documents(NOVELS)[0]
    ids = script.prompt(tokenizer, novel, "48213", 700, START)
    assert len(ids) == 700
    text = tokenizer.decode(ids)
    begin, needle = len("<user>"), text.index("The pass key is 48213.")
    assert text.startswith("<user>") and text.endswith(f"{script.QUESTION}<end><assistant>")
    assert text[begin:needle].strip() in novel.text
    assert 0.2 < needle / len(text) < 0.3


def test_an_answer_is_asked_once(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, methods_asked = tmp_path / "public_model.json", []

    def answer(model: Any, tokenizer: Any, document: Any, method: str, tokens: int, *counts: Any) -> dict[str, Any]:
        methods_asked.append(method)
        return {"document": document.id, "asked": method, "tokens": tokens}

    monkeypatch.setattr(script, "answer", answer)
    for methods in (["none"], ["none", "yarn"]):
        script.main(["--model", str(TINY), "--answers", *methods, "--output", str(path)])
    assert methods_asked == ["none", "yarn"] and len(read(path)["answers"]) == 2


def test_questions_are_asked_once_and_stand_in_the_page(
    script: ModuleType, page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, questions_asked = tmp_path / "public_model.json", []

    def share(questions: Any, model: Any, tokenizer: Any, task: str | None, length: int) -> list[float]:
        questions_asked.append(
            (task, length, hasattr(model, "_posext_patch") or bool(model.config.rope_parameters.get("factor")))
        )
        return [0.5]

    monkeypatch.setattr(script.Questions, "ask", share)
    rules = ["--questions", "passkey", "multi-key", "--lengths", "512", "1024", "--output", str(path)]
    for methods in (["none"], ["none", "yarn"]):
        script.main(["--model", str(TINY), "--methods", *methods, *rules])
    assert questions_asked == [
        *((task, length, False) for task in (None, "multi-key") for length in (512, 1024)),
        *((task, length, True) for task in (None, "multi-key") for length in (512, 1024)),
    ]
    table = page.questions_table(read(path)).splitlines()
    assert table[2] == "| passkey | `none` | 50% of 4 [15%, 85%] | 50% of 4 [15%, 85%] |"
    assert [line.split(" | ")[1] for line in table[2:]] == ["`none`", "`yarn`"] * 2


def test_the_summary_names_what_is_above_one(result: Path, page: ModuleType, compared: Results) -> None:
    summary = page.Cells(read(result), NOVELS.name, LENGTH).summary()
    above = [method for method in METHODS if compared.row(method, LENGTH)["gain"] >= 1]
    assert above and all(f"`{method}`" in summary for method in above) and "`none`" not in summary


def test_a_finished_cell_is_not_measured_again(
    result: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, cells = result.read_text(encoding="utf-8"), []

    def measure(model: Any, tokenizer: Any, document: Any, method: str, *settings: Any) -> list[dict[str, Any]]:
        cells.append((document.id, method))
        return []

    monkeypatch.setattr(script, "measure", measure)
    run(script, result, "01", METHODS)
    assert not cells
    run(script, result, "012", [*METHODS, "ntk"])
    ids = [document.id for document in load_documents(NOVELS)[:3]]
    assert sorted(cells) == sorted([*((id, "ntk") for id in ids), *((ids[2], method) for method in METHODS)])
    assert json.loads(before)["cells"] == read(result)["cells"]


def test_two_processes_add_to_one_file(script: ModuleType, tmp_path: Path) -> None:
    path, model = tmp_path / "public_model.json", {"name": "some"}
    books = [script.Book(path, model) for _ in range(2)]
    for number in range(4):
        books[number % 2].add([{"document": str(number), "asked": "none", "length": 8}])
    content = read(path)
    assert [cell["document"] for cell in content["cells"]] == list("0123")
    assert len(content["runs"]) == 1 and {cell["run"] for cell in content["cells"]} == {0}
    assert set(content["runs"][0]) >= {"commit", "dirty", "versions", "processor", "date"}


@pytest.mark.parametrize(("key", "value"), [("schema", 0), ("model", {"name": "another"})])
def test_a_file_of_something_else_is_refused(script: ModuleType, tmp_path: Path, key: str, value: Any) -> None:
    path, model = tmp_path / "public_model.json", {"name": "some"}
    script.Book(path, model).add([])
    path.write_text(json.dumps({**read(path), key: value}), encoding="utf-8")
    with pytest.raises(SystemExit, match=f"Expected {key}"):
        script.Book(path, model)


def test_missing_cells_are_named_and_not_invented(result: Path, page: ModuleType) -> None:
    content = read(result)
    last = content["cells"][-1]["document"]
    content["cells"] = [cell for cell in content["cells"] if (cell["document"], cell["asked"]) != (last, "yarn")]
    cells = page.Cells(content, NOVELS.name, LENGTH)
    (line,) = [line for line in cells.table().splitlines() if line.startswith("| `yarn`")]
    assert page.LACKS in line
    lines = cells.missing(2)
    assert lines[0] == "1 of 2 novels: `yarn`"
    (last_line,) = lines[1:]
    assert last_line.startswith("2 of 2 novels: ") and "`ntk`" in last_line and "`none`" not in last_line
    assert page.Cells(content, NOVELS.name, 2 * LENGTH).gain("yarn") is None


def test_the_page_names_what_is_missing(page: ModuleType) -> None:
    text = page.render()
    content = read(page.RESULT)
    for length, goal in page.GOALS.items():
        cells = page.Cells(content, page.HELD_OUT, length)
        assert all(sentence in text for sentence in cells.missing(goal))


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
