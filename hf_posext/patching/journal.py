"""The former name of the undo log."""

from .undo import UndoLog as Journal

__all__ = ["Journal"]
