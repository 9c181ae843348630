"""Contenders for a recommendation, their cost, and their measurement.

Contenders are plans of every applicable method, at a few factors and windows. Each task is measured once.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from ..decode import MAX_TOKENS
from ..diagnosis import diagnose
from ..diagnosis.weights import phase_table
from ..errors import (
    EvaluationError,
    InvalidParameterError,
    MethodNotApplicableError,
    PosExtError,
    UnsupportedModelError,
)
from ..evaluation.config import EvaluationConfig
from ..evaluation.forwards import check_positions
from ..evaluation.questions import Questions
from ..evaluation.rows import bootstrap_interval, pooled_perplexity
from ..evaluation.runner import RunJournal, measure, open_journal
from ..evaluation.setup import Refusals, Setup, check_request, prepare, run_identity, try_plans
from ..evaluation.tasks import MethodRun, Outcomes, Stage, Task, control_run, method_run
from ..evaluation.windows import CONTROL, control_windows
from ..methods import Composition, Decay, Fade, Method, RemapMethod, as_method, list_methods
from ..methods.base import components_of, hyper_parameters, without_each
from ..methods.text import by_reason
from ..patching import detect_scheme, unwrap
from ..patching.effect import differ
from ..patching.modes import evaluation_mode
from ..patching.observe import frequencies_in_force
from ..plan import ExtensionPlan
from ..scheme import PositionalScheme

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

STRETCHES = (1, 2)
"""Factors as multiples of target / trained length. Some methods, such as NTK, reach less far than their factor."""

FADES = (Fade(), Fade(strength=0.5), Decay())
"""Fades and decays composed with methods that remap far keys. Methods without one are also contenders."""

WINDOWS = (1 / 4, 1 / 2, 3 / 4)
"""Windows of methods that keep near distances unchanged, as shares of the trained length."""


class Candidates(NamedTuple):
    """Plans to choose from.

    Args:
        plans (`list[ExtensionPlan]`): plans to measure. Those at the needed factor come first, and among them those
            with default hyper-parameters.
        unseen (`list[ExtensionPlan]`): plans that leave unseen phases and are not measured.
        refusals (`dict[str, str]`): reason for each method that does not apply.
        twins (`dict[str, str]`): titles of contenders that equal another one up to the target length, with the title
            of that one. Only the latter is measured.
    """

    plans: list[ExtensionPlan]
    unseen: list[ExtensionPlan]
    refusals: Refusals
    twins: dict[str, str]


def candidates(
    model: nn.Module,
    scheme: PositionalScheme,
    methods: Sequence[str | Method] | None,
    trained_length: int,
    target_length: int,
) -> Candidates:
    """Return the plans for a target length, each applied to the model once and undone.

    By default, the methods are `none` and every registered one that extends by a factor. A plan that changes nothing
    is dropped if positions end before the target. If all plans leave unseen phases, all of them are measured.

    Raises:
        MethodNotApplicableError: no method applies, or only `none` applies and others were refused.
        UnknownMethodError, InvalidParameterError: a given method is unknown or has invalid parameters.
    """
    refusals: Refusals = {}
    effects: dict[str, ExtensionPlan] = {}
    variants = list(_variants(scheme, methods, trained_length))
    plain = [method for method in variants if not isinstance(method, Composition) and method.label == method.name]
    for stretch, method in itertools.product(STRETCHES, variants):
        reason = method.applies_to(scheme)
        if reason is not None:
            refusals[method.label] = reason
            continue
        free = method.needs_factor and method.factor is None
        try:
            longer = max(target_length, min(stretch * target_length, MAX_TOKENS))
            plan = method.plan(scheme, trained_length=trained_length, target_length=longer if free else None)
        except PosExtError as error:
            if methods is not None:
                raise
            if method in plain:  # windows and fades may not suit every factor, and only plain methods are reported
                refusals[method.label] = str(error)
        else:
            effects.setdefault(_effect(plan), plan)
    ends = scheme.ends and (scheme.shipped_length or 0) < target_length
    twins = {effect: twin for effect, plan in effects.items() if (twin := _twin(plan, effects, target_length))}
    plans = [plan for effect, plan in effects.items() if effect not in twins and not (plan.changes_nothing and ends)]
    for plan in plans:
        check_positions(scheme, plan, target_length)
    tried: Refusals = {}
    usable = try_plans(model, plans, tried)
    refusals |= tried
    if not usable or (refusals and all(plan.changes_nothing for plan in usable)):
        listing = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason(refusals).items())
        raise MethodNotApplicableError(
            f"Every method is refused, so nothing can be recommended: {listing or 'none was given'}. Keep inputs "
            f"within {trained_length} tokens."
        )
    unseen = _with_unseen_phases(model, usable, trained_length, target_length)
    seen = [plan for plan in usable if plan not in unseen]
    names = {title(*name_of(effects[effect])): title(*name_of(twin)) for effect, twin in twins.items()}
    return Candidates(seen or usable, unseen if seen else [], refusals, names)


def _variants(
    scheme: PositionalScheme, methods: Sequence[str | Method] | None, trained_length: int
) -> Iterator[Method]:
    """Yield methods with their defaults, then remapping methods with a fade or decay, then other windows."""
    if methods is not None:
        yield from map(as_method, methods)
        return
    defaults = [as_method(info.name) for info in list_methods(scheme.kind)]
    defaults = [method for method in defaults if method.needs_factor or method.name == "none"]
    yield from defaults
    for method in defaults:
        if isinstance(method, RemapMethod):
            yield from (method + fade for fade in FADES)
    for method in defaults:
        if "window" in hyper_parameters(type(method)):
            yield from (replace(method, window=round(share * trained_length)) for share in WINDOWS)  # type: ignore[call-arg]


def _effect(plan: ExtensionPlan) -> str:
    """Return a plan as text without its labels, so that plans with equal effects compare equal."""
    labels = ("method", "parameters", "factor", "target_length")
    return json.dumps({key: value for key, value in asdict(plan).items() if key not in labels})


def _twin(plan: ExtensionPlan, plans: Mapping[str, ExtensionPlan], length: int) -> ExtensionPlan | None:
    """Return the known plan, by effect, of a composition without a component that begins to act past a length."""
    for _, without in without_each(plan, components_of(plan) if len(plan.parameters) > 1 else ()):
        if (twin := plans.get(_effect(without))) is not None and not differ(plan, without, length - 1):
            return twin
    return None


def _with_unseen_phases(
    model: nn.Module, plans: Sequence[ExtensionPlan], trained_length: int, target_length: int
) -> list[ExtensionPlan]:
    """Return the plans that leave a rotary pair at unseen phases, as counted by the diagnosis."""
    scheme = plans[0].scheme
    if scheme.kind != "rotary" or not scheme.rotaries:
        return []
    named = {str(index): None if plan.changes_nothing else plan for index, plan in enumerate(plans)}
    in_force = frequencies_in_force(model, target_length)
    table = phase_table(scheme, in_force, named, trained_length, target_length)
    return [plans[int(index)] for index in dict.fromkeys(table[table.new].method)]


SHORT = "unpatched"
"""Label of the unpatched model at the trained length."""

Name = tuple[str, float]
"""Label and factor, which identify a contender."""

Sums = list[tuple[float, int]]
"""NLL and tokens of each document."""


class Ratio(NamedTuple):
    """Ratio of two perplexities on the same tokens, with its 95 % interval over documents; `None` for one document."""

    value: float
    ci95: list[float] | None


class Prices(NamedTuple):
    """Prices of contenders, in tokens processed by the model.

    `methods`, `short` (unpatched, at the trained length), and `control` are prices of one document. `guard` is the
    extra price of the first document, which is read again at the trained length to check that one pass is correct for
    both lengths. `passkeys` is the price of the passkeys of one method.
    """

    methods: tuple[int, ...]
    guard: int
    short: int
    control: int
    passkeys: int


@dataclass(eq=False)
class Sweep:
    """Sweep over contenders and documents, whose tasks are measured on request and only once.

    Args:
        model (`PreTrainedModel`): model without a patch.
        setup ([`Setup`]): documents at the trained and the target length.
        choice ([`Candidates`]): plans of the contenders.
        passkey (`int`): number of passkey trials at the target length, 0 for none.
        tokens (`int`): number of tokens that the requested measurements cost so far.
    """

    model: Any
    setup: Setup
    choice: Candidates
    passkey: int
    journal: RunJournal | None = None
    tokens: int = 0
    outcomes: Outcomes = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.trained, self.target = self.setup.lengths
        self.names = [name_of(plan) for plan in self.choice.plans]
        self.by_name = {name_of(plan): plan for plan in [*self.choice.plans, *self.choice.unseen]}
        self.runs = {name: method_run(self.setup, plan) for name, plan in self.by_name.items()}
        target = replace(self.setup, lengths=[self.target])
        questions = Questions(self.passkey, seed=self.setup.config.seed)
        self.questions = {name: replace(run, setup=target, questions=questions) for name, run in self.runs.items()}
        short = replace(self.setup, lengths=[self.trained])
        self.short = MethodRun(short, SHORT, 1.0, self.setup.scorer)
        self.control = control_run(self.setup, self.setup.scorer, self.trained)

    @property
    def documents(self) -> list[str]:
        """Ids of the documents, in reading order."""
        return self.setup.documents.ids

    @cached_property
    def control_tokens(self) -> int:
        """Number of tokens that the control reads per document."""
        return control_windows(self.target, self.trained) * self.trained

    def prices(self, names: Iterable[Name]) -> Prices:
        """Return the prices of contenders, in tokens."""
        methods = tuple(sum(lengths[-1] for lengths in self.runs[name].passes) for name in names)
        return Prices(methods, self.trained, self.trained, self.control_tokens, self.passkey * self.target)

    @property
    def exhaustive_tokens(self) -> int:
        """Cost of the unpatched model, all contenders, and the control on all documents, in tokens."""
        methods = [self._tokens_of(run, id) for run in self.runs.values() for id in self.documents]
        return sum(methods) + len(self.documents) * (self.trained + self.control_tokens)

    def read(self, names: Iterable[Name], documents: Sequence[str], progress: str) -> None:
        """Measure contenders, and the unpatched model at the trained length, on documents they have not read yet."""
        runs = [self.short, *(self.runs[name] for name in names)]
        self._measure([self._stage(progress, run, documents) for run in runs])

    def read_control(self, documents: Sequence[str]) -> None:
        """Measure the unpatched model on documents with truncated context."""
        self._measure([self._stage(CONTROL, self.control, documents)])

    def ask(self, names: Iterable[Name]) -> None:
        """Measure the passkey accuracy of contenders at the target length."""
        stages = []
        for name in names:
            tasks = [task for task in self._passkeys(name) if task not in self.outcomes]
            self.tokens += len(tasks) * self.passkey * self.target
            stages.append(self.questions[name].stage("passkeys")._replace(tasks=tasks))
        self._measure(stages)

    def accuracy(self, name: Name) -> float | None:
        """Return the share of passkeys found; `None` if not measured."""
        shares = [self.outcomes[task].value for task in self._passkeys(name) if task in self.outcomes]
        return shares[0][0] if shares and shares[0] else None

    def tail(self, name: Name, documents: Sequence[str]) -> float:
        """Return the perplexity of the second half of the target length; infinite after a failed document."""
        sums = self._tails(self.runs[name], documents)
        if sums is None:
            return math.inf
        nll, tokens = zip(*sums, strict=True)
        return float(pooled_perplexity(nll, tokens))

    def change(self, name: Name, documents: Sequence[str]) -> Ratio:
        """Return the relative change of perplexity inside the trained length."""
        sums = self._sums(self.runs[name], documents, self.trained)
        ratio = self._ratio(sums, self._sums(self.short, documents, self.trained))
        return Ratio(ratio.value - 1, ratio.ci95 and [end - 1 for end in ratio.ci95])

    def gain(self, name: Name, documents: Sequence[str]) -> Ratio:
        """Return the tail perplexity of the control divided by that of a contender.

        Raises:
            EvaluationError: the control failed on a document.
        """
        control = self._tails(self.control, documents)
        if control is None:
            raise EvaluationError("The unpatched model failed on the control. The log contains the reason.")
        return self._ratio(control, self._tails(self.runs[name], documents))

    def worse(self, name: Name, best: Name, documents: Sequence[str]) -> Ratio:
        """Return the tail perplexity of one contender divided by that of another."""
        return self._ratio(*(self._tails(self.runs[label], documents) for label in (name, best)))

    def losses_inside(self, documents: Sequence[str]) -> list[float]:
        """Return the loss of the unpatched model on each document inside the trained length, in nats per token.

        Raises:
            EvaluationError: the model failed on a document.
        """
        sums = self._sums(self.short, documents, self.trained)
        if sums is None:
            raise EvaluationError("The unpatched model failed inside its trained length. The log contains the reason.")
        return [nll / tokens for nll, tokens in sums]

    def failure(self, name: Name) -> str | None:
        """Return the reason for the first failure of a contender; `None` without failures."""
        outcomes = (self.outcomes[task] for task in self.runs[name].tasks if task in self.outcomes)
        return next((outcome.failure for outcome in outcomes if outcome.failure is not None), None)

    def seconds(self, name: Name | None) -> float | None:
        """Return the median seconds per document; `None` if not measured.

        A contender is timed at the target length, and the unpatched model (`name=None`) at the trained length.
        """
        run = self.short if name is None else self.runs[name]
        times = sorted(
            outcome.value["seconds"]
            for task in run.tasks
            if self.target in task.lengths or name is None
            if (outcome := self.outcomes.get(task)) is not None and outcome.failure is None
        )
        return times[len(times) // 2] if times else None

    def _stage(self, progress: str, run: MethodRun, documents: Sequence[str]) -> Stage:
        tasks = [task for task in run.tasks if task.document in documents and task not in self.outcomes]
        self.tokens += sum(self._tokens_of(run, id) for id in dict.fromkeys(str(task.document) for task in tasks))
        return Stage(progress, run.enter, tasks, partial(_timed, run.measure))

    def _measure(self, stages: list[Stage]) -> None:
        pending = [stage for stage in stages if stage.tasks]
        if pending:
            self.outcomes |= measure(pending, accelerator=self.setup.accelerator, journal=self.journal)

    def _passkeys(self, name: Name) -> list[Task]:
        return [task for task in self.questions[name].tasks if task.kind == "passkey"]

    def _tokens_of(self, run: MethodRun, document: str) -> int:
        """Return the tokens that a run reads of one document. The guard of a shared pass rereads part of the first."""
        if run.truncated:
            return self.control_tokens
        guarded = [lengths for lengths in run.passes if len(lengths) > 1 and document == self.documents[0]]
        return sum(lengths[-1] for lengths in run.passes) + sum(lengths[0] for lengths in guarded)

    def _tails(self, run: MethodRun, documents: Sequence[str]) -> Sums | None:
        return self._sums(run, documents, self.target, "tail_")

    def _sums(self, run: MethodRun, documents: Sequence[str], length: int, prefix: str = "") -> Sums | None:
        """Return the NLL and tokens of each document; `None` if one failed."""
        sums = {}
        for task in run.tasks:
            if task.document not in documents:
                continue
            outcome = self.outcomes[task]
            if outcome.failure is not None:
                return None
            for record in outcome.value["records"]:
                if record["length"] == length:
                    sums[task.document] = (record[f"{prefix}nll_sum"], record[f"{prefix}tokens"])
        return [sums[id] for id in documents]

    def _ratio(self, sums: Sums | None, reference: Sums | None) -> Ratio:
        if sums is None or reference is None:
            return Ratio(math.nan if reference is None else math.inf, None)
        difference = [a - b for (a, _), (b, _) in zip(sums, reference, strict=True)]
        tokens, seed = [count for _, count in sums], self.setup.config.seed
        return Ratio(float(pooled_perplexity(difference, tokens)), bootstrap_interval(difference, tokens, seed))


def title(method: str, factor: float) -> str:
    """Return the display name of a contender: the method, and its factor unless that is 1."""
    return method if factor == 1 else f"{method} x{factor:.4g}"


def name_of(plan: ExtensionPlan) -> Name:
    """Return the name of a contender. A plan that changes nothing has factor 1, as in a comparison."""
    return plan.method, 1.0 if plan.changes_nothing else plan.factor


def _timed(measure_task: Callable[[Task], Any], task: Task) -> dict[str, Any]:
    begin = time.perf_counter()
    records = measure_task(task)
    return {"seconds": time.perf_counter() - begin, "records": records}


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
    questions = Questions(passkey, seed=seed)
    questions.check(tokenizer, [target_length])
    setup = prepare(request, model, tokenizer, documents)
    settings = {"trained": trained, **questions.identity(base, tokenizer, [target_length])}
    identity = run_identity(setup, [base], [*choice.plans, *choice.unseen], recommend=settings)
    with evaluation_mode(base), open_journal(journal, identity, accelerator) as written:
        yield Sweep(base, setup, choice, passkey, written)
