"""Retrieval tasks: prompts that fit to the token and hold their answer at the depth asked; scores; the heat map."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from transformers import LlamaForCausalLM

from hf_posext.errors import InvalidParameterError
from hf_posext.evaluation import prompts, questions, retrieval
from hf_posext.evaluation.prompts import TASKS, WORDS, answer_room, task_prompt
from hf_posext.evaluation.questions import DEPTHS, score
from hf_posext.patching import patch_model
from hf_posext.reporting import drawing as heatmaps

from ..helpers import shipped_model, shipped_tokenizer
from .helpers import BOS, character_tokenizer

PIECES = shipped_tokenizer()
HIDDEN = [task for task in TASKS if TASKS[task].has_depth]


def prompt_text(task: str, length: int, depth: float | None, **kwargs: int) -> tuple[str, tuple[str, ...]]:
    prompt = task_prompt(PIECES, task, length, depth, **kwargs)
    return PIECES.decode(prompt.tokens), prompt.answers


@pytest.mark.parametrize("task", TASKS)
@given(length=st.integers(1200, 2600), depth=st.sampled_from(DEPTHS), seed=st.integers(0, 99), bos=st.booleans())
@settings(max_examples=15, deadline=None)
def test_prompt_and_answer_fit_the_length_exactly(task: str, length: int, depth: float, seed: int, bos: bool) -> None:
    tokenizer = character_tokenizer(bos)
    prompt = task_prompt(tokenizer, task, length, depth, seed=seed)
    assert len(prompt.tokens) + answer_room(tokenizer, task) == length
    assert (prompt.tokens[0] == BOS) is bos
    assert len(prompt.answers) == TASKS[task].count
    room = answer_room(PIECES, task)
    assert len(task_prompt(PIECES, task, length, depth, seed=seed).tokens) + room == length
    assert room >= len(PIECES(" " + ", and ".join(prompt.answers))["input_ids"]), "the answer has room"


@pytest.mark.parametrize("task", TASKS)
def test_prompts_follow_from_their_arguments_alone(task: str) -> None:
    first = task_prompt(PIECES, task, 700, 0.5, trial=1, seed=2)
    assert task_prompt(PIECES, task, 700, 0.5, trial=1, seed=2) == first
    variants = [
        task_prompt(PIECES, task, 701, 0.5, trial=1, seed=2),
        task_prompt(PIECES, task, 700, 0.25, trial=1, seed=2),
        task_prompt(PIECES, task, 700, 0.5, trial=0, seed=2),
        task_prompt(PIECES, task, 700, 0.5, trial=1, seed=0),
    ]
    assert all(prompt.answers != first.answers for prompt in variants)


@pytest.mark.parametrize("task", HIDDEN)
@pytest.mark.parametrize("depth", DEPTHS)
def test_the_answer_stands_at_the_depth_asked(task: str, depth: float) -> None:
    text, answers = prompt_text(task, 900, depth)
    lines = text.split("\n")
    filler = prompts.FILLER.strip()
    is_filler = [line == filler for line in lines]
    position = next(index for index, line in enumerate(lines) if answers[0] in line)
    # Whole lines of filler before the answer's, against their number: at most half a line beside the depth.
    assert abs(sum(is_filler[:position]) - depth * sum(is_filler)) <= 0.5


def test_what_each_task_hides_and_asks() -> None:
    text, (key,) = prompt_text("passkey", 600, 0.5)
    assert prompts.NEEDLE.format(key=key) in text and text.endswith(prompts.QUESTION)

    text, (key,) = prompt_text("multi-key", 600, 0.5)
    name = text.rsplit("pass key of ", 1)[1].removesuffix(" is")
    assert f"The pass key of {name} is {key}." in text and text.count("Remember it.") == 4
    assert text.count(f"The pass key of {name} is") == 2, "the line and the question"

    text, keys = prompt_text("multi-value", 600, 0.25)
    name = text.rsplit("pass keys of ", 1)[1].removesuffix(" are")
    places = [text.index(f"A pass key of {name} is {key}.") for key in keys]
    assert places == sorted(places) and len(set(keys)) == 3

    text, names = prompt_text("variable-tracking", 600, 0.25)
    value = text.rsplit("that are ", 1)[1].removesuffix(" are")
    assigned = dict(line.split(" = ") for line in text.split("\n") if " = " in line)
    assert len(assigned) == 8 and assigned[names[0]] == value
    resolved = {name for name in assigned if _resolve(name, assigned) == value}
    assert resolved == set(names)
    places = [text.index(f"{name} = ") for name in names]
    assert places == sorted(places), "no variable is used before it is assigned"


def _resolve(name: str, assigned: dict[str, str]) -> str:
    return _resolve(assigned[name], assigned) if name in assigned else name


@pytest.mark.parametrize("length", [320, 700, 5000])
def test_common_words_are_the_most_frequent_by_far(length: int) -> None:
    text, answers = prompt_text("common-words", length, None)
    words = [line for line in text.split("\n") if line in WORDS]
    counts = Counter(words)
    places = [index / len(words) for index, word in enumerate(words) if word in answers]
    assert 0.3 < sum(places) / len(places) < 0.7, "all over the list"
    common = {counts.pop(word) for word in answers}
    assert len(common) == 1, "equally often, so that none is easier"
    assert common.pop() >= 2 * max(counts.values())
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("task", TASKS)
def test_a_length_that_holds_no_prompt_is_refused(task: str) -> None:
    with pytest.raises(InvalidParameterError, match=r"lengths of (\d+) tokens or more .* got 30") as error:
        task_prompt(character_tokenizer(), task, 30, 0.5)
    needed = int(str(error.value).split("lengths of ")[1].split()[0])
    assert 100 < needed < 800
    assert task_prompt(character_tokenizer(), task, needed + 50, 0.5)


@pytest.mark.parametrize(
    ("answer", "answers", "right"),
    [
        (" 12345. And", ("12345",), 1.0),
        (" it is 12345", ("12345",), 0.0),
        (" 123456", ("12345",), 0.0),
        ("12345", ("12345",), 1.0),
        (" 11111, 22222 and 33333.", ("33333", "11111", "22222"), 1.0),
        (" 11111, 2222, 333333", ("11111", "22222", "33333"), 1 / 3),
        (" maples and a lantern", ("lantern", "maple"), 0.5),
        ("", ("lantern", "maple"), 0.0),
    ],
)
def test_scores(answer: str, answers: tuple[str, ...], right: float) -> None:
    assert score(answer, answers) == pytest.approx(right)


def test_rows_have_the_scores_of_their_own_prompts(monkeypatch: pytest.MonkeyPatch, llama: LlamaForCausalLM) -> None:
    """A model that answers right in the second half of the text, and knows one word of three in lists."""
    texts, steps = {}, []
    for task in ("passkey", "common-words"):
        for depth in (0.0, 1.0) if task == "passkey" else (None,):
            for trial in range(3):
                prompt = task_prompt(PIECES, task, 500, depth, trial=trial, seed=5)
                answers = prompt.answers if depth == 1.0 else prompt.answers[:1] if depth is None else ("no",)
                texts[tuple(prompt.tokens)] = " " + " ".join(answers)

    def generate(model: Any, input_ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
        replies = [PIECES(texts[tuple(row.tolist())])["input_ids"] for row in input_ids]
        padded = [reply + [PIECES.eos_token_id] * (new_tokens - len(reply)) for reply in replies]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)

    monkeypatch.setattr(questions, "generate_greedily", generate)
    tasks = ["passkey", "common-words"]
    rows = retrieval(llama, PIECES, [500], tasks=tasks, depths=[0.0, 1.0], trials=3, seed=5, on_step=steps.append)
    assert [(row["task"], row["depth"], row["accuracy"]) for row in rows] == [
        ("passkey", 0.0, 0.0),
        ("passkey", 1.0, 1.0),
        ("common-words", None, pytest.approx(1 / 3)),
    ]
    assert all((row["length"], row["trials"]) == (500, 3) for row in rows)
    assert steps == [1, 1]


def test_what_cannot_be_asked_is_refused(llama: LlamaForCausalLM) -> None:
    for wrong in ({"tasks": ["poetry"]}, {"tasks": []}, {"tasks": ["passkey"] * 2}):
        with pytest.raises(InvalidParameterError, match="tasks .* passkey, multi-key, multi-value"):
            retrieval(llama, PIECES, [500], **wrong)
    for depths in ([], [1.5], [-0.1], [0.5, 0.5]):
        with pytest.raises(InvalidParameterError, match="Expected depths"):
            retrieval(llama, PIECES, [500], depths=depths)
    with pytest.raises(InvalidParameterError, match="trials .* got 0"):
        retrieval(llama, PIECES, [500], trials=0)
    with pytest.raises(InvalidParameterError, match=r"lengths to be different, got \[500, 500\]"):
        retrieval(llama, PIECES, [500, 500])


def test_the_shipped_model_finds_pass_keys_at_every_depth_inside_its_trained_length() -> None:
    model = shipped_model()
    settings: dict[str, Any] = {"tasks": ["passkey"], "trials": 2}
    rows = retrieval(model, PIECES, [384], depths=[0.0, 0.5, 1.0], **settings)
    assert [row["accuracy"] for row in rows] == [1.0, 1.0, 1.0]
    assert [row["accuracy"] for row in retrieval(model, PIECES, [1024], depths=[0.5], **settings)] == [0.0]
    with patch_model(model, "yarn", factor=4):
        assert [row["accuracy"] for row in retrieval(model, PIECES, [1024], depths=[0.5], **settings)] == [1.0]


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    by_depth = [
        {"task": task, "length": length, "depth": depth, "accuracy": depth * 512 / length, "trials": 4}
        for task in ("passkey", "multi-key")
        for length in (1024, 512)
        for depth in (0.0, 0.5, 1.0)
    ]
    return [*by_depth, {"task": "common-words", "length": 512, "depth": None, "accuracy": 0.75, "trials": 4}]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved."""
    saved: list[Figure] = []
    save = heatmaps.save_figure
    monkeypatch.setattr(heatmaps, "save_figure", lambda figure, path: (saved.append(figure), save(figure, path)))
    return saved


