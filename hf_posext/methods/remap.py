"""Base class and checks of the methods that remap the positions of query-key pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import InvalidParameterError, RenamedAttribute, warn_of_former
from ..plan import Band, ExtensionPlan, PositionMap, QueryScale
from ..scheme import Rotary
from .base import Method

SAME = PositionMap()
"""The original position of a token."""


@dataclass(frozen=True)
class RemapMethod(Method):
    """Base class of the methods that remap positions inside attention.

    Frequencies are those of the model, or of a method before it.

    Subclasses implement [`~RemapMethod.bands`].
    """

    kinds = ("rotary",)

    def bands(self, plan: ExtensionPlan) -> tuple[Band, ...]:
        """Return disjoint bands of the causal pairs, nearest first."""
        former: Any = type(self).parts
        if not isinstance(former, RenamedAttribute):  # a subclass with the former name
            warn_of_former("parts", "bands", f"rename the method of {type(self).__name__}")
            bands: tuple[Band, ...] = former(self, plan)
            return bands
        raise TypeError(f"{type(self).__name__} must implement bands(plan)")

    parts = RenamedAttribute("bands")

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        if plan.bands:
            raise InvalidParameterError(f"{plan.method} remaps positions twice; compose at most one such method")
        scale, plan = self.query_scale(plan), plan.with_edits(Band, *self.bands(plan))
        return plan if scale is None else with_query_scale(plan, scale)

    def query_scale(self, plan: ExtensionPlan) -> QueryScale | None:
        """Return the scale of queries by position; `None` by default."""
        return None


def near_and_far(window: int, query: PositionMap, key: PositionMap) -> tuple[Band, ...]:
    """Return a band of the distances below `window`, unchanged, and one of all others, remapped."""
    return Band(SAME, SAME, high=window), Band(query, key, low=window)


def window_of(method: Method, plan: ExtensionPlan, share: float, name: str = "window") -> int:
    """Return a window of a method in tokens: its hyper-parameter, or a share of the trained length by default.

    Raises:
        InvalidParameterError: the window is outside the trained length.
    """
    given: int | None = getattr(method, name)
    value = max(1, round(plan.trained_length * share)) if given is None else given
    if not 1 <= value <= plan.trained_length:
        raise InvalidParameterError(
            f"Expected a {method.name} {name} of 1 to {plan.trained_length} (the trained length), got {value}."
        )
    return value


def with_query_scale(plan: ExtensionPlan, scale: QueryScale) -> ExtensionPlan:
    """Add a query scale to a plan.

    Raises:
        InvalidParameterError: the plan has one already.
    """
    if plan.query_scale is not None:
        raise InvalidParameterError(f"{plan.method} scales queries twice; compose at most one such method")
    return plan.with_edits(QueryScale, scale)


def require_far_band(method: Method, plan: ExtensionPlan) -> Band:
    """Return the last band of a remapping method, which contains all farther keys.

    Raises:
        InvalidParameterError: the methods before it have no such band.
    """
    if not plan.bands or not plan.bands[-1].is_far:
        raise InvalidParameterError(
            f"Expected {method.name} after a method with a band of far keys, got {plan.method!r}. "
            f"Pass e.g. 'rerope+{method.name}'."
        )
    return plan.bands[-1]


def require_one_set(method: Method, plan: ExtensionPlan) -> Rotary:
    """Return the one set of frequencies of a model, for a method that maps positions by rotary pairs.

    Raises:
        InvalidParameterError: several sets, or a shipped scaling that changes with the input.
    """
    rotaries = plan.scheme.rotaries
    planned = {entry.name for entry in plan.rotaries}
    if len(rotaries) > 1:
        names = ", ".join(rotary.name for rotary in rotaries)
        raise InvalidParameterError(f"Expected a model with one set of frequencies for {method.name}, got {names}.")
    if rotaries[0].shipped_type in ("dynamic", "longrope") and rotaries[0].name not in planned:
        raise InvalidParameterError(
            f"Expected frequencies that stay for {method.name}, got {rotaries[0].shipped_type}. "
            f"Pass e.g. 'yarn+{method.name}'."
        )
    return rotaries[0]
