"""The verdict: what breaks, where and why, and what to try. Two sentences, made of what was found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..scheme import PositionalScheme
from .table_rows import ALIKE

if TYPE_CHECKING:
    from .diagnosis import Diagnosis

REASONS = {
    "learned": "a vector was learned for every position, and none exists for positions that training did not reach",
    "alibi": "a distance costs a fixed price per token, which is defined however far, trusted or not",
    "relative": "every distance falls into a learned bucket, the last of which has no end",
    "sinusoidal": "a formula gives the sines of any position, trusted or not",
    "rotary": "positions are angles, and longer inputs can be squeezed back into angles that training has shown",
    "none": "the model has no positions that could be carried further",
}


EARLY = 0.9
"""Share of the trained length before which a departure says that the model was trained on less."""


def reason(scheme: PositionalScheme) -> str:
    """Why a scheme generalizes as it does."""
    return REASONS[scheme.kind]


def verdict(found: Diagnosis) -> str:
    """Two sentences in plain English.

    Args:
        found ([`Diagnosis`]): complete but for the verdict.
    """
    return f"{_cause(found)}{_measured(found)}. {_advice(found)}."


def _cause(found: Diagnosis) -> str:
    kind, trained, target = found.scheme.kind, found.trained_length, found.target_length
    if kind == "learned" and found.scheme.table and trained:
        return _table(found, found.scheme.table.usable, trained)
    if kind == "rotary" and "phases" in found.tables:
        return _phases(found)
    if kind == "alibi":
        reach = found.tables["reach"].reach
        near = reach[reach < (trained or target)]
        told = "and every head sees as far back as in training"
        if len(near):
            heads = f"{len(near)} of {len(reach)} heads see no" if len(near) < len(reach) else "no head sees"
            told = f"though {heads} farther back than {near.max():.0f} tokens"
        return f"A distance costs a fixed price per token, so that no input is too long to be read, {told}"
    if kind == "relative" and "buckets" in found.tables:
        last = found.tables["buckets"]["first"].iloc[-1]
        return f"All distances of {last} tokens and more share one learned bias, so that far tokens look equally far"
    if kind == "sinusoidal":
        return f"The sines go on past the {_tokens(trained)} of training, where the model has never seen them"
    if kind == "none":
        return "Order comes from the causal mask or from a recurrent state, so that nothing ends at a length"
    return f"{found.scheme.model_type} has {kind} positions, of which nothing more can be read from the weights"


def _table(found: Diagnosis, rows: int, trained: int) -> str:
    lines = found.tables["rows"]
    if not found.untrained:
        alike = lines.cosine.max() > ALIKE
        told = "looks trained throughout" if alike else "tells nothing of training, as no row is like its neighbours"
        return (
            f"The table of learned positions ends at {rows} tokens and {told}; a longer input has no position to read"
        )
    first = found.untrained[0]
    before, after = lines[lines.end <= first].cosine.mean(), lines[lines.begin >= first].cosine.mean()
    return (
        f"Rows {first} to {found.untrained[1]} of the table of learned positions look untrained (neighbours have a "
        f"cosine of {after:.2f}, and of {before:.2f} before), so that text past {trained} tokens is placed by noise"
    )


def _phases(found: Diagnosis) -> str:
    lines = found.tables["phases"]
    own = lines[lines.method == "none"]
    trained, target = _tokens(found.trained_length), _tokens(found.target_length)
    if own.new.any():
        count, make = own.new.sum(), "make" if own.new.sum() > 1 else "makes"
        return (
            f"{count} of {len(own)} rotary pairs {make} less than a turn within the {trained} of training, so that an "
            f"input of {target} needs phases that the model has never seen"
        )
    types = sorted({rotary.shipped_type for rotary in found.scheme.rotaries} - {"default"})
    shipped = f" with the {' and '.join(types)} scaling that it ships with" if types else ""
    return f"Every phase of an input of {target} is one that the {trained} of training have shown{shipped}"


def _measured(found: Diagnosis) -> str:
    if "losses" not in found.tables:
        return ""
    count, read = len(found.provenance["documents"]), found.provenance["read"]
    where = f"; on {count} document{'s' if count > 1 else ''} the loss "
    if found.departure is None:
        return f"{where}keeps its level up to the {read} tokens that were read"
    return f"{where}rises by {found.rise:.2f} nats per token from token {found.departure} on"


def _advice(found: Diagnosis) -> str:
    keep, read = _limit(found), found.provenance.get("read", 0)
    if found.scheme.obstacle:
        return f"No method of hf_posext applies ({found.scheme.obstacle}); {keep}"
    names = ", ".join(found.remedies)
    if found.scheme.kind == "none" and found.departure is None:
        return (
            "Documents would show how far the model can be trusted"
            if not read
            else (f"Nothing needs to be changed up to {read} tokens")
        )
    if not names:
        return f"No method of hf_posext applies; {keep}"
    if found.departure is not None:
        return f"Try {names}, or {keep}"
    if read > (found.trained_length or 0):
        return f"Nothing needs to be changed up to {read} tokens; to read farther, try {names}"
    if found.generalization == "extrapolation":
        return f"Documents would show whether it can be trusted there; if not, try {names}"
    if "phases" in found.tables:
        own = found.tables["phases"]
        if not own[own.method == "none"].new.any():
            return f"Up to there nothing needs to be changed; to read farther, try {names}"
    return f"Try {names}, or {keep}"


def _limit(found: Diagnosis) -> str:
    trained, departure = found.trained_length, found.departure
    early = departure is not None and departure < EARLY * (trained or departure + 1)
    limit = departure - 1 if departure is not None and (early or not trained) else trained
    return f"keep inputs within {_tokens(limit)}" if limit else "measure it on documents to see where it breaks"


def _tokens(length: int | None) -> str:
    return "unknown number of tokens" if length is None else f"{length} tokens"
