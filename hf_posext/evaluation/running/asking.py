"""What a model is asked about long texts, in a comparison: pass keys, and the tasks of retrieval."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...errors import InvalidParameterError
from ...patching.input_length import forget_length
from ..protocols.choice import DECODER_PROTOCOLS
from ..protocols.protocol import window_cost
from ..questions.passkey import passkey_accuracy, passkey_prompts
from ..questions.retrieval import NO_QUESTIONS, Questions, check_questions, retrieval
from .engine import Key, Outcomes, Unit
from .setup import Setup


@dataclass(frozen=True, eq=False)
class Asked:
    """
    Everything that is asked of a model with one method in force, at every length.

    Args:
        setup ([`Setup`]): the model, its tokenizer and the lengths.
        label (`str`): of the method.
        factor (`float`): of the method.
        passkey (`int`): pass-key trials at each length; 0 for none.
        questions ([`Questions`]): of retrieval.
    """

    setup: Setup
    label: str
    factor: float
    passkey: int
    questions: Questions

    def units(self) -> list[Unit]:
        """A unit for the pass keys of each length, and one for each task at each length."""
        units = [Unit(key, self.passkey * window_cost(n), partial(self._pass_keys, n)) for n, key in self._passkeys()]
        for (task, length), key in self._retrievals():
            prompts = len(self.questions.places(task)) * self.questions.trials
            units.append(Unit(key, prompts * window_cost(length), partial(self._retrieve, task, length)))
        return units

    def passkey_cells(self, length: int, outcomes: Outcomes) -> dict[str, Any]:
        """What the row of a length says of pass keys."""
        found = {n: outcomes[key].value for n, key in self._passkeys()}
        return {"passkey": found[length], "passkey_trials": self.passkey} if found else {}

    def retrieval_rows(self, outcomes: Outcomes) -> list[dict[str, Any]]:
        """What was retrieved: a row for each task, length and depth; the accuracy of those that failed is `None`."""
        rows = []
        for (task, length), key in self._retrievals():
            places = self.questions.places(task)
            accuracies = outcomes[key].value or [None] * len(places)
            for depth, accuracy in zip(places, accuracies, strict=True):
                row = {"method": self.label, "factor": self.factor, "task": task, "length": length, "depth": depth}
                rows.append({**row, "accuracy": accuracy, "trials": self.questions.trials})
        return rows

    def unanswered(self, name: str, outcomes: Outcomes) -> list[dict[str, Any]]:
        """What failed, and why."""
        asked = {
            **{key: {"passkey": f"{name} at {n}"} for n, key in self._passkeys()},
            **{key: {"retrieval": f"{name} on {task} at {n}"} for (task, n), key in self._retrievals()},
        }
        known = [(entry, outcomes[key].failure) for key, entry in asked.items() if key in outcomes]
        return [{**entry, "reason": failure} for entry, failure in known if failure is not None]

    def _passkeys(self) -> list[tuple[int, Key]]:
        lengths = self.setup.lengths if self.passkey else []
        return [(length, ("passkey", self.label, self.factor, length)) for length in lengths]

    def _retrievals(self) -> list[tuple[tuple[str, int], Key]]:
        return [
            ((task, length), ("retrieval", self.label, self.factor, task, length))
            for length, task in itertools.product(self.setup.lengths, self.questions.tasks)
        ]

    def _pass_keys(self, length: int) -> float:
        model, seed = self.setup.scorer.model, self.setup.options.seed
        forget_length(model)
        return passkey_accuracy(model, self.setup.tokenizer, [length], self.passkey, seed)[length]

    def _retrieve(self, task: str, length: int) -> list[float]:
        """The accuracy at each depth of the task."""
        model, seed = self.setup.scorer.model, self.setup.options.seed
        trials, _, depths = self.questions
        forget_length(model)
        rows = retrieval(model, self.setup.tokenizer, [length], tasks=[task], depths=depths, trials=trials, seed=seed)
        return [row["accuracy"] for row in rows]


def check_asking(
    setup: Setup,
    passkey: int,
    trials: int,
    tasks: Sequence[str] | None = None,
    depths: Sequence[float] | None = None,
) -> Questions:
    """
    The questions of retrieval; what cannot be asked is refused, before anything long begins.

    Raises:
        InvalidParameterError: fewer than no trials, tasks or depths that cannot be or without trials, a model that
            does not continue texts, or a length that is too short.
    """
    for name, count in (("passkey", passkey), ("retrieval", trials)):
        if count < 0:
            raise InvalidParameterError(f"{name} is {count}; give the number of trials, or 0 for none")
        if count and setup.protocol.name not in DECODER_PROTOCOLS:
            raise InvalidParameterError(
                f"{name} is {count}, and {type(setup.scorer.model).__name__} does not continue a text as a decoder "
                "does; give 0"
            )
        if count and setup.options.memory.accelerator is not None:
            raise InvalidParameterError(
                f"{name} is {count}, and a model spread over processes by cp_size does not generate; "
                "give 0, and ask in a run without cp_size"
            )
    for name, value in (("tasks", tasks), ("depths", depths)):
        if value is not None and not trials:
            raise InvalidParameterError(f"{name} is {list(value)}, and retrieval is 0; give retrieval=4, say, too")
    tokenizer, seed = setup.tokenizer, setup.options.seed
    for length in setup.lengths if passkey else ():
        passkey_prompts(tokenizer, length, passkey, seed)
    questions = check_questions(trials, tasks, depths) if trials else NO_QUESTIONS
    for length, task in itertools.product(setup.lengths, questions.tasks):
        questions.prompts(tokenizer, task, length, seed)
    return questions
