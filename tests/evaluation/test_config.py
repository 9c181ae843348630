"""The settings of measuring: one declaration, from which keywords, YAML files, flags and the provenance derive."""

from __future__ import annotations

import importlib
import inspect
import io
import json
import math
import sys
import traceback
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer.main

from hf_posext import evaluation
from hf_posext.cli import app
from hf_posext.errors import DocumentError, InvalidParameterError, PosExtError
from hf_posext.evaluation import (
    Document,
    EvaluationConfig,
    Results,
    compare,
    evaluate_perplexity,
    find_key_tokens,
    load_documents,
    log_results,
    longppl,
    passkey_accuracy,
    retrieval,
    runner,
    scorer,
)
from hf_posext.evaluation.runner import Progress, measure
from hf_posext.evaluation.scorer import tokens_read
from hf_posext.evaluation.tasks import Stage, Task

from ..cli.helpers import compare as command
from ..cli.helpers import error_of
from ..conftest import tiny_llama
from .helpers import character_tokenizer, random_texts

TEXTS = random_texts(3, 140)
SETTINGS: dict[str, Any] = {"lengths": [48, 128], "factor": 2.0, "seed": 3, "start": 2}


def run(config: EvaluationConfig | None = None, documents: Any = TEXTS, **settings: Any) -> Results:
    return compare(tiny_llama(), character_tokenizer(), documents, ["none", "linear"], config, **settings)


def test_a_config_and_keywords_are_the_same() -> None:
    as_keywords, as_config = run(**SETTINGS), run(EvaluationConfig(**SETTINGS))
    assert as_keywords.rows == as_config.rows
    assert run(EvaluationConfig(**{**SETTINGS, "start": 0}), start=2).rows == as_keywords.rows, "keywords go first"
    assert run(EvaluationConfig(**{**SETTINGS, "start": 0})).rows != as_keywords.rows


def test_the_provenance_contains_every_setting() -> None:
    provenance = run(**SETTINGS).provenance
    assert {entry.name for entry in fields(EvaluationConfig)} <= set(provenance)
    assert {name: provenance[name] for name in SETTINGS} == SETTINGS


def test_one_model_is_a_comparison_with_no_other_method() -> None:
    settings = {**SETTINGS, "factor": None}
    alone = evaluate_perplexity(tiny_llama(), character_tokenizer(), TEXTS, config=EvaluationConfig(**settings))
    compared = compare(tiny_llama(), character_tokenizer(), TEXTS, ["none"], EvaluationConfig(**settings))
    columns = ("perplexity", "perplexity_tail", "nll_sum", "bits_per_byte", "ci95")
    assert [[row[key] for key in columns] for row in alone.rows] == [
        [row[key] for key in columns] for row in compared.rows
    ]
    with pytest.raises(InvalidParameterError, match=r"to be left out, since a model is measured as it is, got 8\.0"):
        evaluate_perplexity(tiny_llama(), character_tokenizer(), TEXTS, **{**SETTINGS, "factor": 8.0})


def test_unknown_settings_are_refused_with_a_suggestion() -> None:
    with pytest.raises(InvalidParameterError, match=r"a known setting, got 'lenghts'. Did you mean 'lengths'\? Pass"):
        run(lenghts=[48])
    with pytest.raises(InvalidParameterError, match=r"Expected lengths, got none\. Pass lengths="):
        run(factor=2.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": "512"}, "Expected lengths to be a list of whole numbers, got '512'"),
        ({"lengths": 48}, "Expected lengths to be a list of whole numbers, got 48"),
        ({"lengths": torch.tensor([48])}, "Expected lengths to be a list of whole numbers, got tensor"),
        ({"passkey": "3"}, "Expected passkey to be a whole number, got '3'"),
        ({"passkey": True}, "Expected passkey to be a whole number, got True"),
        ({"start": 1.5}, "Expected start to be a whole number, got 1.5"),
        ({"tasks": "passkey"}, "Expected tasks to be a list of names or None, got 'passkey'"),
        ({"depths": ["x"]}, r"Expected depths to be a list of numbers or None, got \['x'\]"),
        ({"stride": 2.5}, "Expected stride to be a whole number or None, got 2.5"),
        ({"alpha": "x"}, "Expected alpha to be a number or None, got 'x'"),
        ({"chat": "yes"}, "Expected chat to be True or False, got 'yes'"),
        ({"bos": True}, "Expected bos to be one of auto, always, never, got True"),
        ({"passkey": 10**19}, "Expected passkey to be a whole number from 0 to 10,000, got 10000000000000000000"),
        ({"retrieval": 10_001}, "Expected retrieval to be a whole number from 0 to 10,000, got 10001"),
        ({"factor": float("nan")}, "Expected factor to be a number or None, got nan"),
        ({"factor": 10**400}, r"Expected factor to be a number or None, got 10{36}\.\.\."),
        ({"lengths": [10**400]}, r"Expected lengths to be a list of whole numbers, got \[10{35}\.\.\."),
        ({"depths": [float("inf")]}, r"Expected depths to be a list of numbers or None, got \[inf\]"),
        ({"trained_length": 1}, "Expected trained_length to be a whole number from 2 to 16,777,216, got 1"),
        ({"seed": -1}, "Expected seed to be a whole number of 0 or more, got -1"),
        ({"longppl": ("none", character_tokenizer(bos=True))}, r"a label, a model, or \(model, tokenizer\)"),
        ({"longppl": (1,)}, r"Expected longppl to be a label, a model, or \(model, tokenizer\)"),
        ({"config": {"lengths": [48]}}, "Expected config to be an EvaluationConfig or None, got {'lengths"),
    ],
)
def test_a_setting_of_another_type_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        run(**{**SETTINGS, **settings})


