"""Attention over bands of positions, and the choice of the kernel that computes it.

[`banded_attention`] is the entry point for a forward. A decoding step may run in one kernel instead ([`one_step`]),
and a rotation in one pass over memory ([`one_pass`]). The modules of this folder are private.
"""

from .banded import Rotated, attention_with_weights, banded_attention, whole
from .bands import SAME, Bands, Geometry, belongs, mapped, starts, step_fading, visible
from .choice import one_pass, one_step

__all__ = [
    "SAME",
    "Bands",
    "Geometry",
    "Rotated",
    "attention_with_weights",
    "banded_attention",
    "belongs",
    "mapped",
    "one_pass",
    "one_step",
    "starts",
    "step_fading",
    "visible",
    "whole",
]
