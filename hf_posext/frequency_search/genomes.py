"""Genomes: a factor for every rotary pair, never smaller than that of a faster pair.

Ding et al., 2024: LongRoPE, https://arxiv.org/abs/2402.13753. There children that break the order are drawn again, up
to twenty times; here they are put in order, by the nearest numbers that are (isotonic regression), so that no draw is
lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression

from ..methods import NTK, YaRN
from ..methods.frequencies import first_rotary, frequencies, powers
from ..plan import ExtensionPlan
from ..scheme import PositionalScheme

Genome = tuple[float, ...]
"""A factor for each pair, fastest first; the frequency is divided by it."""

DIGITS = 6
"""Decimals of a factor: far below what any text shows, and two searches tell their genomes apart by them."""


@dataclass(frozen=True)
class Breeding:
    """
    Mutation and crossing of genomes.

    Args:
        largest (`float`): the largest factor; 1 is the smallest.
        rate (`float`, *optional*, defaults to 0.3): the chance of each pair to change in a mutation, as in LongRoPE.
        spread (`float`, *optional*, defaults to 0.2): standard deviation of the change, in the logarithm of a factor.
    """

    largest: float
    rate: float = 0.3
    spread: float = 0.2

    def mutate(self, parent: Genome, draw: np.random.Generator) -> Genome:
        """Some factors times a number near 1."""
        logs = np.log(parent)
        chosen = draw.random(len(logs)) < self.rate
        return self.ordered(logs + chosen * draw.normal(0.0, self.spread, len(logs)))

    def cross(self, one: Genome, other: Genome, draw: np.random.Generator) -> Genome:
        """Each factor from one parent or the other."""
        return self.ordered(np.log(np.where(draw.random(len(one)) < 0.5, one, other)))

    def ordered(self, logs: np.ndarray) -> Genome:
        """The nearest factors that do not fall, within the bounds."""
        nearest = np.clip(np.exp(isotonic_regression(logs).x), 1.0, self.largest)
        return tuple(round(float(factor), DIGITS) for factor in nearest)


def seeds(scheme: PositionalScheme, trained_length: int, target_length: int) -> dict[str, Genome]:
    """The factors of YaRN and of NTK-aware interpolation, which the search begins with.

    Args:
        scheme (`PositionalScheme`): rotary.
        trained_length, target_length (`int`): in tokens.
    """
    lengths = {"target_length": target_length, "trained_length": trained_length}
    plans = [method.plan(scheme, **lengths) for method in (YaRN(), NTK())]
    return {plan.method: factors_of(plan) for plan in plans}


def factors_of(plan: ExtensionPlan) -> Genome:
    """Divisors of each frequency in a plan, in the set that reaches farthest."""
    rotary = first_rotary(plan.scheme)
    planned = next(entry for entry in plan.rotaries if entry.name == rotary.name)
    factors = powers(rotary.theta, rotary).double() / frequencies(planned, rotary).double()
    return tuple(round(float(factor), DIGITS) for factor in factors)


def first_generation(
    parents: Sequence[Genome], count: int, breeding: Breeding, draw: np.random.Generator
) -> list[Genome]:
    """The parents, and mutations of them in turn, all different."""
    found = dict.fromkeys(parents)
    while len(found) < count:
        found[breeding.mutate(parents[len(found) % len(parents)], draw)] = None
    return list(found)[:count]


def children_of(
    parents: Sequence[Genome], known: set[Genome], count: int, breeding: Breeding, draw: np.random.Generator
) -> list[Genome]:
    """Half of them mutations, half crossings, none of them known.

    Args:
        parents (`Sequence[Genome]`): two or more.
        known (`set[Genome]`): those that were measured.
        count (`int`): how many children.
        breeding ([`Breeding`]): how they are made.
        draw (`numpy.random.Generator`): of all chance.
    """
    found: dict[Genome, None] = {}
    while len(found) < count:
        one, other = (parents[index] for index in draw.choice(len(parents), 2, replace=False))
        child = breeding.mutate(one, draw) if len(found) < count // 2 else breeding.cross(one, other, draw)
        if child in known or child in found:  # parents that agree cross to what is known
            child = breeding.mutate(child, draw)
        if child not in known:
            found[child] = None
    return list(found)
