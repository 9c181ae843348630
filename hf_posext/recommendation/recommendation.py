"""Recommendation from a model, documents, and a budget, by successive halving.

All contenders read a few documents, the better third reads twice as many, and so on (Jamieson and Talwalkar, 2016,
arXiv 1502.07943). The unit of the budget is one token processed by the model. Tokens add up over documents and methods
and do not depend on the machine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..decode import Bound, Count, Index
from ..diagnosis.reading import require_skill
from ..errors import EvaluationError, InvalidParameterError, RenamedAttribute, renamed_arguments
from ..escaping import html_table, visible
from ..evaluation.config import checked
from ..evaluation.reading import write_atomically
from ..evaluation.scorer import model_name
from ..methods import NoExtension
from ..patching.modes import cache_of
from ..plan import ExtensionPlan
from .sweep import Name, Prices, Ratio, Sweep, name_of, prepared, title

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


EXTEND, AS_IT_IS, TRUNCATE = "extend", "as it is", "truncate"
"""Answers: apply a method, use the unpatched model, or truncate because no method is worth it."""


@dataclass(frozen=True)
class Recommendation:
    """Result of [`recommend`]: the method for longer texts, if any.

    Args:
        model (`str`): name of the model.
        answer (`str`): `"extend"`, `"as it is"`, or `"truncate"`.
        plan (`ExtensionPlan`): plan for `patch_model`. With `"truncate"`, it changes nothing and ends at the trained
            length.
        trained_length, target_length (`int`): lengths in tokens.
        best (`Mapping`): entry of `contenders` that ranks first within the limit, or first of all if none is within
            the limit. It is set even if truncation is better.
        gain (`float`): tail perplexity of the control at the target, divided by that of the best contender. Above 1
            the longer context helps.
        gain_ci95 (`tuple[float, float]`, *optional*): paired 95 % interval over documents; `None` for one document.
        control_documents (`int`): number of documents for the gain.
        short_limit (`float`): largest relative increase of perplexity allowed inside the trained length.
        contenders (`tuple[Mapping, ...]`): an entry for each measured contender, those with most documents first:
            `method`, `factor`, `documents`, `perplexity_tail`, `ratio` to the best on the same documents,
            `ratio_ci95`, `short_change`, `short_change_ci95`, `passkey`, `failure`.
        cost (`Mapping`): `tokens` processed by the model, the `budget`, and `exhaustive_tokens`, the cost of all
            contenders on all documents.
        use (`Mapping`): cost in use: `seconds` for the target length with the best contender, `seconds_trained` for
            the trained length with the unpatched model, and `cache_bytes_per_token` of the KV cache. Each may be
            `None`.
        left_out (`Mapping[str, str]`): reason for each method and contender that was not measured.
        notes (`tuple[str, ...]`): further remarks.
        provenance (`Mapping`): settings needed to repeat the measurement.
    """

    model: str
    answer: str
    plan: ExtensionPlan
    trained_length: int
    target_length: int
    best: Mapping[str, Any]
    gain: float
    gain_ci95: tuple[float, float] | None
    control_documents: int
    short_limit: float
    contenders: tuple[Mapping[str, Any], ...]
    cost: Mapping[str, int]
    use: Mapping[str, float | None]
    left_out: Mapping[str, str]
    notes: tuple[str, ...]
    provenance: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"Recommendation({visible(self.model)}: {visible(self._answer())})"

    def _repr_html_(self) -> str:
        return html_table({"model": self.model, "plan": self.plan.describe(), "text": self.describe()})

    def to_frame(self) -> pd.DataFrame:
        """Return the contenders as a table."""
        return pd.DataFrame(self.contenders)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types. Non-finite numbers become `None`."""
        content = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        text = json.dumps(
            {**_plain(content | {"plan": self.plan.to_dict()}), "text": self.describe()}, allow_nan=False
        )
        plain: dict[str, Any] = json.loads(text)
        return plain

    def save(self, path: str | Path) -> Path:
        """Write the plan to a file, for `ExtensionPlan.load`."""
        return write_atomically(path, json.dumps(self.plan.to_dict(), indent=2, allow_nan=False) + "\n")

    def describe(self) -> str:
        """Return the answer, its certainty, and its cost in a few sentences."""
        sentences = (self._answer(), self._certainty(), self._inside(), self._use(), self._finetuning(), *self.notes)
        return " ".join(filter(None, sentences))

    frame = RenamedAttribute("to_frame")
    save_plan = RenamedAttribute("save")
    text = RenamedAttribute("describe")

    def _answer(self) -> str:
        best, plural = _title(self.best), "s" if self.control_documents > 1 else ""
        evidence = (
            f"gain over truncation {self.gain:.3f}{_span(self.gain_ci95)}, {self.control_documents} document{plural}"
        )
        if self.answer == EXTEND:
            return f"Use {best} to read {self.target_length} tokens ({evidence})."
        if self.answer == AS_IT_IS:
            return f"Change nothing: the model reads {self.target_length} tokens as it is ({evidence})."
        advice = f"Do not extend: truncate the input to the last {self.trained_length} tokens."
        if not self.best["short_change"] <= self.short_limit:
            limit = _percent(self.short_limit)
            return f"{advice} No contender keeps the change inside the trained length within {limit}."
        return f"{advice} Under the limit {best} reads {self.target_length} tokens best, yet no better ({evidence})."

    def _certainty(self) -> str:
        rivals = [line for line in self.contenders if line is not self.best and line["failure"] is None]
        within = [line for line in rivals if line["short_change"] <= self.short_limit]
        second = self._second([line for line in within if line["documents"] == self.best["documents"]])
        beyond = min((line for line in rivals if line not in within), key=lambda line: line["ratio"], default=None)
        if beyond is None or beyond["ratio"] >= 1:
            return second
        return (
            f"{second} {_title(beyond)} reads the target better (by {_percent(1 - beyond['ratio'])}), but is over the "
            f"limit: inside the trained length it changes perplexity by {_percent(beyond['short_change'])}."
        )

    def _second(self, finalists: list[Mapping[str, Any]]) -> str:
        if not finalists:
            return "No other contender came as far."
        second = min(finalists, key=lambda line: line["ratio"])
        span = second["ratio_ci95"]
        behind = span is not None and span[0] > 1
        sure = "clearly behind" if behind else "which the documents cannot tell apart from it"
        keys = ""
        if second["passkey"] is not None and self.best["passkey"] is not None:
            keys = f"; it finds {second['passkey']:.0%} of the passkeys, the first {self.best['passkey']:.0%}"
        times = f"{second['ratio']:.3f} times its perplexity{_span(span)}"
        return f"Next is {_title(second)} with {times}, {sure}{keys}."

    def _inside(self) -> str:
        span = self.best["short_change_ci95"]
        ends = "" if span is None else f" [{_percent(span[0])}, {_percent(span[1])}]"
        return (
            f"Inside the trained {self.trained_length} tokens {_title(self.best)} changes perplexity by "
            f"{_percent(self.best['short_change'])}{ends}."
        )

    def _use(self) -> str:
        costs = []
        seconds, trained, size = self.use["seconds"], self.use["seconds_trained"], self.use["cache_bytes_per_token"]
        if seconds and trained:
            costs.append(
                f"reading {self.target_length} tokens took {seconds:.2g} s here, and {self.trained_length} tokens "
                f"without it {trained:.2g} s"
            )
        if size:
            before, after = (size * length / 2**20 for length in (self.trained_length, self.target_length))
            costs.append(f"the KV cache grows from {before:.3g} to {after:.3g} MiB")
        return f"In use, {'; '.join(costs)}." if costs else ""

    def _finetuning(self) -> str:
        if self.answer == EXTEND:
            return "What fine-tuning would add was not measured (hf-posext finetune)."
        return "What fine-tuning would add was not measured."


