"""What the methods that sort relative distances into other buckets share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..errors import InvalidParameterError
from ..plan import BucketPlan, ExtensionPlan
from ..scheme import PositionalScheme
from .base import Method


@dataclass(frozen=True)
class BucketMethod(Method):
    """A method for relative distances in buckets, also beside a learned table (MPNet), which it must be composed with.

    Subclasses implement [`~BucketMethod.buckets`].
    """

    kinds: ClassVar[tuple[str, ...]] = ("relative",)

    def applies_to(self, scheme: PositionalScheme) -> str | None:
        return scheme.obstacle if scheme.buckets is not None else super().applies_to(scheme)

    def buckets(self, plan: ExtensionPlan, current: BucketPlan) -> BucketPlan:
        """The plan with this method applied on top."""
        raise TypeError(f"{type(self).__name__} must implement buckets(plan, current)")

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        if plan.scheme.table is not None and plan.table is None:
            raise InvalidParameterError(
                f"{plan.scheme.model_type} has a learned table too, which {self.name} leaves at its length; stretch "
                f"it first: 'table-linear+{self.name}'"
            )
        return replace(plan, buckets=self.buckets(plan, plan.buckets or BucketPlan()))
