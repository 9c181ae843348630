"""The method for a model: a measured sweep that begins with the diagnosis and spends where it matters."""

from ..packages import require

require("eval")

from .recommend import recommend
from .recommendation import Recommendation

__all__ = ["Recommendation", "recommend"]
