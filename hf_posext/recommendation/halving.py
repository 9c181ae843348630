"""Successive halving over a sweep: what the budget pays for, what is best, and what is to be said of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..diagnosis.reading import require_skill
from ..errors import EvaluationError
from ..evaluation.scorer import model_name
from ..methods import NoExtension
from ..patching.signatures import cache_of
from .candidates import Candidates
from .recommendation import AS_IT_IS, EXTEND, TRUNCATE, Recommendation, title
from .schedule import schedule
from .sweep import Name, Ratio, Sweep, name_of

TIE = 0.005
"""Contenders whose tail perplexities are no farther apart than that are told apart by pass keys."""

PROBE = 16
"""Tokens of the forward that tells the size of the KV cache."""


@dataclass
class Halving:
    """
    Spends a budget on a sweep, and says what came of it.

    Args:
        sweep ([`Sweep`]): that measures.
        short_limit (`float`): the largest increase of perplexity allowed inside the trained length.
        budget (`int`): tokens that may go through the model.
    """

    sweep: Sweep
    short_limit: float
    budget: int

    def run(self, choice: Candidates) -> Recommendation:
        """
        Rung after rung, then the control, pass keys where they decide, and what the rest of the budget pays for.

        Raises:
            InvalidParameterError: the budget does not pay for one comparison.
            EvaluationError: the loss is no better than a guess, or every contender failed.
        """
        sweep, names = self.sweep, [name_of(plan) for plan in choice.plans]
        prices = sweep.prices(names)
        plan = schedule(len(sweep.documents), prices, self.budget)
        cut = names[plan.rungs[0].contenders :]
        left = names[: plan.rungs[0].contenders]
        measured: dict[Name, int] = {}
        for number, rung in enumerate(plan.rungs, 1):
            left = left[: rung.contenders]
            sweep.read(left, sweep.documents[: rung.documents], f"round {number} of {len(plan.rungs)}")
            if number == 1:
                self._require_skill(rung.documents)
            measured |= dict.fromkeys(left, rung.documents)
            left = self._ranked(left, rung.documents)
        reason = sweep.failure(left[0])
        if reason is not None:
            raise EvaluationError(f"every contender failed, so nothing can be recommended: {reason}")
        control = plan.control
        sweep.read_control(sweep.documents[:control])
        count = plan.rungs[-1].documents
        level = [name for name in left if self._level(name, left[0], count)]
        undecided = len(level) > 1 or sweep.gain(left[0], sweep.documents[:control]).value < 1
        if undecided and sweep.tokens + len(level) * prices.passkeys <= self.budget:
            sweep.ask(level)
            left.sort(key=lambda name: (name not in level, -(sweep.accuracy(name) or 0)))
        control, count = self._spend_the_rest(left, control, count)
        measured |= dict.fromkeys(left, count)
        return self._answer(choice, left[0], measured, control, cut)

    def _ranked(self, names: Sequence[Name], count: int) -> list[Name]:
        """Those within the limit first, and of these the ones that read the target best."""
        documents = self.sweep.documents[:count]

        def place(name: Name) -> tuple[bool, float]:
            return not self._within(name, documents), self.sweep.tail(name, documents)

        return sorted(names, key=place)

    def _within(self, name: Name, documents: Sequence[str]) -> bool:
        return self.sweep.change(name, documents).value <= self.short_limit

    def _level(self, name: Name, best: Name, count: int) -> bool:
        documents = self.sweep.documents[:count]
        same = self._within(name, documents) == self._within(best, documents)
        return same and self.sweep.worse(name, best, documents).value <= 1 + TIE

    def _spend_the_rest(self, left: Sequence[Name], control: int, count: int) -> tuple[int, int]:
        """First the control reads what finalists have read; then all of them read on."""
        sweep, prices = self.sweep, self.sweep.prices(left)
        while control < count and sweep.tokens + prices.control <= self.budget:
            control += 1
            sweep.read_control(sweep.documents[:control])
        more = sum(prices.methods) + prices.short + prices.control
        while control == count < len(sweep.documents) and sweep.tokens + more <= self.budget:
            control, count = control + 1, count + 1
            sweep.read(left, sweep.documents[:count], "finalists")
            sweep.read_control(sweep.documents[:control])
        return control, count

    def _require_skill(self, count: int) -> None:
        sweep = self.sweep
        losses = np.array(sweep.losses_inside(sweep.documents[:count]))
        require_skill(losses, sweep.model.get_input_embeddings().num_embeddings, model_name(sweep.model))

    def _answer(
        self, choice: Candidates, best: Name, measured: dict[Name, int], control: int, cut: Sequence[Name]
    ) -> Recommendation:
        sweep = self.sweep
        read = sweep.documents[:control]
        gain = sweep.gain(best, read)
        lines = {name: self._line(name, best, min(count, measured[best])) for name, count in measured.items()}
        answer = self._decide(best, gain, lines[best])
        plan = sweep.by_name[best]
        if answer == TRUNCATE:
            plan = NoExtension().plan(plan.scheme, trained_length=sweep.trained)
        unseen = {title(*name_of(one)): "leaves phases that training has never shown" for one in choice.unseen}
        unpaid = {title(*name): "the budget does not pay for it" for name in cut}
        notes = (f"The budget left {len(cut)} contenders unmeasured.",) if cut else ()
        lines = dict(sorted(lines.items(), key=lambda item: (-item[1]["documents"], item[1]["ratio"] or np.inf)))
        return Recommendation(
            model=model_name(sweep.model),
            answer=answer,
            plan=plan,
            trained_length=sweep.trained,
            target_length=sweep.target,
            best=lines[best],
            gain=gain.value,
            gain_ci95=_ends(gain),
            control_documents=control,
            short_limit=self.short_limit,
            contenders=tuple(lines.values()),
            cost={"tokens": sweep.tokens, "budget": self.budget, "exhaustive_tokens": sweep.exhaustive_tokens},
            use={
                "seconds": sweep.seconds(best),
                "seconds_trained": sweep.seconds(None),
                "cache_bytes_per_token": cache_bytes_per_token(sweep.model),
            },
            left_out={**choice.refusals, **unseen, **unpaid},
            notes=notes,
            provenance={**sweep.setup.provenance, "trained_length": sweep.trained},
        )

    def _decide(self, best: Name, gain: Ratio, line: dict[str, Any]) -> str:
        """Below a gain of 1, a contender that is level with truncation must find more pass keys than that can."""
        level = gain.ci95 is not None and gain.ci95[1] >= 1
        retrieves = (line["passkey"] or 0) > self.sweep.trained / self.sweep.target
        if not line["short_change"] <= self.short_limit or not (gain.value >= 1 or (level and retrieves)):
            return TRUNCATE
        return AS_IT_IS if self.sweep.by_name[best].changes_nothing else EXTEND

    def _line(self, name: Name, best: Name, count: int) -> dict[str, Any]:
        sweep, documents = self.sweep, self.sweep.documents[:count]
        ratio, change = sweep.worse(name, best, documents), sweep.change(name, documents)
        return {
            "method": name[0],
            "factor": name[1],
            "documents": count,
            "perplexity_tail": sweep.tail(name, documents),
            "ratio": ratio.value,
            "ratio_ci95": _ends(ratio),
            "short_change": change.value,
            "short_change_ci95": _ends(change),
            "passkey": sweep.accuracy(name),
            "failure": sweep.failure(name),
        }


def _ends(ratio: Ratio) -> tuple[float, float] | None:
    return None if ratio.ci95 is None else (ratio.ci95[0], ratio.ci95[1])


@torch.inference_mode()
def cache_bytes_per_token(model: Any) -> float | None:
    """Bytes of keys and values in all layers; `None` where the model keeps no such cache."""
    ids = torch.zeros(1, PROBE, dtype=torch.long, device=model.device)
    cache = cache_of(model(input_ids=ids, use_cache=True))
    tensors = [getattr(layer, name, None) for layer in getattr(cache, "layers", []) for name in ("keys", "values")]
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor)]
    return sum(sizes) / PROBE if sizes else None
