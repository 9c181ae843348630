"""The positional encoding of a model, read from the model or from its config alone.

Standard library only, so that a scheme can be written to JSON, compared and planned for without weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .escaping import html_table, visible


@dataclass(frozen=True)
class Kind:
    """One kind of positional scheme.

    Args:
        label (`str`): its name in the literature.
        generalization (`str`): `none` where the values past the trained length were never trained, `extrapolation`
            where they are defined, trusted or not, and `interpolation` where positions can be squeezed back into the
            trained range.
        why (`str`): the reason for that.
        unit (`str`): what a position or distance changes.
    """

    label: str
    generalization: str
    why: str
    unit: str


KINDS = {
    "rotary": Kind(
        "RoPE",
        "interpolation",
        "positions are angles, and longer inputs can be squeezed back into angles that training has shown",
        "cosine of the phase",
    ),
    "learned": Kind(
        "learned table",
        "none",
        "a vector was learned for every position, and none exists for positions that training did not reach",
        "table value",
    ),
    "alibi": Kind(
        "ALiBi",
        "extrapolation",
        "a distance costs a fixed price per token, which is defined however far, trusted or not",
        "bias of the score (nats)",
    ),
    "relative": Kind(
        "relative buckets",
        "extrapolation",
        "every distance falls into a learned bucket, the last of which has no end",
        "bias of the score (nats)",
    ),
    "sinusoidal": Kind(
        "sinusoids",
        "extrapolation",
        "a formula gives the sines of any position, trusted or not",
        "sine",
    ),
    "none": Kind("no positions", "none", "the model has no positions that could be carried further", ""),
}
"""Every kind of positional scheme, one row each."""

TABULATED = ("codegen", "ctrl", "gptj", "marian", "mpt", "pegasus", "roformer")
"""Model types of transformers that keep sines or biases in a table of fixed length, past which they cannot read."""


@dataclass(frozen=True)
class Rotary:
    """One set of rotary frequencies; most models have one, some one for each layer type.

    Pair `i` of `pairs` rotates by `theta ** (-2 i / dim)` radians a token; those from `pairs` on do not rotate.

    Args:
        name (`str`): the layer type, or `""` where the model has one set for all layers.
        theta (`float`): the base.
        dim (`int`): the width that the exponent runs over, normally the number of rotated channels of a head.
        pairs (`int`): number of channel pairs that rotate.
        slots (`int`): length of the module's frequency vector (more than `pairs` where the tail is padded with zeros).
        window (`int`, *optional*): bound of the distances that the layers of this set see.
        shipped (`Mapping`): the `rope_parameters` that the model came with.
    """

    name: str
    theta: float
    dim: int
    pairs: int
    slots: int
    window: int | None = None
    shipped: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shipped_type(self) -> str:
        """`rope_type` that the model came with; `"default"` is plain, unscaled RoPE."""
        return str(self.shipped.get("rope_type", "default"))


@dataclass(frozen=True)
class Table:
    """A learned table of positions; encoder and decoder have one of the same shape each.

    Position p is read in row `offset + p`. The rows before `offset` mean something else (padding, or nothing).

    Args:
        rows (`int`): all rows.
        offset (`int`): 2 in OPT and BART, `padding_idx + 1` in RoBERTa, 0 in most others.
        width (`int`): numbers in a row.
    """

    rows: int
    offset: int
    width: int

    @property
    def usable(self) -> int:
        """Number of positions in the table."""
        return self.rows - self.offset


@dataclass(frozen=True)
class Buckets:
    """Relative distances, sorted into buckets that have a learned bias each (T5).

    Args:
        count (`int`): number of buckets; half of them, in either direction, are for one distance each.
        max_distance (`int`): all distances from here on share the last bucket.
    """

    count: int
    max_distance: int


@dataclass(frozen=True)
class PositionalScheme:
    """The positional encoding of one model.

    Args:
        kind (`str`): `rotary`, `learned`, `alibi`, `relative`, `sinusoidal` or `none`.
        model_type (`str`): the model type in transformers.
        trained_length (`int`, *optional*): tokens per sequence in pre-training, before any extension that the model
            ships with.
        trained_length_source (`str`): source of that number.
        shipped_length (`int`, *optional*): tokens that the model as shipped claims to read.
        rotaries (`tuple[Rotary, ...]`): the sets of rotary frequencies; empty for the other kinds.
        layer_types (`tuple[str, ...]`): the distinct layer types of the config, in order of appearance.
        obstacle (`str`, *optional*): why this package cannot change the scheme of this model.
        table (`Table`, *optional*): the learned table.
        slopes (`tuple[float, ...]`): of ALiBi, one for each head: a distance of d tokens costs `slope * d`.
        buckets (`Buckets`, *optional*): of relative distances; MPNet has them beside its learned table.
    """

    kind: str
    model_type: str
    trained_length: int | None
    trained_length_source: str
    shipped_length: int | None
    rotaries: tuple[Rotary, ...] = ()
    layer_types: tuple[str, ...] = ()
    obstacle: str | None = None
    table: Table | None = None
    slopes: tuple[float, ...] = ()
    buckets: Buckets | None = None

    @property
    def generalization(self) -> str:
        """`none`, `extrapolation` or `interpolation`; see [`Kind`]."""
        return KINDS[self.kind].generalization

    @property
    def ends(self) -> bool:
        """`True` where the model cannot run past its length: its positions are in a table, learned or not."""
        return self.kind == "learned" or self.model_type in TABULATED

    def rotary(self, name: str) -> Rotary:
        """Return the set of frequencies with the given name."""
        return next(rotary for rotary in self.rotaries if rotary.name == name)

    def same_positions(self, other: PositionalScheme) -> bool:
        """Return whether a plan for `other` fits: the same frequencies, table, slopes and buckets."""

        def shape(scheme: PositionalScheme) -> tuple[Any, ...]:
            rotaries = tuple((r.name, r.theta, r.dim, r.pairs, r.slots) for r in scheme.rotaries)
            return scheme.kind, scheme.model_type, rotaries, scheme.table, scheme.slopes, scheme.buckets

        return shape(self) == shape(other)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {**asdict(self), "generalization": self.generalization}

    def __repr__(self) -> str:
        return f"PositionalScheme({visible(self.describe())})"

    def _repr_html_(self) -> str:
        name, *facts = self.describe().split("; ")
        return html_table({"scheme": name, "numbers": "; ".join(facts), "generalization": self.generalization})

    def describe(self) -> str:
        """Return the scheme on one line."""
        parts = [f"{self.model_type}: {self.kind} positions, trained on {self.trained_length or 'unknown'} tokens"]
        if self.shipped_length and self.shipped_length != self.trained_length:
            parts.append(f"shipped for {self.shipped_length}")
        for rotary in self.rotaries:
            label = f"{rotary.name}: " if rotary.name else ""
            parts.append(f"{label}theta {rotary.theta:g}, {rotary.pairs} pairs, rope_type {rotary.shipped_type}")
        if self.table:
            beside = f" after {self.table.offset} of another use" if self.table.offset else ""
            parts.append(f"table of {self.table.usable} positions{beside}")
        if self.slopes:
            parts.append(f"{len(self.slopes)} slopes from {max(self.slopes):g} down to {min(self.slopes):g}")
        if self.buckets:
            parts.append(f"{self.buckets.count} buckets up to distance {self.buckets.max_distance}")
        return "; ".join(parts)
