"""Recommendation from a model, documents, and a budget, by successive halving.

All contenders read a few documents, the better third reads twice as many, and so on (Jamieson and Talwalkar, 2016,
arXiv 1502.07943). The unit of the budget is one token processed by the model. Tokens add up over documents and methods
and do not depend on the machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..decode import Bound, Count, Index
from ..deprecation import renamed_arguments
from ..diagnosis import diagnose
from ..diagnosis.reading import require_skill
from ..errors import EvaluationError, InvalidParameterError, UnsupportedModelError
from ..evaluation.config import EvaluationConfig, checked
from ..evaluation.journal import open_journal, run_identity
from ..evaluation.questions import Questions
from ..evaluation.scorer import model_name
from ..evaluation.setup import check_request, prepare
from ..methods import NoExtension
from ..patching import detect_scheme, unwrap
from ..patching.modes import cache_of, evaluation_mode
from .recommendation import AS_IT_IS, EXTEND, TRUNCATE, Recommendation, title
from .sweep import Name, Prices, Ratio, Sweep, candidates, name_of

if TYPE_CHECKING:
    import datasets
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

    from ..evaluation import Document
    from ..methods import Method

SHARE = 0.25
"""Default budget, as a share of the cost of the exhaustive sweep."""

RATE = 3
"""Reduction of contenders per rung. One in three advances to the next rung, which doubles the documents."""

FINALISTS = 3
"""Contenders in the last rung: the winner and two runners-up, which show the certainty of the choice."""

CONTROL_DOCUMENTS = 2
"""Documents for the control. It reads each token about seven times, and two documents suffice for a first estimate."""

TIE = 0.005
"""Relative difference of tail perplexity up to which contenders are level. Passkeys decide between them."""

PROBE = 16
"""Tokens of the forward pass that measures the size of the KV cache."""


@renamed_arguments(original_length="trained_length")
@checked
def recommend(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document] | Sequence[str] | datasets.Dataset | str,
    target_length: int,
    budget: Count | None = None,
    *,
    methods: Sequence[str | Method] | None = None,
    short_limit: Annotated[float, Bound("of at least 0", lambda limit: limit >= 0)] = 0.01,
    trained_length: Count | None = None,
    passkey: Index = 5,
    start: Index = 0,
    seed: int = 0,
    journal: str | Path | None = None,
    accelerator: Accelerator | None = None,
) -> Recommendation:
    """Find the best method and factor for a target length within a budget of tokens.

    The diagnosis provides the trained length. Methods that leave rotary phases unseen in training are not measured
    unless no others remain. The contenders are methods at one and two times the needed factor, and with several
    windows. They are measured by successive halving: all of them on a few documents, the better third on twice as
    many, and so on. Contenders within `short_limit` rank first, then those with the lower perplexity on the second
    half of the target length. Finally, the control (the unpatched model with its context truncated to the trained
    length) shows whether the longer context helps. Passkeys decide between level contenders.

    Args:
        model (`PreTrainedModel`): causal language model without a patch. It is unchanged afterwards.
        tokenizer (`PreTrainedTokenizerBase`): tokenizer of the model.
        documents (`list[Document]`, or any input of [`load_documents`]): texts at least as long as the target. Six or
            more are recommended, because intervals are computed over documents.
        target_length (`int`): number of tokens to read, above the trained length.
        budget (`int`, *optional*): maximum number of tokens processed by the model, never exceeded. By default a
            quarter of the exhaustive sweep, or the cost of one comparison if that is more.
        methods (`Sequence[str | Method]`, *optional*): methods to choose from, by default all applicable ones.
        short_limit (`float`, *optional*, defaults to 0.01): largest relative increase of perplexity allowed inside the
            trained length. 0.01 is one per cent.
        trained_length (`int`, *optional*): trained length in tokens, required if the diagnosis cannot find it.
        passkey (`int`, *optional*, defaults to 5): number of passkey trials for level finalists, 0 for none.
        start (`int`, *optional*, defaults to 0): number of tokens to skip at the beginning of each document, such as
            front matter.
        seed (`int`, *optional*, defaults to 0): seed of intervals and passkeys.
        journal (`str` or `Path`, *optional*): file to which each measurement is written at once. An interrupted run
            resumes from it, even with a larger budget.
        accelerator (`Accelerator`, *optional*): accelerator of the processes that share the documents.

    Returns:
        [`Recommendation`]: result with `answer`, `plan`, `describe()`, `to_frame()`, and `save(path)`.

    Raises:
        InvalidParameterError: the target is not above the trained length, the budget does not cover one comparison, or
            an option is out of bounds.
        MethodNotApplicableError: every method is refused.
        DocumentError: there are no documents, or none is as long as the target.
        EvaluationError: the loss is no better than a guess, or every contender failed.
        AlreadyPatchedError, UnsupportedModelError, JournalError: as in [`evaluate_perplexity`].
    """
    with prepared(
        model, tokenizer, documents, target_length, methods=methods, trained_length=trained_length,
        passkey=passkey, start=start, seed=seed, journal=journal, accelerator=accelerator,
    ) as sweep:  # fmt: skip
        if budget is None:  # a quarter may not cover one comparison
            budget = max(least_tokens(sweep.prices(sweep.names)), round(SHARE * sweep.exhaustive_tokens))
        return Halving(sweep, short_limit, budget).run()


def check_target(target_length: int, trained_length: int, source: str) -> None:
    """Refuse a target that the model reads without a method; `source` is that of the trained length."""
    if target_length <= trained_length:
        raise InvalidParameterError(
            f"Expected target_length above the trained length of {trained_length} tokens ({source}), got "
            f"{target_length}, which needs no method. Pass trained_length= if the model was trained on less."
        )


@contextmanager
def prepared(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    documents: Any,
    target_length: int,
    *,
    methods: Sequence[str | Method] | None = None,
    trained_length: int | None = None,
    passkey: int = 0,
    start: int = 0,
    seed: int = 0,
    journal: str | Path | None = None,
    accelerator: Accelerator | None = None,
) -> Iterator[Sweep]:
    """Yield a sweep without measurements, after all early checks; arguments as in [`recommend`]."""
    base = unwrap(model)
    scheme = detect_scheme(base)
    diagnosis = diagnose(base, methods=[], trained_length=trained_length)
    trained = diagnosis.trained_length
    if trained is None:
        raise InvalidParameterError(
            f"The trained length of {diagnosis.model} is not known ({diagnosis.trained_length_source}). Pass "
            "trained_length= in tokens."
        )
    check_target(target_length, trained, diagnosis.trained_length_source)
    request = check_request(
        EvaluationConfig(lengths=[trained, target_length], start=start, seed=seed), scheme, base, accelerator
    )
    if request.protocol.name != "prefix":
        raise UnsupportedModelError(
            f"Expected a causal language model, got {type(base).__name__}. Use hf-posext compare for others."
        )
    choice = candidates(base, scheme, methods, trained, target_length)
    Questions(passkey, seed=seed).check(tokenizer, [target_length])
    setup = prepare(request, model, tokenizer, documents)
    settings = {"trained": trained, "passkey": passkey}
    identity = run_identity(setup, [base], [*choice.plans, *choice.unseen], recommend=settings)
    with evaluation_mode(base), open_journal(journal, identity, accelerator) as written:
        yield Sweep(base, setup, choice, passkey, written)


@dataclass
class Halving:
    """Successive halving over a sweep, within a budget of tokens; `short_limit` is that of [`recommend`]."""

    sweep: Sweep
    short_limit: float
    budget: int

    def run(self) -> Recommendation:
        """Run all rungs and the control, then passkeys if needed, and spend the rest of the budget on documents.

        Raises:
            InvalidParameterError: the budget does not cover one comparison.
            EvaluationError: the loss is no better than a guess, or every contender failed.
        """
        sweep, names = self.sweep, self.sweep.names
        prices = sweep.prices(names)
        plan = schedule(len(sweep.documents), prices, self.budget)
        cut = names[plan.rungs[0].contenders :]
        contenders = names[: plan.rungs[0].contenders]
        counts: dict[Name, int] = {}
        for number, rung in enumerate(plan.rungs, 1):
            contenders = contenders[: rung.contenders]
            sweep.read(contenders, sweep.documents[: rung.documents], f"round {number} of {len(plan.rungs)}")
            if number == 1:
                self._require_skill(rung.documents)
            counts |= dict.fromkeys(contenders, rung.documents)
            contenders = self._ranked(contenders, rung.documents)
        reason = sweep.failure(contenders[0])
        if reason is not None:
            raise EvaluationError(f"Every contender failed, so nothing can be recommended: {reason}")
        control = plan.control
        sweep.read_control(sweep.documents[:control])
        count = plan.rungs[-1].documents
        level = [name for name in contenders if self._level(name, contenders[0], count)]
        undecided = len(level) > 1 or sweep.gain(contenders[0], sweep.documents[:control]).value < 1
        if undecided and sweep.tokens + len(level) * prices.passkeys <= self.budget:
            sweep.ask(level)
            contenders.sort(key=lambda name: (name not in level, -(sweep.accuracy(name) or 0)))
        control, count = self._spend_the_rest(contenders, control, count)
        counts |= dict.fromkeys(contenders, count)
        return self._answer(contenders[0], counts, control, cut)

    def _ranked(self, names: Sequence[Name], count: int) -> list[Name]:
        """Return the contenders in order: those within the limit first, then by tail perplexity at the target."""
        documents = self.sweep.documents[:count]
        return sorted(names, key=lambda name: (not self._within(name, documents), self.sweep.tail(name, documents)))

    def _within(self, name: Name, documents: Sequence[str]) -> bool:
        return self.sweep.change(name, documents).value <= self.short_limit

    def _level(self, name: Name, best: Name, count: int) -> bool:
        documents = self.sweep.documents[:count]
        both_within = self._within(name, documents) == self._within(best, documents)
        return both_within and self.sweep.worse(name, best, documents).value <= 1 + TIE

    def _spend_the_rest(self, contenders: Sequence[Name], control: int, count: int) -> tuple[int, int]:
        """Return the document counts of control and finalists after the control catches up and all read on."""
        sweep, prices = self.sweep, self.sweep.prices(contenders)
        while control < count and sweep.tokens + prices.control <= self.budget:
            control += 1
            sweep.read_control(sweep.documents[:control])
        price = sum(prices.methods) + prices.short + prices.control
        while control == count < len(sweep.documents) and sweep.tokens + price <= self.budget:
            control, count = control + 1, count + 1
            sweep.read(contenders, sweep.documents[:count], "finalists")
            sweep.read_control(sweep.documents[:control])
        return control, count

    def _require_skill(self, count: int) -> None:
        losses, model = np.array(self.sweep.losses_inside(self.sweep.documents[:count])), self.sweep.model
        require_skill(losses, model.get_input_embeddings().num_embeddings, model_name(model))

    def _answer(self, best: Name, counts: dict[Name, int], control: int, cut: Sequence[Name]) -> Recommendation:
        sweep = self.sweep
        read = sweep.documents[:control]
        gain = sweep.gain(best, read)
        lines = {name: self._line(name, best, min(count, counts[best])) for name, count in counts.items()}
        answer = self._decide(best, gain, lines[best])
        plan = sweep.by_name[best]
        if answer == TRUNCATE:
            plan = NoExtension().plan(plan.scheme, trained_length=sweep.trained)
        choice = sweep.choice
        unseen = {
            title(*name_of(contender)): "leaves phases that training has never shown" for contender in choice.unseen
        }
        twins = {contender: f"equals {twin} up to {sweep.target} tokens" for contender, twin in choice.twins.items()}
        unpaid = {title(*name): "the budget does not pay for it" for name in cut}
        notes = [f"The budget left {len(cut)} contenders unmeasured (see left_out)."] if cut else []
        if twins:
            notes.append(f"{len(twins)} more equal another contender up to {sweep.target} tokens (see left_out).")
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
            left_out={**choice.refusals, **twins, **unseen, **unpaid},
            notes=tuple(notes),
            provenance={**sweep.setup.provenance, "trained_length": sweep.trained},
        )

    def _decide(self, best: Name, gain: Ratio, line: dict[str, Any]) -> str:
        """Return the answer for the best contender.

        Below a gain of 1, it must be level with truncation and find more passkeys than truncation can.
        """
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
    """Return the bytes per token of key and value states in all layers; `None` without a KV cache."""
    ids = torch.zeros(1, PROBE, dtype=torch.long, device=model.device)
    cache = cache_of(model(input_ids=ids, use_cache=True))
    tensors = [getattr(layer, name, None) for layer in getattr(cache, "layers", []) for name in ("keys", "values")]
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor)]
    return sum(sizes) / PROBE if sizes else None


class Rung(NamedTuple):
    """Round in which each contender reads a number of documents."""

    contenders: int
    documents: int


class Schedule(NamedTuple):
    """Rungs within a budget, and the minimum number of documents that the control reads.

    The documents of a rung include those of earlier rungs. The rest of the budget pays for passkeys, if they are
    needed, and for more documents.
    """

    rungs: list[Rung]
    control: int

    def tokens(self, prices: Prices) -> int:
        """Return the largest possible cost, in tokens."""
        first = self.rungs[0].contenders
        dearest = sorted(prices.methods[:first], reverse=True)
        total, before = first * prices.guard, 0
        for rung in self.rungs:
            total += sum(dearest[: rung.contenders]) * (rung.documents - before)
            before = rung.documents
        return total + before * prices.short + self.control * prices.control


def schedule(documents: int, prices: Prices, budget: int) -> Schedule:
    """Return the fullest schedule within a budget.

    The first rung reads as many documents as the budget allows. If the budget does not cover one document, the control
    reads only one document, and then contenders are dropped from the end.

    Raises:
        InvalidParameterError: the budget does not cover one method and the control on one document.
    """
    contenders = len(prices.methods)
    full = [_halved(contenders, first, documents, CONTROL_DOCUMENTS) for first in range(documents, 0, -1)]
    fewer = [_halved(count, 1, documents, 1) for count in range(contenders, 0, -1)]
    for candidate in (*full, *fewer):
        if candidate.tokens(prices) <= budget:
            return candidate
    least = least_tokens(prices)
    raise InvalidParameterError(
        f"Expected a budget of at least {least} tokens (one method and the control on one document), got {budget}. "
        "Pass more, or a smaller target_length."
    )


def least_tokens(prices: Prices) -> int:
    """Return the cost of one comparison: the first contender and the control on one document."""
    return _halved(1, 1, 1, 1).tokens(prices)


def _halved(contenders: int, first: int, documents: int, control: int) -> Schedule:
    rungs = [Rung(contenders, first)]
    while rungs[-1].contenders > FINALISTS:
        fewer = max(FINALISTS, math.ceil(rungs[-1].contenders / RATE))
        rungs.append(Rung(fewer, min(2 * rungs[-1].documents, documents)))
    return Schedule(rungs, min(control, rungs[-1].documents))
