"""A search for rotary frequencies: what LongRoPE's evolution finds on some documents, as native parameters."""

from ..packages import require

require("eval")

from .search import SearchedFactors, search

__all__ = ["SearchedFactors", "search"]
