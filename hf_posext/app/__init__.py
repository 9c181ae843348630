"""Interactive page: one model, one method, and the effect in pictures. Needs the extra `app`."""

from ..packages import require

require("eval")

from .view import Shelf, make_shelf

__all__ = ["Shelf", "make_shelf"]
