"""Recommendation of a method for a model, from a budgeted sweep that begins with the diagnosis."""

from ..packages import require

require("eval")

from .recommend import recommend
from .recommendation import Recommendation

__all__ = ["Recommendation", "recommend"]
