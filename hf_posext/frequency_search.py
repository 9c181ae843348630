"""Search for rotary frequencies by LongRoPE's evolution, with native parameters as the result.

A genome contains a factor for every rotary pair, never smaller than that of a faster pair. Ding et al., *LongRoPE:
Extending LLM Context Window Beyond 2 Million Tokens*, 2024, redraw children that violate this order, up to twenty
times. Here isotonic regression restores the order, and no draw is lost.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from .packages import require

require("eval")

import numpy as np
from scipy.optimize import isotonic_regression
from torch import nn

from .decode import Bound, Count, Index
from .errors import (
    EvaluationError,
    InvalidParameterError,
    MethodNotApplicableError,
    RenamedAttribute,
    renamed_arguments,
)
from .escaping import html_table
from .evaluation.config import EvaluationConfig, checked, default_criterion
from .evaluation.key_tokens import key_search
from .evaluation.reading import write_atomically
from .evaluation.rows import pooled_perplexity
from .evaluation.runner import RunJournal, measure, open_journal
from .evaluation.setup import Setup, check_request, prepare, run_identity
from .evaluation.tasks import MethodRun, method_run
from .methods import NTK, LongRoPE, YaRN
from .methods.base import components_of
from .methods.rotary import first_rotary, frequencies, powers
from .methods.yarn import yarn_mscale
from .patching import detect_scheme
from .patching.modes import evaluation_mode
from .patching.patch import unpatched
from .plan import ExtensionPlan
from .scheme import PositionalScheme

if TYPE_CHECKING:
    import datasets
    import pandas as pd
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

    from .evaluation import Document

__all__ = ["SearchedFactors", "search"]

Population = Annotated[int, Bound("of at least 4", lambda number: number >= 4)]
"""Number of genomes: at least two parents, a mutation, and a crossing."""

Genome = tuple[float, ...]
"""Divisor of the frequency of each rotary pair, fastest first."""

DIGITS = 6
"""Decimals of a factor. Finer differences have no measurable effect, and rounded genomes compare reproducibly."""

RATE, SPREAD = 0.3, 0.2
"""Probability that a mutation changes a factor, as in LongRoPE, and standard deviation of the change of its log."""


def mutate(parent: Genome, largest: float, draw: np.random.Generator) -> Genome:
    """Return a genome with random factors multiplied by numbers near 1."""
    logs = np.log(parent)
    changed = draw.random(len(logs)) < RATE
    return ordered(logs + changed * draw.normal(0.0, SPREAD, len(logs)), largest)


def cross(first: Genome, second: Genome, largest: float, draw: np.random.Generator) -> Genome:
    """Return a genome with each factor from one parent or the other."""
    return ordered(np.log(np.where(draw.random(len(first)) < 0.5, first, second)), largest)


def ordered(logs: np.ndarray, largest: float) -> Genome:
    """Return the nearest non-decreasing factors between 1 and `largest`, from logarithms of factors."""
    nearest = np.clip(np.exp(isotonic_regression(logs).x), 1.0, largest)
    return tuple(round(float(factor), DIGITS) for factor in nearest)


@renamed_arguments(original_length="trained_length")
@checked
def search(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document] | Sequence[str] | datasets.Dataset | str,
    target_length: int,
    *,
    trained_length: Count | None = None,
    objective: Literal["tail", "key-tokens"] = "tail",
    attention_factor: float | None = None,
    population: Population = 32,
    generations: Count = 20,
    start: Index = 0,
    seed: int = 0,
    journal: str | Path | None = None,
    accelerator: Accelerator | None = None,
) -> SearchedFactors:
    """Search for the factor of every rotary pair that minimizes perplexity at a target length.

    The first population contains YaRN, NTK-aware interpolation, and mutations of them. In each generation the best
    `population // 2` genomes are parents of as many children: half of them mutations, half crossings. Factors are
    between 1 and `1 + target / trained` and never decrease from a fast pair to a slower one. Every genome is measured
    once on every document. The best genome is never lost. On these documents, the result is at least as good as the
    better seed.

    Args:
        model (`PreTrainedModel`): causal language model with rotary positions and without a patch. It is unchanged
            afterwards.
        tokenizer (`PreTrainedTokenizerBase`): tokenizer of the model.
        documents (`list[Document]`, or any input of [`load_documents`]): texts to search on. The result is fitted to
            them, so measure it on others.
        target_length (`int`): number of tokens to read, above the trained length.
        trained_length (`int`, *optional*): trained length in tokens, required if the config contains a wrong one.
        objective (`str`, *optional*, defaults to `"tail"`): perplexity to minimize. `"tail"` is that of the second
            half of the text. `"key-tokens"` is that of the tokens that need the long context ([`find_key_tokens`] with
            YaRN as the evaluator), after the needle-driven perplexity of LongRoPE2 (arXiv 2502.20082).
        attention_factor (`float`, *optional*): factor on cosine and sine, by default YaRN's `0.1 ln s + 1`. The seed
            then equals YaRN.
        population (`int`, *optional*, defaults to 32): number of genomes, at least 4.
        generations (`int`, *optional*, defaults to 20): number of generations, at least 1. Each replaces half of the
            population.
        start (`int`, *optional*, defaults to 0): number of tokens to skip at the beginning of each document, such as
            front matter.
        seed (`int`, *optional*, defaults to 0): seed of all random draws.
        journal (`str` or `Path`, *optional*): file to which each measurement is written at once. A killed search
            resumes from it with the same result. A finished search continues with more generations.
        accelerator (`Accelerator`, *optional*): accelerator of the processes that share the tasks.

    Returns:
        [`SearchedFactors`]: result with `plan`, `method`, `to_frame()`, `describe()`, and `save(path)`.

    Raises:
        AlreadyPatchedError: the model has a patch.
        MethodNotApplicableError: the positions are not rotary, or the model is not a causal language model.
        InvalidParameterError: the objective, population, number of generations, or target is out of bounds.
        DocumentError, UnsupportedModelError, JournalError: as in [`evaluate_perplexity`].
        EvaluationError: no genome could be measured on every document, or no token needs the long context.
    """
    base = unpatched(model)
    scheme = detect_scheme(base)
    yarn = check_search(scheme, target_length, trained_length, attention_factor)
    # Key tokens are found with YaRN, and its label selects it as the evaluator.
    longppl = yarn.method if objective == "key-tokens" else None
    config = EvaluationConfig(lengths=[target_length], start=start, seed=seed, longppl=longppl)
    request = check_request(config, scheme, base, accelerator)
    if request.protocol.name != "prefix":
        raise MethodNotApplicableError(f"Expected a causal language model, got {type(base).__name__}.")
    setup = prepare(request, model, tokenizer, documents)
    temperature = attention_factor or yarn_mscale(yarn.factor)
    trial = Trial(base, scheme, setup, yarn.trained_length, target_length, temperature)
    parents = seeds(scheme, yarn.trained_length, target_length)
    # Without the number of generations, because a finished search may be continued.
    conditions = {"objective": objective, "population": population}
    plans = [trial.plan(genome) for genome in parents.values()]
    identity = run_identity(setup, [base], plans, search=conditions)
    with evaluation_mode(base), open_journal(journal, identity, accelerator) as written:
        if objective == "key-tokens":
            trial = trial.on_key_tokens(yarn, written)
        run = partial(trial.perplexities, journal=written)
        perplexities, history = _evolve(run, list(parents.values()), population, generations, 1 + yarn.factor, seed)
    best = min(perplexities, key=lambda genome: (perplexities[genome], genome))
    settings = {"trained_length": yarn.trained_length, "population": population, "generations": generations}
    values = {name: perplexities[genome] for name, genome in parents.items()}
    return SearchedFactors(
        trial.plan(best), objective, perplexities[best], values, tuple(history), {**setup.provenance, **settings}
    )


def check_search(
    scheme: PositionalScheme,
    target_length: int,
    trained_length: int | None = None,
    attention_factor: float | None = None,
) -> ExtensionPlan:
    """Check the arguments of [`search`] that depend on the scheme. Return the plan of YaRN, one of the seeds.

    Raises:
        MethodNotApplicableError, InvalidParameterError: as in [`search`].
    """
    if scheme.kind != "rotary" or scheme.obstacle:
        why = scheme.obstacle or f"{scheme.model_type} has {scheme.kind} positions"
        raise MethodNotApplicableError(f"A search is of rotary frequencies, but {why}. See hf-posext recommend.")
    lengths = {"target_length": target_length, "trained_length": trained_length}
    yarn = YaRN(attention_factor=attention_factor).plan(scheme, **lengths)
    if target_length == yarn.trained_length:
        raise InvalidParameterError(
            f"Expected target_length above the trained length, got {target_length}, which needs no search."
        )
    return yarn


def seeds(scheme: PositionalScheme, trained_length: int, target_length: int) -> dict[str, Genome]:
    """Return the first genomes of a search: the factors of YaRN and of NTK-aware interpolation."""
    lengths = {"target_length": target_length, "trained_length": trained_length}
    plans = [method.plan(scheme, **lengths) for method in (YaRN(), NTK())]
    return {plan.method: factors_of(plan) for plan in plans}


def factors_of(plan: ExtensionPlan) -> Genome:
    """Return the divisor of each frequency of a plan, in the frequency set with the longest reach."""
    rotary = first_rotary(plan.scheme)
    planned = next(entry for entry in plan.rotaries if entry.name == rotary.name)
    factors = powers(rotary.theta, rotary).double() / frequencies(planned, rotary).double()
    return tuple(round(float(factor), DIGITS) for factor in factors)


def first_generation(parents: Sequence[Genome], count: int, largest: float, draw: np.random.Generator) -> list[Genome]:
    """Return `count` different genomes: the parents, then mutations of each parent in turn."""
    genomes = dict.fromkeys(parents)
    while len(genomes) < count:
        genomes[mutate(parents[len(genomes) % len(parents)], largest, draw)] = None
    return list(genomes)[:count]


def children_of(
    parents: Sequence[Genome], measured: set[Genome], count: int, largest: float, draw: np.random.Generator
) -> list[Genome]:
    """Return `count` genomes that are not among the `measured` ones: half mutations, half crossings."""
    children: dict[Genome, None] = {}
    while len(children) < count:
        first, second = (parents[index] for index in draw.choice(len(parents), 2, replace=False))
        child = mutate(first, largest, draw) if len(children) < count // 2 else cross(first, second, largest, draw)
        if child in measured or child in children:  # similar parents often yield a known child
            child = mutate(child, largest, draw)
        if child not in measured:
            children[child] = None
    return list(children)


def _evolve(
    run: Any, first: list[Genome], population: int, generations: int, largest: float, seed: int
) -> tuple[dict[Genome, float], list[dict[str, Any]]]:
    """Return the perplexities of all measured genomes, and the history by generation."""
    draw = np.random.default_rng(seed)
    perplexities: dict[Genome, float] = run(first_generation(first, population, largest, draw), name="generation 0")
    history = [{"generation": 0, "measured": len(perplexities), "best": min(perplexities.values())}]
    for generation in range(1, generations + 1):
        parents = sorted(perplexities, key=lambda genome: (perplexities[genome], genome))[: population // 2]
        children = children_of(parents, set(perplexities), population // 2, largest, draw)
        perplexities |= run(
            children, name=f"generation {generation} of {generations}, best {min(perplexities.values()):.2f}"
        )
        history.append({"generation": generation, "measured": len(perplexities), "best": min(perplexities.values())})
    return perplexities, history


@dataclass(frozen=True)
class Trial:
    """Measurement of genomes on documents, by the tokens of the second half or by `keys`."""

    model: Any
    scheme: PositionalScheme
    setup: Setup
    trained_length: int
    target_length: int
    attention_factor: float
    keys: Mapping[str, Sequence[int]] | None = None

    def plan(self, genome: Genome) -> ExtensionPlan:
        """Return the LongRoPE plan of a genome."""
        method = LongRoPE(long_factor=genome, attention_factor=self.attention_factor)
        lengths = {"target_length": self.target_length, "trained_length": self.trained_length}
        return method.plan(self.scheme, **lengths)

    def on_key_tokens(self, yarn: ExtensionPlan, journal: RunJournal | None) -> Trial:
        """Return a trial that scores only key tokens, which YaRN predicts much better with the long context.

        Raises:
            EvaluationError: no token needs the long context.
        """
        criterion = default_criterion({}, self.trained_length, self.target_length)
        finder = key_search(self.setup, criterion, [method_run(self.setup, yarn)])
        assert finder is not None
        keys, _ = finder.run(self.setup.accelerator, journal)
        if not any(keys.values()):
            raise EvaluationError(
                "No token of the documents needs the long context. Pass more documents, or objective='tail'."
            )
        return replace(self, keys=keys)

    def perplexities(self, genomes: Sequence[Genome], *, name: str, journal: RunJournal | None) -> dict[Genome, float]:
        """Return the perplexity of each genome over the scored tokens; infinite after a failed document.

        Raises:
            EvaluationError: no genome could be measured on every document.
        """
        runs = {genome: self._run(genome) for genome in genomes}
        stages = [run.stage(name) for run in runs.values()]
        outcomes = measure(stages, accelerator=self.setup.accelerator, journal=journal)
        values = {}
        for genome, run in runs.items():
            records, failures = run.by_document(outcomes)
            values[genome] = math.inf if failures else self._pooled([record for (record,) in records.values()])
        if all(map(math.isinf, values.values())):
            reason = next(iter(runs[genomes[0]].by_document(outcomes)[1].values()), "the loss is not finite")
            raise EvaluationError(f"no genome could be measured on every document: {reason}")
        return values

    def _run(self, genome: Genome) -> MethodRun:
        label = hashlib.sha256(repr(genome).encode()).hexdigest()[:16]
        return replace(method_run(self.setup, self.plan(genome)), label=label, factor=1.0, keys=self.keys)

    def _pooled(self, records: list[dict[str, Any]]) -> float:
        nll, tokens = ("tail_nll_sum", "tail_tokens") if self.keys is None else ("key_nll_sum", "key_tokens")
        return float(
            pooled_perplexity([record[nll] or 0.0 for record in records], [record[tokens] or 0 for record in records])
        )


@dataclass(frozen=True)
class SearchedFactors:
    """Best factors of a search, as a LongRoPE plan.

    The plan is native. A checkpoint saved with it loads in plain transformers, without this package.

    Args:
        plan (`ExtensionPlan`): plan of [`LongRoPE`] with the factors, for `patch_model`.
        objective (`str`): minimized perplexity, `"tail"` or `"key-tokens"`.
        perplexity (`float`): perplexity of the objective's tokens on the documents of the search, to which the factors
            are fitted. Expect a higher one on other documents.
        seeds (`Mapping[str, float]`): the same perplexity with the factors of YaRN and of NTK-aware interpolation.
        history (`tuple[Mapping, ...]`): an entry per `generation`, with the number of genomes `measured` so far and
            the `best` perplexity.
        provenance (`Mapping`): settings needed to repeat the search.
    """

    plan: ExtensionPlan
    objective: str
    perplexity: float
    seeds: Mapping[str, float]
    history: tuple[Mapping[str, Any], ...]
    provenance: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"SearchedFactors({self.describe()})"

    def _repr_html_(self) -> str:
        return html_table({"plan": self.plan.describe(), "result": self.describe()})

    @property
    def method(self) -> LongRoPE:
        """LongRoPE with the searched factors, for [`compare`] and `patch_model`."""
        (method,) = components_of(self.plan)
        assert isinstance(method, LongRoPE)
        return method

    def to_frame(self) -> pd.DataFrame:
        """Return the history with a row per generation."""
        import pandas

        return pandas.DataFrame(self.history)

    def describe(self) -> str:
        """Return the result in one line, compared with the better seed."""
        name = min(self.seeds, key=lambda seed: self.seeds[seed])
        gain = self.seeds[name] / self.perplexity - 1
        comparison = f"{100 * gain:.1f} % below {name}'s" if gain > 0 else f"no better than {name}'s"
        count = self.history[-1]["measured"]
        return (
            f"{self.objective} perplexity {self.perplexity:.2f} at {self.plan.target_length} tokens, {comparison} "
            f"{self.seeds[name]:.2f}, after {count} genomes; on the documents of the search: measure it on others"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        content = {entry.name: getattr(self, entry.name) for entry in fields(self)} | {"plan": self.plan.to_dict()}
        plain: dict[str, Any] = json.loads(json.dumps(content, allow_nan=False))
        return plain

    def save(self, path: str | Path) -> Path:
        """Write the plan to a file, for `ExtensionPlan.load`."""
        return write_atomically(path, json.dumps(self.plan.to_dict(), indent=2, allow_nan=False) + "\n")

    frame = RenamedAttribute("to_frame")
    save_plan = RenamedAttribute("save")
