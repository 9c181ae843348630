"""What the methods that stretch a learned table of positions share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..errors import InvalidParameterError
from ..plan import ExtensionPlan, PositionMap, TablePlan
from .base import Method


@dataclass(frozen=True)
class TableMethod(Method):
    """A method that makes a longer table from the rows of a trained one. Subclasses implement [`~TableMethod.table`].

    Rows beyond the trained length are replaced: they were never trained, whether the table has some or not.
    """

    kinds: ClassVar[tuple[str, ...]] = ("learned",)

    def table(self, plan: ExtensionPlan) -> TablePlan:
        """Which trained rows each position gets."""
        raise TypeError(f"{type(self).__name__} must implement table(plan)")

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        if plan.table is not None:
            raise InvalidParameterError(f"{plan.method} stretches the table twice; compose at most one such method")
        usable = plan.scheme.table.usable if plan.scheme.table else 0
        if plan.trained_length > usable:
            raise InvalidParameterError(
                f"original_length is {plan.trained_length}, but {plan.scheme.model_type} has a table of {usable} "
                f"positions; give {usable} or less"
            )
        return replace(plan, table=self.table(plan))


def squeezed(plan: ExtensionPlan) -> PositionMap:
    """`min(p / s, L - 1)`: back into the trained positions, which end at L - 1."""
    return PositionMap(rate=1 / plan.factor, limit=plan.trained_length - 1)
