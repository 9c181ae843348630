"""Questions about hidden information in a long text: passkeys, and retrieval by task, length, and depth."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..errors import InvalidParameterError
from ..patching.checkpoint import require_vocabulary
from ..patching.modes import evaluation_mode
from ..patching.undo import unwrap
from .config import MAX_TRIALS, checked
from .prompts import QUESTION, TASKS, Prompt, chat_frame, passkey_prompts, task_prompt
from .scorer import BATCH_TOKENS, TokenScorer
from .tokens import Bos, check_lengths

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Questions:
    """Questions of a run, the same for every model and method.

    `passkey` is the number of passkey trials per length, each at a random depth. `trials` is the number of prompts per
    task, length, and depth. See [`retrieval`] for the remaining fields.
    """

    passkey: int = 0
    trials: int = 0
    tasks: tuple[str, ...] = ()
    depths: tuple[float, ...] = ()
    seed: int = 0
    bos: Bos = "auto"
    chat: bool = False

    @property
    def facts(self) -> dict[str, Any]:
        """Settings of retrieval for the provenance; empty without retrieval."""
        settings = {"trials": self.trials, "tasks": self.tasks, "depths": self.depths}
        return {"retrieval": settings} if self.trials else {}

    def identity(self, model: Any, tokenizer: Any, lengths: Sequence[int]) -> dict[str, Any]:
        """Return all that affects the answers, except for the seed, and the model but for its EOS tokens."""
        template = {"chat": "".join(chat_frame(tokenizer, QUESTION))} if self.chat else {}
        facts = {"passkey": self.passkey, **self.facts, **template}
        if not (self.passkey or self.trials):
            return facts
        digest = hashlib.sha256()
        for length, task in self._tasks(lengths):
            prompts = [prompt.tokens for prompt in self.prompts(tokenizer, task, length)]
            digest.update(repr((prompts, tokenizer.batch_decode(prompts))).encode())  # answers are decoded, too
        return {**facts, "prompts": digest.hexdigest(), "eos": unwrap(model).generation_config.eos_token_id}

    def places(self, task: str | None) -> tuple[float | None, ...]:
        """Return the depths of a task; a single `None` for `common-words` (no depth) and passkeys (random depths)."""
        return self.depths if task is not None and TASKS[task].has_depth else (None,)

    def count(self, task: str | None) -> int:
        """Return the number of prompts of a task at one length."""
        return self.passkey if task is None else len(self.places(task)) * self.trials

    def prompts(self, tokenizer: Any, task: str | None, length: int) -> list[Prompt]:
        """Return all trials of a task, or of passkeys, at a length, ordered by depth."""
        require_vocabulary(tokenizer)
        if task is None:
            return passkey_prompts(tokenizer, length, self.passkey, self.seed, self.bos, self.chat)
        rules: dict[str, Any] = {"seed": self.seed, "bos": self.bos, "chat": self.chat}
        return [
            task_prompt(tokenizer, task, length, depth, trial=trial, **rules)
            for depth in self.places(task)
            for trial in range(self.trials)
        ]

    def check(self, tokenizer: Any, lengths: Sequence[int]) -> None:
        """Check that every length holds the prompts.

        Raises:
            InvalidParameterError: a length is too short, or `chat` is set and the tokenizer has no usable template.
        """
        for length, task in self._tasks(lengths):
            self.prompts(tokenizer, task, length)

    def _tasks(self, lengths: Sequence[int]) -> Iterable[tuple[int, str | None]]:
        return itertools.product(lengths, [*([None] if self.passkey else []), *self.tasks])

    def ask(
        self, model: nn.Module, tokenizer: Any, task: str | None, length: int, new_tokens: int | None = None
    ) -> list[float]:
        """Return the mean score of the greedy answers at each depth of [`places`], from 0 to 1.

        `length` is the number of tokens of prompt and answer together. `new_tokens` defaults to the room that the
        prompt reserves for its answer.
        """
        prompts = self.prompts(tokenizer, task, length)
        answers = ask(model, tokenizer, [prompt.tokens for prompt in prompts], new_tokens or prompts[0].room)
        scores = [score(answer, prompt.answers) for answer, prompt in zip(answers, prompts, strict=True)]
        trials = len(scores) // len(self.places(task))
        return [sum(scores[start : start + trials]) / trials for start in range(0, len(scores), trials)]


NO_QUESTIONS = Questions()


def check_questions(
    trials: int, tasks: Sequence[str] | None = None, depths: Sequence[float] | None = None, **settings: Any
) -> Questions:
    """Return the checked questions of retrieval. The default is all tasks at five depths.

    Raises:
        InvalidParameterError: an unknown task, a depth outside of 0 to 1, or no trials.
    """
    tasks, depths = tuple(TASKS) if tasks is None else tasks, DEPTHS if depths is None else depths
    if not tasks or set(tasks) - set(TASKS) or len(set(tasks)) < len(tasks):
        raise InvalidParameterError(
            f"Expected tasks to be some of {', '.join(TASKS)}, each once, got {list(tasks)}. Pass tasks=['passkey']."
        )
    if not depths or not all(0 <= depth <= 1 for depth in depths) or len(set(depths)) < len(depths):
        raise InvalidParameterError(f"Expected depths from 0 to 1, each once, got {list(depths)}. Pass depths=[0, 1].")
    if not 1 <= trials <= MAX_TRIALS:
        raise InvalidParameterError(f"Expected 1 to {MAX_TRIALS:,} trials per length and depth, got {trials}.")
    return Questions(trials=trials, tasks=tuple(tasks), depths=tuple(map(float, depths)), **settings)


@checked
def passkey_accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    trials: int,
    seed: int = 0,
    bos: Bos = "auto",
    *,
    chat: bool = False,
    max_new_tokens: int | None = None,
    on_length: Callable[[], Any] | None = None,
) -> dict[int, float]:
    """Measure the share of passkeys that greedy decoding returns, by length.

    Args:
        model (`PreTrainedModel`): a causal language model, patched or not.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        lengths (`Sequence[int]`): tokens of prompt and answer together.
        trials (`int`): prompts per length, each with a different random key and depth.
        seed (`int`, *optional*, defaults to 0): seed of keys and depths.
        bos (`str`, *optional*, defaults to `"auto"`): BOS before the prompt: `"auto"` for the tokenizer's default,
            `"always"`, or `"never"`.
        chat (`bool`, *optional*, defaults to `False`): ask in the chat template of the tokenizer.
        max_new_tokens (`int`, *optional*): tokens to generate. The default is the length of the longest key plus two.
        on_length (`Callable`, *optional*): called after each length (a progress bar).

    Returns:
        `dict[int, float]`: length to accuracy, from 0 to 1. An answer is right if it begins with the key, and
            no digit follows.

    Raises:
        InvalidParameterError: no trials, a length that does not hold the prompt, or no chat template.
        UnsupportedModelError: not a causal language model.
    """
    if not 1 <= trials <= MAX_TRIALS:
        raise InvalidParameterError(f"Expected 1 to {MAX_TRIALS:,} trials per length, got {trials}.")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise InvalidParameterError(f"Expected max_new_tokens of 1 or more, got {max_new_tokens}.")
    questions = Questions(passkey=trials, seed=seed, bos=bos, chat=chat)
    unwrapped = TokenScorer(model).model
    accuracy = {}
    with evaluation_mode(unwrapped):
        for length in check_lengths(lengths):
            (accuracy[length],) = questions.ask(unwrapped, tokenizer, None, length, max_new_tokens)
            if on_length is not None:
                on_length()
    return accuracy


@checked
def retrieval(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    *,
    tasks: Sequence[str] | None = None,
    depths: Sequence[float] | None = None,
    trials: int = 4,
    seed: int = 0,
    bos: Bos = "auto",
    chat: bool = False,
    on_step: Callable[[int], Any] | None = None,
) -> list[dict[str, Any]]:
    """Measure the share of hidden items that greedy decoding returns, by task, length, and depth.

    Prompts are created by [`task_prompt`], the same for every model and method, and answers are scored by [`score`].
    Shorter lengths come first.

    Args:
        model (`PreTrainedModel`): a causal language model, patched or not.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        lengths (`Sequence[int]`): tokens of prompt and answer together.
        tasks (`Sequence[str]`, *optional*): names, for example `tasks=["passkey", "multi-key"]`. The default is all
            five.
        depths (`Sequence[float]`, *optional*, defaults to `(0, 0.25, 0.5, 0.75, 1)`): depths in the text, from 0
            (beginning) to 1 (end).
        trials (`int`, *optional*, defaults to 4): prompts per task, length, and depth.
        seed (`int`, *optional*, defaults to 0): seed of the prompts.
        bos (`str`, *optional*, defaults to `"auto"`): BOS before the prompt: `"auto"` for the tokenizer's default,
            `"always"`, or `"never"`.
        chat (`bool`, *optional*, defaults to `False`): ask in the chat template of the tokenizer.
        on_step (`Callable[[int], Any]`, *optional*): called with 1 after each task at each length (a progress bar).

    Returns:
        `list[dict]`: rows of `task`, `length`, `depth` (`None` for `common-words`), `accuracy` from 0 to 1 (the mean
        score of the trials), and `trials`.

    Raises:
        InvalidParameterError: an unknown task, a depth outside of 0 to 1, no trials, a length that does not hold the
            prompt, or no chat template.
        UnsupportedModelError: not a causal language model.
    """
    ascending = check_lengths(lengths)
    questions = check_questions(trials, tasks, depths, seed=seed, bos=bos, chat=chat)
    unwrapped = TokenScorer(model).model
    rows = []
    with evaluation_mode(unwrapped):
        for length, task in itertools.product(ascending, questions.tasks):
            accuracies = questions.ask(unwrapped, tokenizer, task, length)
            rows += [
                {"task": task, "length": length, "depth": depth, "accuracy": accuracy, "trials": trials}
                for depth, accuracy in zip(questions.places(task), accuracies, strict=True)
            ]
            if on_step is not None:
                on_step(1)
    return rows


def score(answer: str, answers: Sequence[str]) -> float:
    """Score an answer from 0 to 1.

    One item: 1 if the answer begins with it, ignoring leading white space, and no digit follows it. Several items: the
    share of them in the answer as whole words, in any order. The answer has no room to list many other words.
    """
    if len(answers) == 1:
        return float(re.match(rf"\s*{answers[0]}(?!\d)", answer) is not None)
    return sum(re.search(rf"\b{item}\b", answer) is not None for item in answers) / len(answers)


def ask(model: Any, tokenizer: Any, prompts: Sequence[list[int]], new_tokens: int) -> list[str]:
    """Return the greedy answers to prompts of equal length, without special tokens."""
    answers: list[str] = []
    per_batch = max(1, BATCH_TOKENS // (len(prompts[0]) + new_tokens))
    for start in range(0, len(prompts), per_batch):
        batch = torch.tensor(prompts[start : start + per_batch], device=model.device)
        output = generate_greedily(model, batch, new_tokens)
        answers += tokenizer.batch_decode(output[:, batch.shape[1] :], skip_special_tokens=True)
    return answers


class WholeConfig(GenerationConfig):  # type: ignore[misc]
    """Generation config without gaps, from which `generate` takes every value.

    `generate` fills the fields that are `None` from the model's own config: suppressed tokens, penalties, guidance, a
    time limit. `None` looks like a gap, so this class refuses to be filled, and has the defaults of
    transformers from the beginning.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**GenerationConfig._get_default_generation_params(), **kwargs})

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> Any:
        """Return the unused arguments, as in transformers. Values for gaps are ignored."""
        return {} if defaults_only else super().update(allow_custom_entries=allow_custom_entries, **kwargs)


def generate_greedily(model: Any, input_ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Continue a batch without padding greedily, with the EOS and padding tokens of the model's generation config."""
    shipped = unwrap(model).generation_config
    eos, pad = shipped.eos_token_id, shipped.pad_token_id
    config = WholeConfig(
        max_length=input_ids.shape[1] + new_tokens,
        eos_token_id=eos,
        pad_token_id=pad if pad is not None else (eos[0] if isinstance(eos, list) else eos),
    )
    output: torch.Tensor = model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config
    )
    return output
