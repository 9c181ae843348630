"""Retrieval from long texts by task, length and depth: what perplexity alone does not show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import nn

from ...errors import InvalidParameterError
from ...patching.modes import evaluation_mode
from ..scoring.scorer import TokenScorer
from ..texts.tokens import Bos, check_lengths
from .passkey import ask
from .tasks import TASKS, TaskPrompt, answer_room, score, task_prompt

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Questions(NamedTuple):
    """What is asked at each length: `trials` prompts of each task at each depth."""

    trials: int
    tasks: tuple[str, ...]
    depths: tuple[float, ...]

    @property
    def facts(self) -> dict[str, Any]:
        """What results say of them; nothing where there are none."""
        return {"retrieval": self._asdict()} if self.trials else {}

    def places(self, task: str) -> tuple[float | None, ...]:
        """The depths of a task; one that is `None` where it has none."""
        return self.depths if TASKS[task].has_depth else (None,)

    def prompts(self, tokenizer: Any, task: str, length: int, seed: int, bos: Bos = "auto") -> list[TaskPrompt]:
        """All trials of a task at a length, depth by depth."""
        return [
            task_prompt(tokenizer, task, length, depth, trial=trial, seed=seed, bos=bos)
            for depth in self.places(task)
            for trial in range(self.trials)
        ]


NO_QUESTIONS = Questions(0, (), ())


def retrieval(
    model: nn.Module,
    tokenizer: Any,
    lengths: Sequence[int],
    *,
    tasks: Sequence[str] = tuple(TASKS),
    depths: Sequence[float] = DEPTHS,
    trials: int = 4,
    seed: int = 0,
    bos: Bos = "auto",
    on_step: Callable[[int], Any] | None = None,
) -> list[dict[str, Any]]:
    """
    Share of what was hidden in a text that greedy decoding gives back, by task, length and depth.

    The prompts are [`task_prompt`]'s, the same for every model and method; answers count as [`score`] says. Shorter
    lengths come first.

    Args:
        model (`PreTrainedModel`): a causal language model, patched or not.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        lengths (`Sequence[int]`): tokens of prompt and answer together.
        tasks (`Sequence[str]`, *optional*): names, as in `tasks=["passkey", "multi-key"]`; all five by default.
        depths (`Sequence[float]`, *optional*, defaults to `(0, 0.25, 0.5, 0.75, 1)`): places in the text, from 0
            (beginning) to 1 (end).
        trials (`int`, *optional*, defaults to 4): prompts per task, length and depth.
        seed (`int`, *optional*, defaults to 0): of the prompts.
        bos (`str`, *optional*, defaults to `"auto"`): whether BOS stands first: as the tokenizer has it, `"always"`,
            or `"never"`.
        on_step (`Callable[[int], Any]`, *optional*): called with 1 after each task at each length (a progress bar).

    Returns:
        `list[dict]`: rows of `task`, `length`, `depth` (`None` for `common-words`, which has none), `accuracy` from 0
        to 1 (the mean score of the trials) and `trials`.

    Raises:
        InvalidParameterError: an unknown task, a depth outside of 0 to 1, no trials, or a length that does not hold
            the prompt.
        UnsupportedModelError: no causal language model.
    """
    ascending = check_lengths(lengths)
    asked = check_questions(trials, tasks, depths)
    unwrapped = TokenScorer(model).model
    rows = []
    with evaluation_mode(unwrapped):
        for length in ascending:
            for task in asked.tasks:
                prompts = asked.prompts(tokenizer, task, length, seed, bos)
                answers = ask(unwrapped, tokenizer, [p.tokens for p in prompts], answer_room(tokenizer, task))
                scores = [score(answer, prompt.answers) for answer, prompt in zip(answers, prompts, strict=True)]
                for index, depth in enumerate(asked.places(task)):
                    accuracy = sum(scores[index * trials : (index + 1) * trials]) / trials
                    rows.append(
                        {"task": task, "length": length, "depth": depth, "accuracy": accuracy, "trials": trials}
                    )
                if on_step is not None:
                    on_step(1)
    return rows


def check_questions(trials: int, tasks: Sequence[str] | None, depths: Sequence[float] | None) -> Questions:
    """
    The questions, all tasks and the usual depths where not given.

    Raises:
        InvalidParameterError: an unknown task, a depth outside of 0 to 1, or no trials.
    """
    tasks, depths = tuple(TASKS) if tasks is None else tasks, DEPTHS if depths is None else depths
    if isinstance(tasks, str) or not tasks or set(tasks) - set(TASKS) or len(set(tasks)) < len(tasks):
        raise InvalidParameterError(f"tasks is {tasks!r}; give a list of some of {', '.join(TASKS)}, each once")
    if not depths or not all(0 <= depth <= 1 for depth in depths) or len(set(depths)) < len(depths):
        raise InvalidParameterError(f"depths is {list(depths)}; give numbers from 0 to 1, each once")
    if trials < 1:
        raise InvalidParameterError(f"trials is {trials}; give the number of prompts per length and depth, 1 or more")
    return Questions(trials, tuple(tasks), tuple(map(float, depths)))
