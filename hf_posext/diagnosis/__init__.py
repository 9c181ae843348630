"""Diagnosis of a model: its positions, its trained length, and the effect of longer input."""

from ..packages import require

require("eval")

from .diagnosis import Diagnosis, diagnose
from .weights import Signal, position_signal

__all__ = ["Diagnosis", "Signal", "diagnose", "position_signal"]
