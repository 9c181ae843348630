"""Candidates for a recommendation: every method that applies, at a few factors and windows, as plans."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import NamedTuple

from torch import nn

from ..diagnosis.phases import phase_table
from ..errors import MethodNotApplicableError, PosExtError
from ..evaluation.memory import check_positions
from ..evaluation.setup import Refusals, try_plans
from ..methods import Composition, Fade, Method, RemapMethod, as_method, list_methods
from ..methods.base import hyper_parameters
from ..methods.text import by_reason
from ..patching.observe import frequencies_in_force
from ..plan import ExtensionPlan
from ..scheme import PositionalScheme

STRETCHES = (1, 2)
"""Factors, as multiples of target / trained length: some methods reach less far than their factor says (NTK)."""

FADES = (1.0, 0.5)
"""Strengths of a fade on top of methods with a band of far keys; without one they are contenders in any case."""

WINDOWS = (1 / 4, 1 / 2, 3 / 4)
"""Windows of methods that keep near distances as they are, as shares of the trained length."""


class Candidates(NamedTuple):
    """
    Plans to choose from.

    Args:
        plans (`list[ExtensionPlan]`): worth measuring; those at the needed factor first, and first those of defaults.
        unseen (`list[ExtensionPlan]`): that leave phases which training has never shown; not measured.
        refusals (`dict[str, str]`): reasons of the methods that do not apply.
    """

    plans: list[ExtensionPlan]
    unseen: list[ExtensionPlan]
    refusals: Refusals


def candidates(
    model: nn.Module,
    scheme: PositionalScheme,
    methods: Sequence[str | Method] | None,
    trained_length: int,
    target_length: int,
) -> Candidates:
    """
    All plans for a target, without those that leave unseen phases.

    Args:
        model (`PreTrainedModel`): without a patch; each plan is put in force once, and undone.
        scheme (`PositionalScheme`): what it has.
        methods (`Sequence[str | Method]`, *optional*): what to choose from; where not given, `none` (unless positions
            come to an end) and every method of the registry that extends by a factor.
        trained_length, target_length (`int`): in tokens.

    Raises:
        MethodNotApplicableError: nothing applies, or nothing but `none` where others were refused.
        UnknownMethodError, InvalidParameterError: of a method that was given.
    """
    refusals: Refusals = {}
    found: dict[str, ExtensionPlan] = {}
    variants = list(_variants(scheme, methods, trained_length))
    plain = [method for method in variants if not isinstance(method, Composition) and method.label == method.name]
    for stretch, method in itertools.product(STRETCHES, variants):
        reason = method.applies_to(scheme)
        if reason is not None:
            refusals[method.label] = reason
            continue
        try:
            plan = _plan(method, scheme, trained_length, stretch * target_length)
        except PosExtError as error:
            if methods is not None:
                raise
            if method in plain:  # not every window or fade goes with every factor
                refusals[method.label] = str(error)
        else:
            found.setdefault(_effect(plan), plan)
    ends = scheme.ends and (scheme.shipped_length or 0) < target_length
    plans = [plan for plan in found.values() if not (plan.changes_nothing and ends)]
    for plan in plans:
        check_positions(scheme, plan, target_length)
    tried: Refusals = {}
    usable = try_plans(model, plans, tried)
    refusals |= tried
    if not usable or (refusals and all(plan.changes_nothing for plan in usable)):
        told = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason(refusals).items())
        raise MethodNotApplicableError(
            f"every method is refused, so nothing can be recommended: {told or 'none was given'}; keep inputs within "
            f"{trained_length} tokens"
        )
    unseen = _with_unseen_phases(model, scheme, usable, trained_length, target_length)
    kept = [plan for plan in usable if plan not in unseen]
    return Candidates(kept, unseen, refusals) if kept else Candidates(usable, [], refusals)


def _variants(
    scheme: PositionalScheme, methods: Sequence[str | Method] | None, trained_length: int
) -> Iterator[Method]:
    """The methods with their defaults, those that remap with a fade, then the same with other windows."""
    if methods is not None:
        yield from map(as_method, methods)
        return
    chosen = [as_method(info.name) for info in list_methods(scheme.kind)]
    chosen = [method for method in chosen if method.needs_factor or method.name == "none"]
    yield from chosen
    for method in chosen:
        if isinstance(method, RemapMethod):
            yield from (method + Fade(strength=strength) for strength in FADES)
    for method in chosen:
        if "window" in hyper_parameters(type(method)):
            yield from (replace(method, window=round(share * trained_length)) for share in WINDOWS)  # type: ignore[call-arg]


def _plan(method: Method, scheme: PositionalScheme, trained_length: int, target_length: int) -> ExtensionPlan:
    if not method.needs_factor:
        return method.plan(scheme, trained_length=trained_length)
    length = {} if method.factor is not None else {"target_length": target_length}
    return method.plan(scheme, trained_length=trained_length, **length)


def _effect(plan: ExtensionPlan) -> str:
    """Effect of a plan, whatever it is called: a default window is that window, and some factors change nothing."""
    called = ("method", "parameters", "factor", "target_length")
    return json.dumps({key: value for key, value in asdict(plan).items() if key not in called})


def _with_unseen_phases(
    model: nn.Module,
    scheme: PositionalScheme,
    plans: Sequence[ExtensionPlan],
    trained_length: int,
    target_length: int,
) -> list[ExtensionPlan]:
    """Those that leave a rotary pair at phases which training has not shown, as the diagnosis counts them."""
    if scheme.kind != "rotary" or not scheme.rotaries:
        return []
    named = {str(index): None if plan.changes_nothing else plan for index, plan in enumerate(plans)}
    in_force = frequencies_in_force(model, target_length)
    table = phase_table(scheme, in_force, named, trained_length, target_length)
    return [plans[int(index)] for index in dict.fromkeys(table[table.new].method)]
