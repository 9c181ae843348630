"""Questions in a chat template: exact tokens, exact lengths, and runs that say so."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from hf_posext.errors import InvalidParameterError, JournalError
from hf_posext.evaluation import compare, load_documents, passkey_accuracy
from hf_posext.evaluation.prompts import TASKS, Prompt, passkey_prompts, task_prompt
from hf_posext.reporting import merge_runs
from hf_posext.reporting.tables import grids

from ..cli.helpers import compare as run_command
from ..cli.helpers import error_of
from ..helpers import NOVELS, shipped_model, shipped_tokenizer
from .helpers import character_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}.\n{{ message.content | trim }} end\n{% endfor %}"
    "{% if add_generation_prompt %}assistant.\n{% endif %}"
)
ASKING = "{{ bos_token }}{% set today = strftime_now('%d %b %Y') %}{{ today }}\n" + TEMPLATE.removeprefix(
    "{{ bos_token }}"
)
DATED = "{{ bos_token }}{{ date_string or strftime_now('%d %b %Y') }}\n" + TEMPLATE.removeprefix("{{ bos_token }}")


def chatting(template: str = TEMPLATE, pieces: bool = False) -> PreTrainedTokenizerBase:
    """The character tokenizer, whose tokens do not depend on how a text is cut; or that of a shipped model."""
    tokenizer = shipped_tokenizer() if pieces else character_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def both(tokenizer: Any, task: str | None, length: int) -> tuple[Prompt, Prompt]:
    """A prompt in the chat template, and the one without it that leaves as much room for the text."""

    def write(length: int, chat: bool) -> Prompt:
        if task is None:
            return passkey_prompts(tokenizer, length, 1, 0, chat=chat)[0]
        return task_prompt(tokenizer, task, length, 0.5, chat=chat)

    return write(length, True), write(length, False)


@pytest.mark.parametrize("template", [TEMPLATE, DATED, ASKING])
@pytest.mark.parametrize("task", [None, *TASKS])
def test_a_prompt_is_the_rendered_conversation_to_the_token(task: str | None, template: str) -> None:
    tokenizer = chatting(template)
    length = 1500
    prompt, _ = both(tokenizer, task, length)
    assert len(prompt.tokens) + prompt.room == length
    text = "".join(tokenizer.convert_ids_to_tokens(prompt.tokens))
    begin = "<s>" + ("" if template == TEMPLATE else "26 Jul 2024\n") + "user.\n"
    assert text.startswith(begin)
    body, question, opening = text.removeprefix(begin).partition(" end\nassistant.\n")
    assert question and body.endswith("?"), "the question ends the message of the user"
    assert opening.endswith((" is", " are")) and "?" not in opening, "the assistant's begins with the answer"
    today = datetime.now().strftime("%d %b %Y")
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": body}], tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024"
    ).replace(today, "26 Jul 2024")  # the day of one that asks for it is fixed, too
    assert prompt.tokens == tokenizer(rendered + opening, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("task", [None, *TASKS])
def test_a_chat_asks_the_same_in_other_words_around_it(task: str | None) -> None:
    tokenizer = chatting(pieces=True)
    prompt, plain = both(tokenizer, task, 900)
    assert (len(prompt.tokens), prompt.room, len(prompt.answers)) == (
        len(plain.tokens),
        plain.room,
        len(plain.answers),
    )
    assert prompt.answers == plain.answers, "drawn from the same seed, length and trial"


def test_a_tokenizer_without_a_usable_template_is_refused() -> None:
    for template, message in (
        (None, "Expected a tokenizer with a chat template for chat=True"),
        ("{{ raise_exception('no users here') }}", "to render one message of a user, got no users here"),
        ("{{ messages[0].content.nothing() }}", "to render one message"),
        ("{{ bos_token }}", "to contain the message of the user once, got it 0 times"),
        ("{{ messages[0].content * 2 }}", "got it 2 times"),
    ):
        with pytest.raises(InvalidParameterError, match=message):
            passkey_prompts(chatting(template), 400, 1, 0, chat=True)


def run(tokenizer: Any, journal: Path | None = None, **options: Any) -> Any:
    model = shipped_model()
    documents = load_documents(NOVELS, limit=1)
    return compare(model, tokenizer, documents, ["none"], lengths=[384], passkey=2, journal=journal, **options)


def test_a_comparison_in_a_chat_template_says_so(tmp_path: Path) -> None:
    tokenizer = chatting(pieces=True)
    results = run(tokenizer, tmp_path / "journal.jsonl", chat=True)
    model = shipped_model()
    assert results.rows[0]["passkey"] == passkey_accuracy(model, tokenizer, [384], 2, chat=True)[384]
    assert results.provenance["chat"] is True
    assert any("in the chat template" in grid.title for grid in grids(results))
    for change in ({}, {"template": DATED}):  # neither another prompt nor another template goes on with this journal
        with pytest.raises(JournalError, match="chat is"):
            run(chatting(pieces=True, **change), tmp_path / "journal.jsonl", chat=bool(change))
    plain = run(tokenizer)
    assert not any("chat" in grid.title for grid in grids(plain))
    assert len(merge_runs({"chat": results, "plain": plain})) == 2, "two ways to ask do not become one run"
    del plain.provenance["chat"]  # as in results of earlier versions
    assert len(merge_runs({"earlier": plain, "plain": run(tokenizer)})) == 1


def test_what_the_command_refuses(tmp_path: Path) -> None:
    message = error_of(run_command(tmp_path / "out", "--chat"))
    assert "Expected passkey or retrieval with chat, got neither. Pass --passkey 4 or --retrieval 4 too" in message
    message = error_of(run_command(tmp_path / "out", "--chat", passkey=1))
    assert "with a chat template for --chat, got" in message and "leave chat out" in message
    assert not (tmp_path / "out").exists()
