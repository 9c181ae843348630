"""A search for rotary frequencies: what LongRoPE's evolution finds on some documents, as native parameters."""

from ..packages import require

require("eval")

from .search import search
from .searched import SearchedFactors

__all__ = ["SearchedFactors", "search"]