def _title(line: Mapping[str, Any]) -> str:
    return "the model as it is" if line["method"] == "none" else title(line["method"], line["factor"])


def _span(ends: Any) -> str:
    """Format an interval as `" [0.980, 1.010]"`; `None` as an empty text."""
    return "" if ends is None else f" [{ends[0]:.3f}, {ends[1]:.3f}]"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
            quarter of the exhaustive sweep, or the cost of all contenders on one document if that is more.
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
        if budget is None:  # a quarter of a few contenders on a few documents does not cover one document for each
            budget = max(least_tokens(sweep.prices(sweep.names)), round(SHARE * sweep.exhaustive_tokens))
        return Halving(sweep, short_limit, budget).run()


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
        self._require_success(contenders[0])
        control = plan.control
        sweep.read_control(sweep.documents[:control])
        count = plan.rungs[-1].documents
        level = [name for name in contenders if self._level(name, contenders[0], count)]
        undecided = len(level) > 1 or sweep.gain(contenders[0], sweep.documents[:control]).value < 1
        if undecided and sweep.tokens + len(level) * prices.passkeys <= self.budget:
            sweep.ask(level)
        control, count = self._spend_the_rest(contenders, control, count)
        counts |= dict.fromkeys(contenders, count)
        # The documents read last may have changed the order.
        contenders = self._ranked(contenders, count)
        self._require_success(contenders[0])
        level = [name for name in contenders if self._level(name, contenders[0], count)]
        contenders.sort(key=lambda name: (name not in level, -(sweep.accuracy(name) or 0)))
        return self._answer(contenders[0], counts, control, cut)

    def _require_success(self, first: Name) -> None:
        reason = self.sweep.failure(first)
        if reason is not None:
            raise EvaluationError(f"Every contender failed, so nothing can be recommended: {reason}")

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
    least = least_tokens(prices._replace(methods=prices.methods[:1]))
    raise InvalidParameterError(
        f"Expected a budget of at least {least} tokens (one method and the control on one document), got {budget}. "
        "Pass more, or a smaller target_length."
    )


def least_tokens(prices: Prices) -> int:
    """Return the cost of the contenders and the control on one document."""
    return _halved(len(prices.methods), 1, 1, 1).tokens(prices)


def _halved(contenders: int, first: int, documents: int, control: int) -> Schedule:
    rungs = [Rung(contenders, first)]
    while rungs[-1].contenders > FINALISTS:
        fewer = max(FINALISTS, math.ceil(rungs[-1].contenders / RATE))
        rungs.append(Rung(fewer, min(2 * rungs[-1].documents, documents)))
    return Schedule(rungs, min(control, rungs[-1].documents))
