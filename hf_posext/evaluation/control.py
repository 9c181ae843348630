"""The control: the same tokens, scored by the unpatched model with its context truncated to the trained length.

A perplexity that falls with length proves nothing by itself, since later tokens of a document are easier; it falls for
a model that sees no more than its trained length, too. What a longer context is worth is the distance to this one.
"""

from __future__ import annotations

CONTROL = "truncated"
"""The name of the control among the per-document results."""


def control_stride(trained_length: int) -> int:
    """An eighth of the trained length, so that every token has seven eighths of it as context."""
    return max(1, trained_length // 8)