def test_numbers_of_numpy_are_numbers() -> None:
    config = EvaluationConfig(
        lengths=np.array([48, 64]), start=np.int64(3), alpha=np.float64(2.0), depths=[np.float32(0.5)]
    )
    assert config == EvaluationConfig(lengths=[48, 64], start=3, alpha=2.0, depths=[0.5])
    assert json.loads(json.dumps(config.settings()))["lengths"] == [48, 64]


def test_what_is_no_tokenizer_model_or_path_is_refused() -> None:
    model, tokenizer = tiny_llama(), character_tokenizer()
    for arguments, message in (
        ((model, None, TEXTS), "Expected a tokenizer, got NoneType"),
        ((tiny_llama().to("meta"), tokenizer, TEXTS), "on the meta device. Load its weights"),
        ((model, tokenizer, "word " * 999), "got word .*: no such path. Pass a list, also of one text"),
    ):
        with pytest.raises(PosExtError, match=message):
            evaluate_perplexity(*arguments, [48])
    for ask in (passkey_accuracy, retrieval):
        with pytest.raises(InvalidParameterError, match="Expected 1 to 10,000 trials"):
            ask(model, tokenizer, [128], trials=10**19)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (compare, {"journal": 3}, "journal to be text or a Path or None, got 3"),
        (compare, {"accelerator": 3}, "accelerator to be an Accelerator or None, got 3"),
        (compare, {"on_method": 3}, "on_method to be a function or None, got 3"),
        (compare, {"config": {"lengths": [48]}}, "config to be an EvaluationConfig or None"),
        (compare, {"model": 3}, "model to be a Module, got 3"),
        (compare, {"methods": "none"}, "methods to be a list of names or a Method, got 'none'"),
        (compare, {"methods": math.nan}, "methods to be a list of names or a Method, got nan"),
        (compare, {"methods": iter(["none"])}, "methods to be a list of names or a Method, got <list_iterator"),
        (compare, {"journal": " "}, "journal to be text or a Path or None, got ' '"),
        (evaluate_perplexity, {"label": " "}, "label to be text or None, got ' '"),
        (Document, {"id": math.nan, "text": "x"}, "text as id of a document, got float"),
        (Document, {"id": "a", "text": b"x"}, "text as text of a document, got bytes"),
        (evaluate_perplexity, {"journal": b"j"}, "journal to be text or a Path or None, got b'j'"),
        (evaluate_perplexity, {"accelerator": "gpu"}, "accelerator to be an Accelerator or None, got 'gpu'"),
        (evaluate_perplexity, {"control": "none"}, "control to be a Module or None, got 'none'"),
        (evaluate_perplexity, {"label": 3}, "label to be text or None, got 3"),
        (longppl, {"length": 48.5}, "length to be a whole number, got 48.5"),
        (longppl, {"length": 48, "keys": 3}, "keys to be a KeyTokens or None, got 3"),
        (longppl, {"length": 48, "seed": "x"}, "seed to be a whole number, got 'x'"),
        (find_key_tokens, {"length": 48, "alpha": "2"}, "alpha to be a number, got '2'"),
        (passkey_accuracy, {"lengths": [128], "trials": "2"}, "trials to be a whole number, got '2'"),
        (passkey_accuracy, {"lengths": [128], "trials": 1, "max_new_tokens": "x"}, "max_new_tokens to be a whole"),
        (passkey_accuracy, {"lengths": [128], "trials": 1, "max_new_tokens": 0}, "max_new_tokens of 1 or more, got 0"),
        (passkey_accuracy, {"lengths": [128], "trials": 1, "on_length": 3}, "on_length to be a function or None"),
        (retrieval, {"lengths": [128], "seed": "x"}, "seed to be a whole number, got 'x'"),
        (retrieval, {"lengths": [128], "tasks": 3}, "tasks to be a list of names or None, got 3"),
        (retrieval, {"lengths": [128], "depths": "0"}, "depths to be a list of numbers or None, got '0'"),
        (retrieval, {"lengths": [128], "on_step": 3}, "on_step to be a function or None, got 3"),
        (log_results, {"results": 3, "accelerator": 3}, "results to be a Results, got 3"),
        (load_documents, {"source": ["a"], "limit": "2"}, "limit to be a whole number or None, got '2'"),
        (load_documents, {"source": ["a"], "split": 3}, "split to be text or None, got 3"),
    ],
)
def test_an_argument_of_another_type_is_refused_whatever_the_function(
    function: Any, arguments: dict[str, Any], message: str
) -> None:
    """One mechanism for all public functions: the annotations."""
    keywords: dict[str, Any] = {"model": tiny_llama(), "tokenizer": character_tokenizer()}
    if function in (compare, evaluate_perplexity, longppl, find_key_tokens):
        keywords["documents"] = TEXTS
    if function is compare:
        keywords["methods"] = ["none"]
    if function in (log_results, load_documents, Document):
        keywords = {}
    if function is find_key_tokens:
        keywords["evaluator"] = keywords.pop("model")
    with pytest.raises((InvalidParameterError, DocumentError), match=f"^Expected {message}"):
        function(**{**keywords, **arguments})


