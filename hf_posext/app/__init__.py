"""A page to play with: one model, one method, and what it does, in pictures. Needs the extra `app`."""

from ..packages import require

require("eval")

from .shelf import Shelf, make_shelf

__all__ = ["Shelf", "make_shelf"]