def test_heat_maps(figures: list[Figure], tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    heatmaps.plot_heatmaps(rows, tmp_path / "h.png", trained_length=512, title="yarn x2")
    png = (tmp_path / "h.png").read_bytes()
    assert png.startswith(b"\x89PNG") and int.from_bytes(png[16:20], "big") == 1800
    (figure,) = figures
    assert figure.get_suptitle() == "yarn x2"
    first, second, depthless, bar = figure.axes
    assert [panel.get_title() for panel in (first, second, depthless)] == ["passkey", "multi-key", "common-words"]
    for panel in (first, second):
        assert [label.get_text() for label in panel.get_xticklabels()] == ["512", "1024"]
        assert [label.get_text() for label in panel.get_yticklabels()] == ["0 %", "50 %", "100 %"]
        cells = {text.get_position(): text.get_text() for text in panel.texts}
        assert cells[(0.5, 2.5)] == "100" and cells[(1.5, 2.5)] == "50" and cells[(1.5, 1.5)] == "25"
        assert panel.yaxis_inverted(), "the beginning of the text is at the top"
        assert {line.get_xdata()[0] for line in panel.lines} == {1}, "between 512 and 1024"
        assert panel.get_xlabel() == "length (tokens); dots: trained on 512"
        assert panel.get_ylabel() == "depth in the text"
    assert [text.get_text() for text in depthless.texts] == ["75"] and depthless.get_ylabel() == "whole text"
    assert bar.get_ylabel() == "accuracy (%)"


def test_a_cell_that_was_not_measured_is_a_dash(
    figures: list[Figure], tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    heatmaps.plot_heatmaps(rows[1:], tmp_path / "h.png")
    cells = {text.get_position(): text.get_text() for text in figures[0].axes[0].texts}
    assert [place for place, text in cells.items() if text == "-"] == [(1.5, 0.5)]
    for wrong in ([], [*rows, rows[0]]):
        with pytest.raises(InvalidParameterError, match="of one method at a time"):
            heatmaps.plot_heatmaps(wrong, tmp_path / "no.png")
    assert [path.name for path in tmp_path.iterdir()] == ["h.png"]
