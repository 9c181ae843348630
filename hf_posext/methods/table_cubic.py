"""Cubic interpolation of a learned table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..plan import ExtensionPlan, TablePlan
from .base import register
from .table import TableMethod, squeezed


@register
@dataclass(frozen=True)
class TableCubic(TableMethod):
    """Positions squeezed back into a learned table, along a cubic spline through its rows.

    Row p of the new table is the natural spline (second derivative zero at both ends) through the L trained rows at
    `min(p / s, L - 1)`. As [`TableLinear`], without its corners: position interpolation of tables as in Zhu et al.,
    *LongEmbed: Extending Embedding Models for Long Context Retrieval*, 2024.
    """

    name: ClassVar[str] = "table-cubic"
    title: ClassVar[str] = "cubic spline through a table"
    url: ClassVar[str] = "https://arxiv.org/abs/2404.12096"

    def table(self, plan: ExtensionPlan) -> TablePlan:
        return TablePlan(squeezed(plan), interpolation="cubic")
