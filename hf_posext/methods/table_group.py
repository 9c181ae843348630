"""Groups of tokens that share a row of a learned table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..plan import ExtensionPlan, PositionMap, TablePlan
from .base import register
from .table import TableMethod


@register
@dataclass(frozen=True)
class TableGroup(TableMethod):
    """Each row of a learned table for several tokens in a row.

    Row p is the old row `floor(p / s)`; a factor that is not whole is rounded up, since groups are whole tokens.
    Grouped positions (GP): Zhu et al., *LongEmbed: Extending Embedding Models for Long Context Retrieval*, 2024.
    """

    name: ClassVar[str] = "table-group"
    title: ClassVar[str] = "grouped positions (GP)"
    url: ClassVar[str] = "https://arxiv.org/abs/2404.12096"

    def table(self, plan: ExtensionPlan) -> TablePlan:
        return TablePlan(PositionMap(group=math.ceil(plan.factor)))
