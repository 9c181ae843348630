"""The command line, on the shipped model pretending to be trained on 64 tokens, so that every run takes a second."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers
from typer.testing import CliRunner

import hf_posext.evaluation
from hf_posext.cli import app
from hf_posext.errors import EvaluationError
from hf_posext.evaluation import Results

from .conftest import EXAMPLES

MODEL, NOVELS = EXAMPLES / "tiny" / "tiny-rope", EXAMPLES / "data" / "heldout.jsonl"
OPTIONS: dict[str, Any] = {
    "model": MODEL,
    "dataset": NOVELS,
    "methods": "none,linear,yarn",
    "original-length": 64,
    "factor": 2,
    "lengths": "64,128",
    "documents": 2,
}


@pytest.fixture(autouse=True)
def loud_again() -> Iterator[None]:
    """The commands silence these two for the rest of the process; other tests listen to them."""
    levels = transformers.logging.get_verbosity(), datasets.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(levels[0])
    datasets.logging.set_verbosity(levels[1])


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def compare(output: Path, **changed: Any) -> Any:
    """`compare` with the options above, some of them changed, or left out where `None`."""
    options = {**OPTIONS, **{name.replace("_", "-"): value for name, value in changed.items()}, "output": output}
    words = [word for name, value in options.items() if value is not None for word in (f"--{name}", value)]
    return run("compare", *words)


def error_of(result: Any) -> str:
    """The one line on standard error of a refused input."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and result.stderr.splitlines()[-1] == lines[0], result.stderr
    assert "Traceback" not in result.output and result.stdout == ""
    return lines[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    output = tmp_path_factory.mktemp("compare") / "out"
    return compare(output, passkey=2), output


def test_compare_writes_a_report_that_parses(finished: tuple[Any, Path]) -> None:
    result, output = finished
    assert result.exit_code == 0, result.output
    assert {path.name for path in output.iterdir()} == {"README.md", "perplexity.png", "results.csv", "results.json"}
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
    assert sum(line.startswith("yarn x2") for line in table) == 3
    assert sum(line.startswith("truncated to 64") for line in table) == 1


def test_the_command_in_the_provenance_measures_the_same_again(finished: tuple[Any, Path], tmp_path: Path) -> None:
    _, output = finished
    first = Results.load_json(output / "results.json")
    _, *words = first.provenance["command"].split()
    words[words.index("--output") + 1] = str(tmp_path / "again")
    assert run(*words).exit_code == 0
    assert Results.load_json(tmp_path / "again" / "results.json").rows == first.rows


def test_flags_go_before_the_config_file(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {MODEL}\ndataset: {NOVELS}\nmethods: [linear, yarn]\nlengths: [64, 96]\noriginal-length: 64\n"
        "factor: 2\ndocuments: 1\nseed: 7\nsplit:\n"
    )
    result = run("compare", "--config", config, "--methods", "none", "--seed", 0, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    results = Results.load_json(tmp_path / "out" / "results.json")
    assert [(row["method"], row["length"]) for row in results.rows] == [("none", 64), ("none", 96)]
    assert results.provenance["seed"] == 0 and results.rows[0]["documents"] == 1
    assert "--lengths 64,96" in results.provenance["command"] and "--config" not in results.provenance["command"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"methods": "none,yran"}, "unknown method 'yran'; did you mean 'yarn'?"),
        ({"methods": ","}, "methods is ','; give at least one name"),
        ({"methods": "yarn,yarn"}, "more than once"),
        ({"factor": 0}, "factor is 0"),
        ({"factor": "nan"}, "factor is nan"),
        ({"factor": "inf"}, "factor is inf"),
        ({"factor": "eight"}, "Invalid value for '--factor': "),
        ({"factor": None}, "needs factor= or target_length="),
        ({"factor": 0.5}, "below the trained length of 64"),
        ({"factor": None, "target_length": 32}, "below the trained length of 64"),
        (
            {"model": EXAMPLES / "tiny" / "tiny-alibi"},
            "linear extends rotary positions; bloom has alibi; what applies: none",
        ),
        ({"model": "./no/such/model"}, "no such folder: ./no/such/model"),
        ({"model": EXAMPLES / "data"}, "cannot load"),
        ({"dataset": "no/such.jsonl"}, "no such path: no/such.jsonl"),
        ({"text_column": "body"}, "no column 'body'; it has id, source, text"),
        ({"documents": 0}, "limit is 0"),
        ({"lengths": "64,128k"}, "lengths is '64,128k'"),
        ({"lengths": "1"}, "2 or more"),
        ({"lengths": "64,10000000"}, "10000000"),
        ({"protocol": "prefixx"}, "protocol is 'prefixx'; choose one of prefix, sliding"),
        ({"stride": 8}, "protocol 'prefix' has none"),
        ({"protocol": "sliding", "stride": 64}, "stride"),
        ({"passkey": -1}, "'--passkey'"),
        ({"passkey": 1, "lengths": "16"}, "pass keys need at least"),
        ({"start": -1}, "start is -1"),
        ({"dtype": "int8"}, "'int8' is not one of 'float32', 'bfloat16', 'float16'"),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
        ({"metods": "none"}, "--metods"),
        ({"model": None}, "Missing option '--model'"),
        ({"config": "no.yaml"}, "no.yaml"),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_wrong_input_is_one_line_and_exit_code_2(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    assert message in error_of(compare(output, **changed))
    assert not output.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metods: none", "unknown setting 'metods' in"),
        ("metods: none", "did you mean 'methods'?"),
        ("config: other.yaml", "unknown setting 'config'"),
        ("factor: [2, 4]", "factor in"),
        ("lengths: [64, [128]]", "give a list of plain values"),
        ("methods: {yarn: 8}", "give a list of plain values"),
        ("passkey: true", "passkey in"),
        ("factor: eight", "Invalid value for '--factor': "),
        ("documents: 2.5", "Invalid value for '--documents': "),
        ("- none", "holds list; give settings, a line each"),
        ("", "holds NoneType; give settings, a line each"),
        ("factor: [2", "is not YAML"),
    ],
)
def test_wrong_config_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(text)
    result = compare(tmp_path / "out", config=config, factor=None, documents=None)
    assert message in error_of(result)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty.jsonl", "", "empty.jsonl"),
        ("number.jsonl", '{"text": 3}\n', "not text"),
        ("torn.jsonl", '{"text": "a b', "cannot read"),
        ("short.jsonl", '{"text": "Call me Ishmael."}\n', "128"),
        ("notes.docx", "text", "ends in '.docx'"),
    ],
)
def test_data_that_cannot_be_measured_is_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert message in error_of(compare(tmp_path / "out", dataset=tmp_path / name))


