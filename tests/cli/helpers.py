"""The commands as tests call them, on the shipped model as if trained on 64 tokens: a run takes a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_posext.cli import app
from hf_posext.evaluation.windows import Prefix
from hf_posext.patching import find_patch

from ..conftest import EXAMPLES

MODEL, NOVELS = EXAMPLES / "tiny" / "tiny-rope", EXAMPLES / "data" / "heldout.jsonl"
LEARNED = EXAMPLES / "tiny" / "tiny-learned"
OPTIONS: dict[str, Any] = {
    "model": MODEL,
    "dataset": NOVELS,
    "methods": "none,linear,yarn",
    "trained-length": 64,
    "factor": 2,
    "lengths": "64,128",
    "documents": 2,
}


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def compare(output: Path, *flags: str, **changed: Any) -> Any:
    """`compare` with the options above, some of them changed, or left out where `None`."""
    options = {**OPTIONS, **{name.replace("_", "-"): value for name, value in changed.items()}, "output": output}
    words = [word for name, value in options.items() if value is not None for word in (f"--{name}", value)]
    return run("compare", *words, *flags)


def error_of(result: Any) -> str:
    """The one line on standard error of a refused input."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and result.stderr.splitlines()[-1] == lines[0], result.stderr
    assert "Traceback" not in result.output and result.stdout == ""
    return lines[0]


def break_at(monkeypatch: pytest.MonkeyPatch, method: str, error: BaseException) -> list[Any]:
    """Makes the model raise while a method is in force; gives a list that gets the models that were measured."""
    read = Prefix.measure
    models: list[Any] = []

    def break_or_read(self: Prefix, scorer: Any, *args: Any) -> Any:
        patch = find_patch(scorer.model)
        models.append(scorer.model)
        if patch is not None and patch.plan.method == method:
            raise error
        return read(self, scorer, *args)

    monkeypatch.setattr(Prefix, "measure", break_or_read)
    return models
