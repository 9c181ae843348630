"""A learned table, repeated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..plan import ExtensionPlan, PositionMap, TablePlan
from .base import register
from .table import TableMethod


@register
@dataclass(frozen=True)
class TableRepeat(TableMethod):
    """A learned table over and over again: tokens L apart have the same position.

    Row p is the old row `p mod L`. Recurrent positions (RP): Zhu et al., *LongEmbed: Extending Embedding Models for
    Long Context Retrieval*, 2024.
    """

    name: ClassVar[str] = "table-repeat"
    title: ClassVar[str] = "recurrent positions (RP)"
    url: ClassVar[str] = "https://arxiv.org/abs/2404.12096"

    def table(self, plan: ExtensionPlan) -> TablePlan:
        return TablePlan(PositionMap(modulo=plan.trained_length))