def test_broken_weights_are_refused(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\0" * 100)
    assert "cannot load" in error_of(compare(tmp_path / "out", model=tmp_path / "model"))


def test_an_encoder_is_refused_with_what_it_has(tmp_path: Path) -> None:
    transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    assert "yarn extends rotary positions; bert has learned" in error_of(
        compare(tmp_path / "out", model=tmp_path, methods="yarn")
    )


def test_an_output_with_files_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("precious")
    assert "holds files already" in error_of(compare(tmp_path))
    assert (tmp_path / "results.json").read_text() == "precious"


def test_an_output_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write to output" in error_of(compare(tmp_path / "file" / "out"))


def test_an_output_without_write_permission_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:  # a mode would not do: tests may run as root, who may write anywhere
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    # The model does not exist either: the output is looked at first.
    message = error_of(compare(tmp_path / "out", model="./no/such/model"))
    assert "cannot write to output" in message and "Permission denied" in message


def break_at(monkeypatch: pytest.MonkeyPatch, method: str, error: BaseException) -> list[Any]:
    """Makes the measurement of one method raise; gives a list that gets the models that were measured."""
    module = sys.modules["hf_posext.evaluation.compare"]
    measure = module.measure_method
    models: list[Any] = []

    def break_or_measure(setup: Any, name: str, *args: Any) -> Any:
        models.append(setup.scorer.model)
        if name == method:
            raise error
        return measure(setup, name, *args)

    monkeypatch.setattr(module, "measure_method", break_or_measure)
    return models


def test_ctrl_c_keeps_what_is_finished_and_restores_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = break_at(monkeypatch, "yarn", KeyboardInterrupt())
    result = compare(tmp_path / "out")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == f"interrupted; finished and kept in {tmp_path / 'out'}: none, linear"
    results = Results.load_json(tmp_path / "out" / "results.json")
    assert [row["method"] for row in results.rows] == ["none", "none", "linear", "linear"]
    assert "`linear x2`" in (tmp_path / "out" / "README.md").read_text()
    assert not hasattr(models[0], "_posext_patch") and models[0].config.max_position_embeddings == 512


def test_ctrl_c_before_anything_is_finished_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_at(monkeypatch, "none", KeyboardInterrupt())
    result = compare(tmp_path / "out")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted; no method was finished, nothing was written"
    assert not (tmp_path / "out").exists()


def test_an_error_on_the_way_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_at(monkeypatch, "yarn", EvaluationError("logits of 'a' are not finite"))
    message = error_of(compare(tmp_path / "out"))
    assert message == f"error: logits of 'a' are not finite; finished and kept in {tmp_path / 'out'}: none, linear"
    assert len(Results.load_json(tmp_path / "out" / "results.json").rows) == 4


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_posext.evaluation.Results, "save_json", full)
    assert "No space left on device" in error_of(compare(tmp_path / "out"))


