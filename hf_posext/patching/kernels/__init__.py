"""Attention over bands of positions, and the choice among the kernels that compute it.

[`banded_attention`] is the one way in for a forward. A step of decoding may run on one kernel instead ([`one_step`]),
and rotations on one pass ([`one_pass`]). Other modules of this folder are private to it.
"""

from .banded import Branch, Rotated, attention_with_weights, banded_attention, whole
from .bands import SAME, Geometry, belongs, mapped, starts, step_fading
from .choice import one_pass, one_step

__all__ = [
    "SAME",
    "Branch",
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
    "whole",
]
