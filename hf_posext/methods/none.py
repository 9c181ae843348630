"""No extension: the model as it is, so that comparisons have a row for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..plan import ExtensionPlan
from ..scheme import KINDS, PositionalScheme
from .base import Method, register


@register
@dataclass(frozen=True)
class NoExtension(Method):
    """The model as it is."""

    name: ClassVar[str] = "none"
    title: ClassVar[str] = "no extension"
    url: ClassVar[str] = ""
    kinds: ClassVar[tuple[str, ...]] = tuple(KINDS)
    needs_factor: ClassVar[bool] = False

    def applies_to(self, scheme: PositionalScheme) -> str | None:
        return None

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        return plan
