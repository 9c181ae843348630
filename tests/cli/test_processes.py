"""The commands as processes: several of them at once, and one that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_posext import Results
from hf_posext.cli.runs import join_processes, spread
from hf_posext.errors import InvalidParameterError

from ..conftest import EXAMPLES, tiny_llama
from ..helpers import TWO_PROCESSES, run_python
from .helpers import MODEL, OPTIONS, compare

WORDS = [str(word) for name, value in OPTIONS.items() for word in (f"--{name}", value)]
MODULE = ["-m", "hf_posext", "compare", *WORDS]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
ENVIRONMENT |= {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of one process that nothing happens to."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert compare(output).exit_code == 0
    return Results.load_json(output / "results.json")


def test_two_processes_write_one_report_of_the_same_rows(
    whole: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun joins them on a CPU without being told to."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    stdout = run_python(*TWO_PROCESSES, *MODULE, "--output", tmp_path / "out").stdout
    assert stdout.count("measured by 2 processes on cpu") == 1
    assert stdout.count("Perplexity per token") == 1 and stdout.count("report: ") == 1
    results = Results.load_json(tmp_path / "out" / "results.json")
    assert results.rows == whole.rows and results.per_document == whole.per_document
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"journal.jsonl", "journal-1.jsonl"} <= files and not any(name.endswith(".lock") for name in files)
    assert compare(tmp_path / "out", "--resume").exit_code == 0, "one process goes on with the journals of two"
    assert Results.load_json(tmp_path / "out" / "results.json").rows == whole.rows


def test_a_killed_command_goes_on_with_resume(whole: Results, tmp_path: Path) -> None:
    command = [sys.executable, *MODULE, "--output", str(tmp_path / "out")]
    journal = tmp_path / "out" / "journal.jsonl"
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    content = journal.read_bytes()
    assert content.count(b"\n") >= 3
    assert compare(tmp_path / "out", "--resume").exit_code == 0
    results = Results.load_json(tmp_path / "out" / "results.json")
    assert results.rows == whole.rows and results.per_document == whole.per_document
    assert journal.read_bytes().startswith(content[: content.rfind(b"\n") + 1])


def test_without_a_launcher_the_device_is_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    assert join_processes(None) == ("cpu", None) and join_processes("cuda:1") == ("cuda:1", None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidParameterError, match="which gives each process its own, got 'cuda:1'"):
        join_processes("cuda:1")


def test_the_evaluator_of_key_tokens_is_spread_like_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[Any] = []
    monkeypatch.setattr("hf_posext.cli.measuring.spread", lambda model, accelerator: models.append(model) or model)
    for evaluator, count in ((MODEL, 2), ("yarn", 1)):  # a method is not another model
        models.clear()
        assert compare(tmp_path / str(count), documents=1, longppl=evaluator, short_length=8).exit_code == 0
        assert [type(model).__name__ for model in models] == ["LlamaForCausalLM"] * count


def test_a_model_is_spread_where_texts_are_shared() -> None:
    shares = SimpleNamespace(
        parallelism_config=SimpleNamespace(cp_size=2),
        num_processes=2,
        prepare=lambda model, optimizer: (SimpleNamespace(share_of=model), optimizer),
    )
    model = tiny_llama()
    assert spread(model, shares).share_of is model and spread(model, None) is model  # type: ignore[arg-type]
