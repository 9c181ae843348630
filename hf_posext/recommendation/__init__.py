"""Recommendation of a method for a model, from a budgeted sweep that begins with the diagnosis."""

from ..packages import require

require("eval")

from .recommendation import Recommendation, recommend

__all__ = ["Recommendation", "recommend"]
