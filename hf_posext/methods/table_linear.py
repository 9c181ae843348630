"""Position interpolation of a learned table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..plan import ExtensionPlan, TablePlan
from .base import register
from .table import TableMethod, squeezed


@register
@dataclass(frozen=True)
class TableLinear(TableMethod):
    """Positions squeezed back into a learned table, linearly between its rows.

    Row p of the new table is the old one at `x = min(p / s, L - 1)`: `(1 - t) e_i + t e_(i+1)` with `i = floor(x)` and
    `t = x - i`; past the last trained row, that row. Position interpolation (Chen et al., 2023) of tables: Zhu et al.,
    *LongEmbed: Extending Embedding Models for Long Context Retrieval*, 2024.
    """

    name: ClassVar[str] = "table-linear"
    title: ClassVar[str] = "position interpolation of a table"
    url: ClassVar[str] = "https://arxiv.org/abs/2404.12096"

    def table(self, plan: ExtensionPlan) -> TablePlan:
        return TablePlan(squeezed(plan))
