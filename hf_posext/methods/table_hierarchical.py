"""Hierarchical decomposition of a learned table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import InvalidParameterError
from ..plan import ExtensionPlan, PositionMap, TablePlan
from .base import register
from .table import TableMethod


@register
@dataclass(frozen=True)
class TableHierarchical(TableMethod):
    """Two digits for each position: which stretch of L tokens, and where in it. The first L rows stay as they are.

    `q_(iL+j) = alpha u_i + (1 - alpha) u_j` with `u_i = (e_i - alpha e_0) / (1 - alpha)`, up to `L ** 2` positions.
    The rows past L are a start for fine-tuning, and little use before it. Su, *Hierarchical decomposition of
    position embeddings*, 2020.

    Args:
        alpha (`float`, *optional*, defaults to 0.4): weight of the stretch, above 0 and below 1, other than one half,
            where position `iL + j` would be the same as `jL + i`.
    """

    name: ClassVar[str] = "table-hierarchical"
    title: ClassVar[str] = "hierarchical decomposition"
    url: ClassVar[str] = "https://kexue.fm/archives/7947"

    alpha: float = 0.4

    def table(self, plan: ExtensionPlan) -> TablePlan:
        length = plan.trained_length
        if not 0 < self.alpha < 1 or self.alpha == 0.5:
            raise InvalidParameterError(
                f"{self.name} alpha is {self.alpha:g}; give a number above 0 and below 1 other than 0.5, e.g. 0.4"
            )
        if plan.target_length > length**2:
            raise InvalidParameterError(
                f"{self.name} reaches {length**2} tokens, the square of {length}, and {plan.target_length} were asked "
                f"for; give a factor up to {length}"
            )
        return TablePlan(PositionMap(modulo=length), coarse=PositionMap(group=length), alpha=self.alpha)
