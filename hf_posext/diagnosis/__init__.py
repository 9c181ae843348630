"""See why: how a model encodes position, how far that was trained, and what becomes of longer input."""

from ..packages import require

require("eval")

from .diagnose import diagnose
from .diagnosis import Diagnosis
from .signals import Signal, position_signal

__all__ = ["Diagnosis", "Signal", "diagnose", "position_signal"]
