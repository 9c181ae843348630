"""Which of the methods that were asked for apply to a model, and why the others do not."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from ...errors import InvalidParameterError, MethodNotApplicableError, NoEffectError, UnsupportedModelError
from ...methods import Method, as_method, list_methods
from ...methods.refusals import by_reason
from ...patching import patch_model
from ...plan import ExtensionPlan
from ...scheme import PositionalScheme

logger = logging.getLogger(__name__)

Refusals = dict[str, str]
"""Reasons by the label of the method."""


def plan_methods(
    scheme: PositionalScheme, methods: Sequence[str | Method], **lengths: Any
) -> tuple[list[ExtensionPlan], Refusals]:
    """
    The plans of the methods that apply to a scheme, `none` first, and the reasons of those that do not.

    Args:
        scheme (`PositionalScheme`): what the model has.
        methods (`Sequence[str | Method]`): names or method objects, of any scheme.
        lengths: `factor`, `target_length` and `trained_length`, as `Method.plan` takes them.

    Raises:
        UnknownMethodError: no such method.
        InvalidParameterError: no methods, one twice at the same factor, or parameters or lengths that cannot be.
        MethodNotApplicableError: `none` of them applies, leaving nothing to compare.
    """
    if isinstance(methods, str) or not methods:
        raise InvalidParameterError(f"methods is {methods!r}; give a list, as in methods=['none', 'yarn']")
    plans: list[ExtensionPlan] = []
    refusals: Refusals = {}
    for method in map(as_method, methods):
        reason = method.applies_to(scheme)
        if reason is None:
            plans.append(method.plan(scheme, **lengths))
        else:
            refusals[method.label] = reason
    labels = [(plan.method, plan.factor) for plan in plans]
    for label, times in labels:
        if labels.count((label, times)) > 1:
            raise InvalidParameterError(
                f"{label!r} at factor {times:g} is among the methods more than once, and rows are told apart by these "
                "two; compare them in two runs"
            )
    _require_one(scheme, plans, refusals)
    return sorted(plans, key=lambda plan: not plan.changes_nothing), refusals


def try_plans(model: nn.Module, plans: Sequence[ExtensionPlan], refusals: Refusals) -> list[ExtensionPlan]:
    """
    The plans that this very model takes; each is patched and undone once, so that what fails does so before hours.

    Args:
        model (`PreTrainedModel`): without a patch.
        plans (`Sequence[ExtensionPlan]`): of its scheme.
        refusals (`dict[str, str]`): gets the reasons of those that it does not take.

    Raises:
        MethodNotApplicableError: none but `none` is left.
    """
    taken = []
    for plan in plans:
        try:
            patch_model(model, plan).undo()
        except (UnsupportedModelError, NoEffectError) as error:
            refusals[plan.method] = f"cannot be patched: {error}"
        else:
            taken.append(plan)
    if plans:
        _require_one(plans[0].scheme, taken, refusals)
    for reason, names in by_reason(refusals).items():
        logger.warning("left out: %s (%s)", ", ".join(names), reason)
    return taken


def _require_one(scheme: PositionalScheme, plans: Sequence[ExtensionPlan], refusals: Refusals) -> None:
    if not refusals or any(not plan.changes_nothing for plan in plans):
        return
    told = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason(refusals).items())
    usable = [info.name for info in list_methods(scheme.kind)]
    what = f"nothing but {plans[0].method}" if plans else "nothing"
    applies = "" if scheme.obstacle else f"; for {scheme.kind} positions there are: {', '.join(usable)}"
    raise MethodNotApplicableError(f"of the methods given {what} applies: {told}{applies}")