def test_every_public_function_is_checked() -> None:
    functions = [value for name in evaluation.__all__ if inspect.isfunction(value := getattr(evaluation, name))]
    assert len(functions) >= 9
    for function in functions:
        assert hasattr(function, "__wrapped__"), f"@checked is missing on {function.__name__}"


def test_the_earlier_name_of_the_trained_length_works_and_warns() -> None:
    with pytest.warns(DeprecationWarning, match="original_length is now called trained_length; pass trained"):
        results = run(**SETTINGS, original_length=32)
    assert results.rows == run(**SETTINGS, trained_length=32).rows != run(**SETTINGS).rows


def test_every_setting_has_a_flag_with_its_help() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name in ("compare", "evaluate"):
        options = {option.name: option for option in commands[name].params}
        for entry in fields(EvaluationConfig):
            if entry.metadata.get("flag", {}).get("of", name) == name:
                assert options[entry.name].help == entry.metadata["help"], entry.name
                assert entry.metadata["help"] in " ".join((EvaluationConfig.__doc__ or "").split()), entry.name
                assert f"--{entry.name.replace('_', '-')}" in options[entry.name].opts
    assert "factor" not in {option.name for option in commands["evaluate"].params}


def test_flags_and_yaml_are_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[EvaluationConfig] = []

    def stop(*_: Any, **__: Any) -> Any:
        configs.append(_[4])
        raise InvalidParameterError("seen")

    monkeypatch.setattr("hf_posext.evaluation.compare", stop, raising=False)
    (tmp_path / "run.yaml").write_text("depths: [0, 0.5]\nretrieval: 2\noffload_cache: true\nprefill-chunk: 64\n")
    flags = ["--tasks", "passkey, multi-key", "--seed", "7", "--config", str(tmp_path / "run.yaml")]
    assert "seen" in error_of(command(tmp_path / "out", *flags))
    expected = EvaluationConfig(
        lengths=[64, 128], factor=2.0, trained_length=64, retrieval=2, tasks=["passkey", "multi-key"],
        depths=[0.0, 0.5], offload_cache=True, prefill_chunk=64, seed=7,
    )  # fmt: skip
    assert configs == [expected]


def test_the_earlier_flag_works_and_says_its_new_name(tmp_path: Path) -> None:
    result = command(tmp_path / "out", "--original-length", "64", trained_length=None)
    assert result.exit_code == 0 and "--original-length is now called --trained-length" in result.stderr
    results = Results.load_json(tmp_path / "out" / "results.json")
    assert results.provenance["trained_length"] == 64
    assert "--trained-length 64" in results.provenance["command"]
    assert "--original-length" not in results.provenance["command"]


class Unread(Exception):
    """Raised by what must not be read."""


class NeverRead(list[str]):
    """Documents that nobody may read."""

    def __iter__(self) -> Any:
        raise Unread


