"""`compare`: what a run writes and says, and what is kept of one that does not end."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import hf_posext.evaluation
from hf_posext.errors import EvaluationError, NonFiniteError
from hf_posext.evaluation import Results
from hf_posext.evaluation.windows import Prefix
from hf_posext.patching import find_patch

from .helpers import LEARNED, MODEL, NOVELS, break_at, compare, error_of, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    output = tmp_path_factory.mktemp("compare") / "out"
    return compare(output, passkey=2), output


def test_compare_writes_a_report_that_parses(finished: tuple[Any, Path]) -> None:
    result, output = finished
    assert result.exit_code == 0, result.output
    assert {path.name for path in output.iterdir()} == {
        "README.md",
        "gain_by_position.png",
        "journal.jsonl",
        "perplexity.png",
        "results.csv",
        "results.json",
    }
    rows = Results.load_json(output / "results.json").rows
    cells = [(row["method"], row["factor"], row["length"]) for row in rows]
    factors = {"none": 1.0, "linear": 2.0, "yarn": 2.0}
    assert cells == [(name, factor, length) for name, factor in factors.items() for length in (64, 128)]
    assert all(row["documents"] == 2 and row["gain"] > 0 and row["passkey_trials"] == 2 for row in rows)
    assert (output / "results.csv").read_text().count("\n") == 1 + len(rows)


def test_compare_ends_with_a_table_of_80_columns_and_the_path_of_the_report(finished: tuple[Any, Path]) -> None:
    result, output = finished
    *table, last = result.stdout.splitlines()
    assert last == f"report: {output / 'README.md'}"
    assert max(map(len, table)) <= 80
    assert table[0].startswith("Short-context check"), "what happens inside the trained length comes first"
    assert sum(line.startswith("yarn x2") for line in table) == 5
    assert sum(line.startswith("truncated to 64") for line in table) == 1


def test_results_go_to_a_tracker_that_is_there(tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert compare(output, documents=1, methods="none", log_with="tensorboard").exit_code == 0
    events = EventAccumulator(str(output / "hf_posext"))
    events.Reload()
    events_of_none = [(event.step, event.value) for event in events.Scalars("perplexity/none-x1")]
    rows = Results.load_json(output / "results.json").rows
    assert events_of_none == [(row["length"], np.float32(row["perplexity"])) for row in rows]
    message = error_of(compare(tmp_path / "other", log_with="tensorbord"))
    assert "Expected --log-with to be a tracker that is installed (" in message
    assert "tensorboard), got 'tensorbord'." in message


def test_the_command_in_the_provenance_measures_the_same_again(finished: tuple[Any, Path], tmp_path: Path) -> None:
    _, output = finished
    first = Results.load_json(output / "results.json")
    _, *words = first.provenance["command"].split()
    words[words.index("--output") + 1] = str(tmp_path / "again")
    assert run(*words).exit_code == 0
    assert Results.load_json(tmp_path / "again" / "results.json").rows == first.rows


def test_paths_inside_the_working_directory_are_told_relative_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(NOVELS.parent.parent)
    assert compare(tmp_path / "out", methods="none", documents=1).exit_code == 0
    provenance = Results.load_json(tmp_path / "out" / "results.json").provenance
    assert provenance["model"] == "tiny/tiny-rope" and provenance["dataset"] == "data/heldout.jsonl"
    assert "--model tiny/tiny-rope --dataset data/heldout.jsonl" in provenance["command"]


def test_methods_of_other_schemes_are_listed_with_the_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_posext"):
        result = compare(tmp_path / "out", methods="yarn,none,table-linear,alibi-linear", documents=1)
    assert result.exit_code == 0, result.output
    results = Results.load_json(tmp_path / "out" / "results.json")
    assert [row["method"] for row in results.rows] == ["none", "none", "yarn", "yarn"]
    assert results.provenance["not_applicable"] == {
        "table-linear": "table-linear extends learned positions; llama has rotary",
        "alibi-linear": "alibi-linear extends alibi positions; llama has rotary",
    }
    reason = "Left out: table-linear (extends learned positions; llama has rotary)."
    assert reason in " ".join(result.stdout.split()) and reason in (tmp_path / "out" / "README.md").read_text()
    assert "left out: table-linear (extends learned positions; llama has rotary)" in caplog.messages


def test_a_model_of_another_scheme_runs_what_applies_to_it(tmp_path: Path) -> None:
    result = compare(tmp_path / "out", model=LEARNED, methods="none,yarn,table-linear", documents=1)
    assert result.exit_code == 0, result.output
    results = Results.load_json(tmp_path / "out" / "results.json")
    assert [row["method"] for row in results.rows] == ["none"] * 2 + ["table-linear"] * 2
    assert (results.provenance["kind"], results.provenance["generalization"]) == ("learned", "none")
    assert results.provenance["model_type"] == "gpt2" and list(results.provenance["not_applicable"]) == ["yarn"]


def test_hyper_parameters_are_given_in_brackets_and_label_the_rows(tmp_path: Path) -> None:
    methods = "none,rerope(window=48), yarn(beta_fast=16, beta_slow=2)+log-n,yarn,yarn(factor=4)"
    result = compare(tmp_path / "out", methods=methods, documents=1, lengths="128")
    assert result.exit_code == 0, result.output
    results = Results.load_json(tmp_path / "out" / "results.json")
    assert [(row["method"], row["factor"]) for row in results.rows] == [
        ("none", 1.0),
        ("rerope(window=48)", 2.0),
        ("yarn(beta_fast=16, beta_slow=2)+log-n", 2.0),
        ("yarn", 2.0),
        ("yarn", 4.0),
    ]
    assert "rerope(window=48)" in results.provenance["command"]
    assert "No short-context check: no length up to 64 was measured." in result.stdout


def test_flags_go_before_the_config_file(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {MODEL}\ndataset: {NOVELS}\nmethods: [linear, yarn]\nlengths: [64, 96]\ntrained-length: 64\n"
        "factor: 2\ndocuments: 1\nseed: 7\nsplit:\n"
    )
    result = run("compare", "--config", config, "--methods", "none", "--seed", 0, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    results = Results.load_json(tmp_path / "out" / "results.json")
    assert [(row["method"], row["length"]) for row in results.rows] == [("none", 64), ("none", 96)]
    assert results.provenance["seed"] == 0 and results.rows[0]["documents"] == 1
    assert "--lengths 64,96" in results.provenance["command"] and "--config" not in results.provenance["command"]


def test_numbers_of_a_config_file_are_those_of_the_command_line(tmp_path: Path) -> None:
    """YAML 1.1 reads 010 as 8 and 1:30 as 90. Typed as flags, they are 10 and an error."""
    config = tmp_path / "run.yaml"
    text = f"model: {MODEL}\ndataset: {NOVELS}\nmethods: none\ndocuments: 1\n"
    config.write_text(f"{text}lengths: [064]\nstart: 010\n")
    result = run("compare", "--config", config, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    provenance = Results.load_json(tmp_path / "out" / "results.json").provenance
    assert provenance["lengths"] == [64] and provenance["start"] == 10
    config.write_text(f"{text}lengths: 1:30\n")
    result = run("compare", "--config", config, "--output", tmp_path / "other")
    assert "Expected whole numbers separated by commas, got --lengths 1:30" in error_of(result)


def test_ctrl_c_keeps_what_is_finished_and_restores_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = break_at(monkeypatch, "yarn", KeyboardInterrupt())
    result = compare(tmp_path / "out")
    assert result.exit_code == 130
    message = f"Interrupted. Finished and kept in {tmp_path / 'out'}: none, linear. Pass --resume to go on."
    assert result.stderr.splitlines()[-1] == message
    results = Results.load_json(tmp_path / "out" / "results.json")
    assert [row["method"] for row in results.rows] == ["none", "none", "linear", "linear"]
    assert "`linear x2`" in (tmp_path / "out" / "README.md").read_text()
    assert not hasattr(models[0], "_posext_patch") and models[0].config.max_position_embeddings == 512


def test_ctrl_c_before_a_method_is_finished_keeps_the_part_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_at(monkeypatch, "none", KeyboardInterrupt())
    result = compare(tmp_path / "out")
    assert result.exit_code == 130
    message = f"Interrupted. A part is kept in {tmp_path / 'out'}. Pass --resume to go on."
    assert result.stderr.splitlines()[-1] == message
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["journal.jsonl"]


def test_ctrl_c_before_anything_is_finished_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Prefix, "measure", interrupt)
    result = compare(tmp_path / "out")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "Interrupted. Nothing was finished or written."
    assert not (tmp_path / "out").exists()


def test_an_error_on_the_way_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_at(monkeypatch, "yarn", EvaluationError("two ways disagree"))
    message = error_of(compare(tmp_path / "out"))
    advice = f"Finished and kept in {tmp_path / 'out'}: none, linear. Pass --resume to go on."
    assert message == f"error: two ways disagree. {advice}"
    assert len(Results.load_json(tmp_path / "out" / "results.json").rows) == 4


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_posext.evaluation.Results, "save_json", full)
    assert "No space left on device" in error_of(compare(tmp_path / "out"))


def test_a_method_that_breaks_is_left_out_with_the_reason_and_its_traceback_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    break_at(monkeypatch, "yarn", ZeroDivisionError("a bug"))
    result = compare(tmp_path / "out")
    assert result.exit_code == 0
    reason = "Left out: yarn x2 (failed on every document: ZeroDivisionError: a bug)."
    assert reason in " ".join(result.stdout.split()) and reason in (tmp_path / "out" / "README.md").read_text()
    rows = Results.load_json(tmp_path / "out" / "results.json").rows
    assert [row["method"] for row in rows] == ["none", "none", "linear", "linear"]
    assert "ZeroDivisionError: a bug" in caplog.text and "break_or_read" in caplog.text


def test_a_run_goes_on_from_its_journal_and_ends_with_the_same_rows(
    finished: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        break_at(patched, "yarn", KeyboardInterrupt())
        assert compare(output, passkey=2).exit_code == 130
    refused = error_of(compare(output, passkey=2))
    assert refused == (
        f"error: Expected no journal of another run, got one in {output}. Pass --resume to go on with it, or another "
        "--output."
    )
    message = error_of(compare(output, "--resume", passkey=2, seed=1))
    assert "got that of another run in" in message and "seed is 0 there and 1 here" in message
    models = break_at(monkeypatch, "no method", KeyboardInterrupt())
    result = compare(output, "--resume", passkey=2)
    assert result.exit_code == 0, result.output
    assert len(models) == 2, "the two documents of the method that was interrupted"
    undisturbed = Results.load_json(finished[1] / "results.json")
    again = Results.load_json(output / "results.json")
    assert again.rows == undisturbed.rows and again.per_document == undisturbed.per_document
    assert "--resume" not in again.provenance["command"]
    models.clear()
    assert compare(output, "--resume", passkey=2).exit_code == 0 and models == []


def test_resume_begins_a_run_that_was_never_begun(tmp_path: Path) -> None:
    assert compare(tmp_path / "out", "--resume", methods="none", documents=1).exit_code == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("precious")
    message = error_of(compare(tmp_path / "other", "--resume", methods="none", documents=1))
    assert "with files and no journal to go on with. Pass another --output" in message


def test_a_document_that_fails_is_left_out_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Prefix.measure

    def fail_or_read(self: Prefix, scorer: Any, documents: Any, index: int, *lengths: Any) -> Any:
        patch = find_patch(scorer.model)
        if index == 1 and patch is not None and patch.plan.method == "linear":
            raise NonFiniteError(f"Expected finite logits in document {documents.ids[1]!r}")
        return read(self, scorer, documents, index, *lengths)

    monkeypatch.setattr(Prefix, "measure", fail_or_read)
    result = compare(tmp_path / "out", documents=3)
    assert result.exit_code == 0, result.output
    results = Results.load_json(tmp_path / "out" / "results.json")
    assert {row["documents"] for row in results.rows} == {2} and len(results.rows) == 6
    (entry,) = results.provenance["left_out"]
    name = entry["document"]
    assert entry["reason"] == f"linear x2: Expected finite logits in document {name!r}" and entry["tokens"] > 128
    assert name not in {record["document"] for record in results.per_document}
    reason = f"Left out: document {name} (linear x2: Expected finite logits in document {name!r})."
    assert reason in " ".join(result.stdout.split()) and reason in (tmp_path / "out" / "README.md").read_text()
