"""Models and texts that the page offers, and its refusals."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_posext.app import Shelf, content, make_shelf
from hf_posext.app.view import READ, Choice, applicable, first_look, look, read
from hf_posext.cli.loading import load_model
from hf_posext.errors import InvalidParameterError, PosExtError
from hf_posext.packages import EXTRAS

from ..cli.helpers import error_of, run
from ..conftest import EXAMPLES, TRAINED, longer_gpt2, tiny_bloom, tiny_llama


def opener(folder: str) -> tuple[Any, Any]:
    return load_model(folder, "float32", "cpu")


def shelf_of(model: Any, dataset: Path | None = None) -> Shelf:
    return Shelf({"model": Path("model")}, dataset, 0, lambda _: (model, None))


def test_the_shipped_models_come_after_those_given_and_the_novels_with_them(tmp_path: Path) -> None:
    shelf = make_shelf([tmp_path], None, None, opener)
    assert list(shelf.models) == [tmp_path.name, "tiny-rope", "tiny-learned", "tiny-alibi"]
    assert shelf.dataset == EXAMPLES / "data" / "heldout.jsonl" and shelf.start == 2000
    assert len(shelf.documents()) == 2
    texts = tmp_path / "texts.txt"
    texts.write_text("One text.", encoding="utf-8")
    shelf_of_text = make_shelf([], texts, None, opener)
    assert shelf_of_text.start == 0 and [document.text for document in shelf_of_text.documents()] == ["One text."]


def test_two_models_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "model", tmp_path / "b" / "model"]
    for folder in folders:
        folder.mkdir(parents=True)
    assert list(make_shelf(folders, None, None, opener).models)[:2] == [str(folder) for folder in folders]


def test_a_model_is_opened_once() -> None:
    opened: list[str] = []

    def count(folder: str) -> tuple[Any, Any]:
        opened.append(folder)
        return tiny_llama(), None

    shelf = Shelf({"model": Path("model")}, None, 0, count)
    assert shelf.open("model")[0] is shelf.open("model")[0] and opened == ["model"]
    with pytest.raises(InvalidParameterError, match="Expected one of the models model, got 'other'"):
        shelf.open("other")


def test_an_installed_package_says_where_models_come_from(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameterError, match="--model FOLDER --dataset texts.jsonl"):
        make_shelf([], None, None, opener, checkout=tmp_path)
    shelf = make_shelf([tmp_path], None, None, opener, checkout=tmp_path)
    assert shelf.dataset is None and "--dataset texts.jsonl" in content.loss(None)
    with pytest.raises(PosExtError, match="--dataset texts.jsonl"):
        shelf.documents()


def test_the_trained_length_of_the_shipped_alibi_model_is_known_and_that_of_a_copy_is_not(tmp_path: Path) -> None:
    shipped = EXAMPLES / "tiny" / "tiny-alibi"
    shutil.copytree(shipped, tmp_path / "copy")
    shelf = make_shelf([tmp_path / "copy"], None, None, opener)
    first = first_look(shelf, "tiny-alibi")
    assert (first.trained_length, first.target_length) == (512, 2048)
    assert first_look(shelf, "copy").trained_length is None
    with pytest.raises(InvalidParameterError, match="The trained length of copy is unknown"):
        look(shelf, Choice("copy", "alibi-linear", 4, 2048))
    assert look(shelf, Choice("copy", "alibi-linear", 4, 2048, 512)).plan.target_length == 2048


def test_only_methods_that_need_no_more_than_a_factor_are_offered() -> None:
    names = applicable(first_look(shelf_of(tiny_llama()), "model").scheme)
    assert {"yarn", "self-extend", "log-n"} <= set(names)
    assert not {"none", "longrope", "table-linear", "alibi-linear"} & set(names)
    assert content.first_method(names) == "self-extend" and content.first_method([]) is None


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice("model", "yarn", 4, 8 * TRAINED + 1), "length of at most 512 tokens .*, got 513"),
        (Choice("model", "yarn", 17, TRAINED), "factor of 1 to 16, got 17"),
        (Choice("model", "yarn", 4, 1), "target_length of 2 to .*, got 1"),
        (Choice("model", "yarm", 4, TRAINED), "did you mean 'yarn'"),
        (Choice("model", "", 4, TRAINED), "method"),
        (Choice("model", "table-linear", 4, TRAINED), "table-linear extends learned positions"),
        (Choice("model", "longrope", 4, TRAINED), "long_factor"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(choice: Choice, message: str) -> None:
    with pytest.raises(PosExtError, match=message):
        look(shelf_of(tiny_llama()), choice)


def test_a_long_text_is_left_to_the_command_line() -> None:
    model = tiny_llama(max_position_embeddings=READ)
    with pytest.raises(
        InvalidParameterError, match="at most 8192 tokens .*, got 8193. Longer texts belong on the command line"
    ):
        read(shelf_of(model), Choice("model", "yarn", 4, READ + 1))


def test_a_text_longer_than_the_new_table_is_refused() -> None:
    with pytest.raises(
        InvalidParameterError, match="factor 2 has 128 positions, got a length of 129. Choose a larger"
    ):
        read(shelf_of(longer_gpt2()), Choice("model", "table-linear", 2, 129, TRAINED))


def test_a_shipped_model_shows_the_gain_that_was_measured_and_another_one_does_not() -> None:
    """F19: the figure of ALiBi turns blue under a method that measures three times worse than truncation."""
    shelf = make_shelf([], None, None, opener)
    view = look(shelf, Choice("tiny-alibi", "alibi-linear", 4, 2048))
    assert not view.diagnosis.signals[1].unseen.any(), "all blue"
    (row,) = [
        row
        for row in json.loads((EXAMPLES.parent / "results" / "demo" / "tiny-alibi.json").read_text())["rows"]
        if (row["method"], row["length"]) == ("alibi-linear", 2048)
    ]
    below = content.signal(view)
    assert f"alibi-linear x8 has a gain of {row['gain']:.3f} [" in below and row["gain"] < 0.5
    assert "Truncating the input is the better choice." in below and "necessary, not enough" in below
    fade = look(shelf, Choice("tiny-rope", "rerope+fade", 8, 2048)).gain
    assert (
        fade is not None
        and (fade.length, fade.low > 1) == (2048, True)
        and "longer context helps" in content.gain(fade)
    )
    assert look(shelf, Choice("tiny-rope", "cope", 4, 2048)).gain is None
    assert look(shelf_of(tiny_llama()), Choice("model", "yarn", 4, TRAINED)).gain is None
    assert "The tab Loss measures it" in content.gain(None)


def test_what_is_said_is_escaped() -> None:
    assert "<b>" not in content.alert("no <b>model</b>\nof that name") and "\n" not in content.alert("a\nb")
    view = look(shelf_of(tiny_bloom()), Choice("model", "alibi-linear", 4, TRAINED, TRAINED))
    assert "ALiBi" in content.facts(view.diagnosis) and "64 tokens</b> (given)." in content.facts(view.diagnosis)
    assert 'rel="noreferrer"' in content.about(view) and "64 → 256 tokens" in content.about(view)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "org/name"], "Expected a folder of a model on this machine, got --model org/name"),
        (["--dataset", "pg19"], "Expected a file or folder of texts on this machine, got --dataset pg19"),
        (["--port", "0"], "port"),
        (["--host", "0.0.0.0"], "Expected an option of hf-posext app, got --host"),
        (["--share"], "Expected an option of hf-posext app, got --share"),
    ],
)
def test_the_command_refuses_in_one_line(options: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRAS, "app", ())  # gradio is asked for first, and is not installed here
    assert message in error_of(run("app", *options))


def test_without_gradio_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gradio", "starlette.middleware"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install 'hf_posext[app]'" in error_of(run("app"))
