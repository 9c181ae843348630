"""Wrong values of every flag of every command: one line that names the flag, exit code 2, before weights are read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from hf_posext.cli import app
from hf_posext.decode import MAX_NUMBER
from hf_posext.packages import EXTRAS

from ..conftest import EXAMPLES
from .helpers import MODEL, NOVELS, error_of, run

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands
RESULTS = EXAMPLES.parent / "results" / "demo" / "tiny-rope.json"

GIVEN: dict[str, list[object]] = {
    "inspect": [MODEL],
    "explain": [MODEL, "--dataset", NOVELS],
    "compare": ["--model", MODEL, "--dataset", NOVELS, "--methods", "none,yarn", "--lengths", "64,128", "--factor", 4],
    "evaluate": ["--model", MODEL, "--dataset", NOVELS, "--lengths", "64,128"],
    "recommend": [MODEL, "--dataset", NOVELS, "--target-length", 1024],
    "search": [MODEL, "--dataset", NOVELS, "--target-length", 1024],
    "finetune": ["--model", MODEL, "--dataset", NOVELS, "--method", "yarn", "--factor", 4, "--documents", 1],
    "export": [MODEL, "--to", "vllm", "--method", "yarn", "--factor", 4],
    "serve": [MODEL, "--method", "yarn", "--factor", 4],
    "gguf": ["PATCHED", RESULTS, "new.gguf"],
    "report": [RESULTS],
    "card": ["PATCHED", "--before", RESULTS, "--after", RESULTS],
    "env": [MODEL],
}
"""Arguments and options that a command needs, the arguments first. An output is added."""

NEEDED: dict[str, list[object]] = {
    "stride": ["--protocol", "sliding"],
    "tail": ["--protocol", "tail"],
    "tasks": ["--retrieval", 1],
    "depths": ["--retrieval", 1],
    "evaluate.trained_length": ["--control", MODEL],
    **dict.fromkeys(("patience", "evaluate_split", "every", "finetune.passkey"), ["--evaluate", NOVELS]),
    **{f"compare.{name}": ["--longppl", "yarn"] for name in ("alpha", "beta", "short_length")},
    **{f"evaluate.{name}": ["--longppl", "none"] for name in ("alpha", "beta", "short_length")},
}
"""Further options without which an option is refused, whatever its value is."""

FREE = {"label", "push", "revision", "targets"}
"""Options that take any text."""

SIGNED = {"compare.alpha", "evaluate.alpha", "compare.beta", "evaluate.beta"}
"""Numbers that may be 0 or less, or some of these."""

PLANS = ("recommend", "search")
"""Commands whose output is a plan."""

WRITTEN = {"output", "plot"}
"""Paths that a command makes."""

NUMBERS = {int: ["x", "nan", "1e9", "1.5", "-1", "0", 10**25], float: ["x", "nan", "inf", "1e30", "-1", "0", 10**25]}


FORM = re.compile(r"error: Expected (\S+ to be a|text for \S+|\S+ without).*, got .+\. Pass .+\.")
"""Errors of the types and bounds that flags declare."""


class Reached(Exception):
    """The weights are read next."""


def wrong_values(command: str, flag: Any, folder: Path) -> Iterator[object]:
    """Values of which none is right, by the type that a flag declares."""
    kind = flag.type_descriptor.annotation
    yield ""
    if kind in NUMBERS:
        for text in NUMBERS[kind]:
            low = flag.min if flag.min is not None else flag.default or 1
            is_right = text in ("-1", "0") and (f"{command}.{flag.name}" in SIGNED or low <= int(text))
            if not is_right and text != str(flag.default):
                yield text
    elif flag.name not in FREE | WRITTEN:
        yield "no/such/path"
    if kind is Path:
        options = flag.type_descriptor.parameter_info
        (folder / "folder").mkdir()
        (folder / "file").touch()
        yield from ([] if options.dir_okay else ["folder"]) + ([] if options.file_okay else ["file"])


def is_refused_by_type(flag: Any, value: object) -> bool:
    """A value that the declaration of a flag alone refuses."""
    kind, text = flag.type_descriptor.annotation, str(value)
    if kind not in NUMBERS or text in ("", "x", "nan", "inf") or kind is int and text in ("1e9", "1.5"):
        return kind in (*NUMBERS, bool) or text in ("", "file", "folder")
    return float(text) > MAX_NUMBER or flag.min is not None and not flag.min <= float(text) <= (flag.max or math.inf)


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def reach(*_: Any, **__: Any) -> Any:
        raise Reached

    for name in ("open_weights", "open_body"):
        monkeypatch.setattr(f"hf_posext.patching.checkpoint.{name}", reach)
    for extra in ("app", "serve"):
        monkeypatch.setitem(EXTRAS, extra, ())
    monkeypatch.chdir(tmp_path)


def words_of(command: str, flag: Any, value: object, patched: Path) -> list[object]:
    """The words of a command with one flag."""
    words = [patched if word == "PATCHED" else word for word in GIVEN.get(command, [])]
    words += NEEDED.get(flag.name, NEEDED.get(f"{command}.{flag.name}", []))
    params = COMMANDS[command].params
    if "--output" in [param.opts[0] for param in params]:
        words += ["--output", "plan.json" if command in PLANS else "out"]
    if flag.param_type_name == "argument":
        words[[param.name for param in params if param.param_type_name == "argument"].index(flag.name)] = value
        return words
    name = flag.opts[0]
    if name in words:
        words[words.index(name) + 1] = value
        return words
    return [*words, f"{name}={value}"]


CASES = [
    pytest.param(command, flag, id=f"{command}-{flag.name}")
    for command, parsed in COMMANDS.items()
    for flag in parsed.params
    if flag.name != "help"
]


@pytest.mark.parametrize(("command", "flag"), CASES)
def test_a_wrong_value_is_one_line_that_names_the_flag(command: str, flag: Any, patched: Path, tmp_path: Path) -> None:
    is_switch = getattr(flag, "is_flag", False)
    faults = []
    for value in ["1"] if is_switch else wrong_values(command, flag, tmp_path):
        result = run(command, *words_of(command, flag, value, patched))
        try:
            line = error_of(result)
        except AssertionError:
            faults.append(f"{value!r}: {result.exit_code} {result.exception!r} {result.output[-300:]}")
        else:
            name = flag.metavar if flag.param_type_name == "argument" else flag.opts[0]
            if name not in line:
                faults.append(f"{value!r}: not named: {line}")
            if is_refused_by_type(flag, value) and not FORM.fullmatch(line):
                faults.append(f"{value!r}: not in the form of the package: {line}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "command", ["explain", "compare", "evaluate", "recommend", "search", "finetune", "export", "serve"]
)
def test_right_values_get_as_far_as_the_weights(command: str) -> None:
    """Otherwise the refusals above would say nothing about the values."""
    output = {"explain": [], "serve": []}.get(command, ["--output", "plan.json" if command in PLANS else "out"])
    assert isinstance(run(command, *GIVEN[command], *output).exception, Reached)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compar"], "Expected a command, got 'compar'. Pass compare, card."),
        (["--nonsense"], "Expected an option of hf-posext, got --nonsense. See hf-posext --help."),
        (["env", "--jsn"], "an option of hf-posext env, got --jsn. Pass --json, or see hf-posext env --help."),
        (["methods", "--json=yes"], "Expected --json without a value, got 'yes'. Pass --json alone."),
        (["methods", "all"], "Expected only what hf-posext methods takes, got 'all'. See hf-posext methods --help."),
        (["compare"], "Expected --model, got none. Pass --model: Model folder, GGUF file or Hub id."),
        (["report"], "Expected RESULTS, got none. Pass RESULTS: results.json of each run."),
        (["report", "."], "Expected RESULTS to be a file, got '.'. Pass a file."),
        (["compare", "--seed"], "Expected --seed to be a whole number of 0 or more, got none. Pass --seed 0."),
        (["compare", "--bos", "no"], "Expected --bos to be one of auto, always, never, got 'no'. Pass --bos auto."),
        (["search", "--population", "3"], "to be a whole number of 4 or more, got '3'. Pass --population 32."),
        (["finetune", "--rank", "x"], "Expected --rank to be a whole number of 1 or more, got 'x'. Pass --rank 8."),
        (["compare", "--beta", "x"], "Expected --beta to be a number, got 'x'. Pass a number, or leave --beta out."),
        (["compare", "--passkey", "10001"], "to be a whole number from 0 to 10,000, got '10001'. Pass --passkey 0."),
    ],
)
def test_errors_of_typer_are_in_the_form_of_the_package(words: list[str], message: str) -> None:
    assert error_of(run(*words)).endswith(message)