def test_an_unforeseen_error_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_at(monkeypatch, "yarn", ZeroDivisionError("a bug"))
    assert isinstance(compare(tmp_path / "out").exception, ZeroDivisionError)


def test_inspect_needs_the_config_alone(tmp_path: Path) -> None:
    shutil.copy(MODEL / "config.json", tmp_path)
    result = run("inspect", tmp_path)
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    assert "positions rotary (generalization: interpolation)" in words
    assert "trained length 512 tokens (max_position_embeddings of the config)" in words
    assert "theta 10000, 32 pairs, rope type default" in words and "yarn" in words
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_inspect_says_which_methods_do_not_apply_and_why() -> None:
    result = run("inspect", EXAMPLES / "tiny" / "tiny-alibi")
    assert "yarn: extends rotary positions; bloom has alibi" in " ".join(result.stdout.split())
    found = json.loads(run("inspect", EXAMPLES / "tiny" / "tiny-alibi", "--json").stdout)
    assert found["scheme"]["kind"] == "alibi" and found["scheme"]["generalization"] == "extrapolation"
    assert found["methods"]["none"] is None and "bloom has alibi" in found["methods"]["yarn"]


def test_methods_are_listed_with_their_papers() -> None:
    listed = json.loads(run("methods", "--json").stdout)
    table = run("methods").stdout
    assert {"none", "linear", "ntk", "yarn", "longrope", "llama3"} <= {method["name"] for method in listed}
    for method in listed:
        assert f"\n{method['name']} " in table and method["url"] in table, "the whole link must be there to be copied"
    assert max(map(len, table.splitlines())) <= 80


def test_without_a_command_the_help_is_shown() -> None:
    result = run()
    assert result.exit_code == 0 and all(name in result.stdout for name in ("compare", "inspect", "methods"))


def test_a_mistyped_command_is_one_line() -> None:
    assert "No such command 'compar'" in error_of(run("compar"))


def test_the_module_runs_and_its_help_loads_no_torch() -> None:
    shown = subprocess.run([sys.executable, "-m", "hf_posext", "compare", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "--original-length" in shown.stdout
    heavy = "{'torch', 'transformers', 'datasets', 'matplotlib'}"
    code = f"import sys; import hf_posext.cli; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_module_refuses_wrong_input_with_exit_code_2() -> None:
    refused = subprocess.run(
        [sys.executable, "-m", "hf_posext", "inspect", "./no/such/model"], capture_output=True, text=True
    )
    assert refused.returncode == 2 and refused.stdout == ""
    assert (
        refused.stderr == "error: no such folder: ./no/such/model; give a model folder or a Hub id such as org/name\n"
    )
