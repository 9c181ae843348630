"""Methods for a learned table of positions: longer tables from the rows of a trained one."""

import math
from dataclasses import dataclass

from ..errors import InvalidParameterError
from ..plan import ExtensionPlan, PositionMap, TablePlan
from .base import Method

LONG_EMBED = "https://arxiv.org/abs/2404.12096"


@dataclass(frozen=True)
class TableMethod(Method):
    """Base class of the methods that build a longer table. Subclasses implement [`~TableMethod.table`].

    Rows beyond the trained length are replaced: they were never trained.
    """

    kinds = ("learned",)

    def table(self, plan: ExtensionPlan) -> TablePlan:
        """Return the source of the rows of the new table."""
        raise TypeError(f"{type(self).__name__} must implement table(plan)")

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        if plan.table is not None:
            raise InvalidParameterError(f"{plan.method} stretches the table twice; compose at most one such method")
        usable = plan.scheme.table.usable if plan.scheme.table else 0
        if plan.trained_length > usable:
            raise InvalidParameterError(
                f"Expected trained_length up to {usable}, the positions in the table of {plan.scheme.model_type}, got "
                f"{plan.trained_length}."
            )
        return plan.with_edits(TablePlan, self.table(plan))


def squeezed(plan: ExtensionPlan) -> PositionMap:
    """Return `min(p / s, L - 1)`: back into the trained positions, which end at L - 1."""
    return PositionMap(rate=1 / plan.factor, limit=plan.trained_length - 1)


@dataclass(frozen=True)
class TableLinear(TableMethod):
    """Squeeze positions back into a learned table, with linear interpolation between its rows.

    Row p of the new table is the old one at `x = min(p / s, L - 1)`: `(1 - t) e_i + t e_(i+1)` with `i = floor(x)` and
    `t = x - i`; past the last trained row, that row. Position interpolation (Chen et al., 2023) of tables: Zhu et al.,
    *LongEmbed: Extending Embedding Models for Long Context Retrieval*, 2024.
    """

    name = "table-linear"
    title = "position interpolation of a table"
    url = LONG_EMBED

    def table(self, plan: ExtensionPlan) -> TablePlan:
        return TablePlan(squeezed(plan))


@dataclass(frozen=True)
class TableCubic(TableMethod):
    """Squeeze positions back into a learned table, along a cubic spline through its rows.

    Row p of the new table is the natural spline (second derivative zero at both ends) through the L trained rows at
    `min(p / s, L - 1)`. Like [`TableLinear`] without its corners: position interpolation of tables as in Zhu et al.,
    *LongEmbed: Extending Embedding Models for Long Context Retrieval*, 2024.
    """

    name = "table-cubic"
    title = "cubic spline through a table"
    url = LONG_EMBED

    def table(self, plan: ExtensionPlan) -> TablePlan:
        return TablePlan(squeezed(plan), interpolation="cubic")


@dataclass(frozen=True)
class TableGroup(TableMethod):
    """Use each row of a learned table for several consecutive tokens.

    Row p is the old row `floor(p / s)`; a fractional factor is rounded up, because groups are whole tokens.
    Grouped positions (GP): Zhu et al., *LongEmbed: Extending Embedding Models for Long Context Retrieval*, 2024.
    """

    name = "table-group"
    title = "grouped positions (GP)"
    url = LONG_EMBED

    def table(self, plan: ExtensionPlan) -> TablePlan:
        return TablePlan(PositionMap(group=math.ceil(plan.factor)))


@dataclass(frozen=True)
class TableRepeat(TableMethod):
    """Repeat a learned table: tokens L apart have the same position.

    Row p is the old row `p mod L`. Recurrent positions (RP): Zhu et al., *LongEmbed: Extending Embedding Models for
    Long Context Retrieval*, 2024.
    """

    name = "table-repeat"
    title = "recurrent positions (RP)"
    url = LONG_EMBED

    def table(self, plan: ExtensionPlan) -> TablePlan:
        return TablePlan(PositionMap(modulo=plan.trained_length))


@dataclass(frozen=True)
class TableHierarchical(TableMethod):
    """Write each position as two digits, the stretch of L tokens and the place in it. The first L rows are kept.

    `q_(iL+j) = alpha u_i + (1 - alpha) u_j` with `u_i = (e_i - alpha e_0) / (1 - alpha)`, up to `L ** 2` positions.
    The rows past L are a starting point for fine-tuning, and of little use before it. Su, *Hierarchical decomposition
    of position embeddings*, 2020.

    Args:
        alpha (`float`, *optional*, defaults to 0.4): weight of the stretch, above 0 and below 1, other than one half,
            where position `iL + j` would be the same as `jL + i`.
    """

    name = "table-hierarchical"
    title = "hierarchical decomposition"
    url = "https://kexue.fm/archives/7947"

    alpha: float = 0.4

    def table(self, plan: ExtensionPlan) -> TablePlan:
        length = plan.trained_length
        if not 0 < self.alpha < 1 or self.alpha == 0.5:
            raise InvalidParameterError(
                f"{self.name}: expected alpha above 0 and below 1, except 0.5, got {self.alpha:g}. Pass alpha=0.4."
            )
        if plan.target_length > length**2:
            raise InvalidParameterError(
                f"{self.name} reaches {length**2} tokens, the square of {length}; the target is {plan.target_length}. "
                f"Pass a factor up to {length}."
            )
        return TablePlan(PositionMap(modulo=length), coarse=PositionMap(group=length), alpha=self.alpha)