@pytest.mark.parametrize(
    "wrong",
    [
        {"factor": None},
        {"lengths": [1]},
        {"protocol": "sliding"},
        {"protocol": "sliding", "stride": 64},
        {"start": -1},
        {"tasks": ["passkey"]},
        {"passkey": -1},
        {"longppl": "yarn"},
        {"alpha": 3.0},
        {"longppl": "linear", "short_length": 500},
        {"prefill_chunk": 0},
        {"passkey": 2},
    ],
    ids=str,
)
def test_settings_are_checked_before_documents_are_read(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameterError):
        run(documents=NeverRead(TEXTS), **{**SETTINGS, **wrong})
    with pytest.raises(Unread):
        run(documents=NeverRead(TEXTS), **SETTINGS)


@pytest.mark.parametrize(
    "wrong",
    [
        {"protocol": "pseudo"},
        {"protocol": "sliding"},
        {"lengths": 1},
        {"factor": None},
        {"start": -1},
        {"longppl": "ntk"},
        {"alpha": 2},
        {"prefill_chunk": 16, "methods": "dynamic-ntk"},
    ],
    ids=str,
)
def test_commands_check_settings_before_weights_are_read(
    wrong: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any, **__: Any) -> Any:
        raise Unread

    monkeypatch.setattr("hf_posext.cli.measuring.load_model", read)
    error_of(command(tmp_path / "out", **wrong))
    assert isinstance(command(tmp_path / "other").exception, Unread), "right ones get as far as the weights"


def test_a_command_plans_then_loads_then_tokenizes_then_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    def spy(place: str) -> None:
        module, name = place.rsplit(".", 1)
        step = getattr(importlib.import_module(module), name)

        def call(*args: Any, **kwargs: Any) -> Any:
            steps.append(name)
            return step(*args, **kwargs)

        monkeypatch.setattr(place, call)

    spy("hf_posext.evaluation.comparison.plan_comparison")
    spy("hf_posext.cli.measuring.load_model")
    spy("hf_posext.evaluation.setup.tokenize_documents")
    spy("hf_posext.evaluation.comparison.measure")
    assert command(tmp_path / "out", documents=1).exit_code == 0
    assert list(dict.fromkeys(steps)) == ["plan_comparison", "load_model", "tokenize_documents", "measure"]


def test_from_the_call_to_the_nll_are_nine_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    paths: set[tuple[str, ...]] = set()
    logits_nll = scorer.logits_nll

    def spy(*args: Any) -> torch.Tensor:
        frames = [frame for frame in traceback.extract_stack() if "hf_posext" in frame.filename]
        front_door = next(index for index, frame in enumerate(frames) if frame.name == "compare")
        paths.add(tuple(frame.name for frame in frames[front_door + 1 :]))
        return logits_nll(*args)

    monkeypatch.setattr(scorer, "logits_nll", spy)
    run(**SETTINGS)
    # and `logits_nll` itself, in whose place the spy stands
    assert paths and max(map(len, paths)) + 1 <= 9, sorted(paths, key=len)[-1]


class Terminal(io.StringIO):
    """A stream that a progress bar takes for a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_counts_tokens_and_shows_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, counts = Terminal(), []  # type: tuple[Terminal, list[float]]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(runner, "HEARTBEAT", 0.01)

    class Watched(Progress):
        def end(self, task: Task) -> None:
            counts.append(self.bar.n)
            super().end(task)
            counts.append(self.bar.n)

    monkeypatch.setattr(runner, "Progress", Watched)
    tasks = [Task("nll", "yarn", 8.0, (64,), document, tokens=1000) for document in ("Emma", "Persuasion")]

    def read(task: Task) -> int:
        tokens_read(600 if task.document == "Emma" else 5000)  # a forward that ends, and one that says too much
        return 1

    measure([Stage("yarn x8", nullcontext, tasks, read)])
    assert counts == [600, 1000, 2000, 2000]
    text = terminal.getvalue()
    assert "yarn x8, Emma" in text and "2.00k/2.00k" in text and "tok/s" in text and "1 process" in text


def test_a_comparison_reads_the_tokens_that_progress_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[tuple[int, int]] = []

    class Watched(Progress):
        def begin(self, label: str, task: Task) -> None:
            super().begin(label, task)
            self.read = 0

        def end(self, task: Task) -> None:
            ends.append((self.read, task.tokens))
            super().end(task)

        def _add(self, tokens: int) -> None:
            self.read += tokens

    monkeypatch.setattr(runner, "Progress", Watched)
    run(**SETTINGS)
    assert len(ends) == 3 * 3
    for read, expected in ends:
        assert 0.5 * read <= expected <= 2 * read, "the guard of a shared pass, and the probes, come on top"
