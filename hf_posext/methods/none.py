"""No extension: the unpatched model, so that comparisons have a row for it."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import ExtensionPlan
from ..scheme import KINDS, PositionalScheme
from .base import Method, register


@register
@dataclass(frozen=True)
class NoExtension(Method):
    """Leave the model unpatched."""

    name = "none"
    title = "no extension"
    url = ""
    kinds = tuple(KINDS)
    needs_factor = False

    def applies_to(self, scheme: PositionalScheme) -> str | None:
        return None

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        return plan
