"""What a model has: its positional encoding, read from the model or from its config alone.

Standard library only, so that a scheme can be written to JSON, compared and planned for without weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

GENERALIZATION = {
    "rotary": "interpolation",
    "learned": "none",
    "alibi": "extrapolation",
    "relative": "extrapolation",
    "sinusoidal": "extrapolation",
    "none": "none",
}
"""What each kind of scheme does past its trained length.

*none*: the values used there were never trained. *extrapolation*: they are defined there, trusted or not.
*interpolation*: positions can be squeezed back into the trained range.
"""


@dataclass(frozen=True)
class Rotary:
    """One set of rotary frequencies; most models have one, some one for each layer type.

    Pair `i` of `pairs` turns by `theta ** (-2 i / dim)` radians a token; pairs from `pairs` to `slots` do not turn.

    Args:
        name (`str`): the layer type, or `""` where the model has one set for all layers.
        theta (`float`): the base.
        dim (`int`): the width that the exponent runs over, normally the number of rotated channels of a head.
        pairs (`int`): how many channel pairs turn.
        slots (`int`): length of the module's frequency vector (more than `pairs` where the tail is padded with zeros).
        window (`int`, *optional*): how far back the layers of this set see, where that is bounded.
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
        """The `rope_type` that the model came with; `"default"` is plain, unscaled RoPE."""
        return str(self.shipped.get("rope_type", "default"))


@dataclass(frozen=True)
class PositionalScheme:
    """The positional encoding of one model.

    Args:
        kind (`str`): `rotary`, `learned`, `alibi`, `relative`, `sinusoidal` or `none`.
        model_type (`str`): the model type in transformers.
        trained_length (`int`, *optional*): tokens per sequence in pre-training, before any extension that the model
            ships with. `None` where the config does not tell.
        trained_length_source (`str`): where that number comes from.
        shipped_length (`int`, *optional*): tokens that the model as shipped claims to read.
        rotaries (`tuple[Rotary, ...]`): the sets of rotary frequencies; empty for the other kinds.
        layer_types (`tuple[str, ...]`): the distinct layer types of the config, in order of appearance.
        obstacle (`str`, *optional*): why this package cannot change the scheme of this model.
    """

    kind: str
    model_type: str
    trained_length: int | None
    trained_length_source: str
    shipped_length: int | None
    rotaries: tuple[Rotary, ...] = ()
    layer_types: tuple[str, ...] = ()
    obstacle: str | None = None

    @property
    def generalization(self) -> str:
        """`none`, `extrapolation` or `interpolation`: what the scheme does past its trained length."""
        return GENERALIZATION[self.kind]

    def rotary(self, name: str) -> Rotary:
        """The set of frequencies of that name."""
        return next(rotary for rotary in self.rotaries if rotary.name == name)

    def same_positions(self, other: PositionalScheme) -> bool:
        """Whether a plan made for `other` fits a model of this scheme: the same sets of the same frequencies."""

        def shape(scheme: PositionalScheme) -> tuple[Any, ...]:
            rotaries = tuple((r.name, r.theta, r.dim, r.pairs, r.slots) for r in scheme.rotaries)
            return scheme.kind, scheme.model_type, rotaries

        return shape(self) == shape(other)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "generalization": self.generalization}

    def describe(self) -> str:
        """One line for messages and tables."""
        parts = [f"{self.model_type}: {self.kind} positions, trained on {self.trained_length or 'unknown'} tokens"]
        if self.shipped_length and self.shipped_length != self.trained_length:
            parts.append(f"shipped for {self.shipped_length}")
        for rotary in self.rotaries:
            label = f"{rotary.name}: " if rotary.name else ""
            parts.append(f"{label}theta {rotary.theta:g}, {rotary.pairs} pairs, rope_type {rotary.shipped_type}")
        return "; ".join(parts)
