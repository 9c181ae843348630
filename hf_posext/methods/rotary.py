"""Base classes and arithmetic of the methods for rotary positions: new frequencies, or remapped query-key pairs.

Arithmetic of frequencies is float32 and in the order in which transformers does it, so that a plan equals
transformers' own rope types to the bit where they exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import InvalidParameterError, RenamedAttribute, warn_of_former
from ..plan import Band, ExtensionPlan, PositionMap, QueryScale, RotaryPlan
from ..scheme import PositionalScheme, Rotary
from .base import Method

SCALING_KEYS = frozenset(
    "rope_type type factor attention_factor beta_fast beta_slow mscale mscale_all_dim truncate low_freq_factor "
    "high_freq_factor short_factor long_factor short_mscale long_mscale rope_theta".split()
)
"""Keys of `rope_parameters` that say how frequencies are scaled. A plan replaces them and keeps all others, which mean
other things to the model (`mrope_section`, `partial_rotary_factor`, `llama_4_scaling_beta`, ...)."""

SOFTMAX_KEYS = ("mscale", "mscale_all_dim")
"""Those from which the DeepSeek family computes a temperature of its softmax, with `factor`."""


@dataclass(frozen=True)
class FrequencyMethod(Method):
    """A method that gives each rotary pair another frequency.

    Subclasses implement [`~FrequencyMethod.rescale`]. Sets of frequencies whose layers see no farther than the trained
    length (the sliding-window layers of Gemma-3, all layers of Cohere 2 that rotate) are left as shipped: no distance
    in them is ever unseen.
    """

    kinds = ("rotary",)
    covers_local_layers = False

    def rescale(self, rotary: Rotary, current: RotaryPlan, plan: ExtensionPlan) -> RotaryPlan:
        """Return the new frequencies of one set.

        Args:
            rotary (`Rotary`): what the model has.
            current (`RotaryPlan`): the frequencies so far: unscaled, or as the method before left them.
            plan (`ExtensionPlan`): for `factor`, `trained_length` and `target_length`.
        """
        raise TypeError(f"{type(self).__name__} must implement rescale(rotary, current, plan)")

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        so_far = {entry.name: entry for entry in plan.rotaries}
        for rotary in plan.scheme.rotaries:
            local = rotary.window is not None and rotary.window <= plan.trained_length
            if local and not self.covers_local_layers:
                continue
            current = so_far.get(rotary.name) or unscaled(rotary)
            so_far[rotary.name] = with_softmax_keys(self.rescale(rotary, current, plan), current.rope_parameters)
        return plan.with_edits(RotaryPlan, *so_far.values())


def with_softmax_keys(entry: RotaryPlan, stated: Mapping[str, Any] | None) -> RotaryPlan:
    """Return a plan of one set whose `rope_parameters`, if any, have the softmax keys of others."""
    keys = {key: value for key, value in (stated or {}).items() if key in SOFTMAX_KEYS}
    if not keys or entry.rope_parameters is None:
        return entry
    return replace(entry, rope_parameters={**keys, **entry.rope_parameters})


def exponents(rotary: Rotary) -> torch.Tensor:
    """Return `2 i / dim` of each rotary pair, float32 of shape (pairs,)."""
    return torch.arange(0, 2 * rotary.pairs, 2, dtype=torch.float32) / rotary.dim


def powers(theta: float, rotary: Rotary) -> torch.Tensor:
    """Return `theta ** (-2 i / dim)` of each rotary pair, float32 of shape (pairs,)."""
    return 1.0 / (theta ** exponents(rotary))


def unscaled(rotary: Rotary) -> RotaryPlan:
    """Return the frequencies before any scaling, including a shipped one."""
    return from_tensor(rotary, powers(rotary.theta, rotary), rope_parameters={"rope_type": "default"})


def frequencies(entry: RotaryPlan, rotary: Rotary) -> torch.Tensor:
    """Return the planned frequencies of the rotary pairs, float32 of shape (pairs,)."""
    return torch.tensor(entry.inv_freq[: rotary.pairs], dtype=torch.float32)


def from_tensor(
    rotary: Rotary,
    inv_freq: torch.Tensor,
    *,
    attention_factor: float = 1.0,
    rope_parameters: Mapping[str, Any] | None,
) -> RotaryPlan:
    """Return the plan of one set from the frequencies of its rotary pairs, and its config entry for transformers."""
    return RotaryPlan(
        name=rotary.name,
        inv_freq=padded(rotary, inv_freq),
        attention_factor=attention_factor,
        rope_parameters=None if rope_parameters is None else complete(rotary, rope_parameters),
    )


def padded(rotary: Rotary, inv_freq: torch.Tensor) -> tuple[float, ...]:
    """Return the frequencies of the rotary pairs as numbers, with zeros for the slots that do not rotate."""
    return (*inv_freq.float().tolist(), *[0.0] * (rotary.slots - rotary.pairs))


def complete(rotary: Rotary, rope_parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config entry with the base, and with the shipped keys other than those of scaling."""
    kept = {key: value for key, value in rotary.shipped.items() if key not in SCALING_KEYS}
    return {**kept, "rope_theta": rotary.theta, **rope_parameters}


def as_longrope(
    rotary: Rotary, inv_freq: torch.Tensor, plan: ExtensionPlan, *, attention_factor: float = 1.0
) -> RotaryPlan:
    """Express frequencies without a rope type of their own as `longrope` with equal short and long factors.

    The numbers are rounded through that form (a float32 division, 1e-7 relative), so that the live model and the
    checkpoint opened without this package agree to the bit.
    """
    if not bool((inv_freq > 0).all()):
        return from_tensor(rotary, inv_freq, attention_factor=attention_factor, rope_parameters=None)
    factors = (powers(rotary.theta, rotary) / inv_freq).tolist()
    return longrope(rotary, factors, factors, plan, attention_factor=attention_factor)


def longrope(
    rotary: Rotary,
    long_factor: list[float],
    short_factor: list[float],
    plan: ExtensionPlan,
    *,
    attention_factor: float,
) -> RotaryPlan:
    """Return a plan that slows pairs by `long_factor` past the trained length and by `short_factor` up to it."""
    long, short = (
        1.0 / (torch.tensor(factors, dtype=torch.float32) * rotary.theta ** exponents(rotary))
        for factors in (long_factor, short_factor)
    )
    parameters = {
        "rope_type": "longrope",
        "long_factor": list(long_factor),
        "short_factor": list(short_factor),
        "factor": plan.factor,
        "attention_factor": attention_factor,
        "original_max_position_embeddings": plan.trained_length,
    }
    entry = from_tensor(rotary, long, attention_factor=attention_factor, rope_parameters=parameters)
    return entry if torch.equal(long, short) else replace(entry, short_inv_freq=padded(rotary, short))


def require_pairs(method: Method, rotary: Rotary) -> None:
    """Refuse a set of frequencies for which the formula is not defined."""
    if rotary.pairs < 2:
        raise InvalidParameterError(
            f"{method.name} needs at least 2 rotary pairs; {rotary.name or 'the model'} has {rotary.pairs}"
        )


def first_rotary(scheme: PositionalScheme) -> Rotary:
    """Return the set of frequencies that reaches farthest, for examples."""
    return next((rotary for rotary in scheme.rotaries if rotary.window is None), scheme.rotaries[0])


SAME = PositionMap()
"""The original position of a token."""


@dataclass(frozen=True)
class RemapMethod(Method):
    """Base class of the methods that remap positions inside attention.

    Frequencies are those of the model, or of a method before it.

    Subclasses implement [`~RemapMethod.bands`].
    """

    kinds = ("rotary",)

    def bands(self, plan: ExtensionPlan) -> tuple[Band, ...]:
        """Return disjoint bands of the causal pairs, nearest first."""
        former: Any = type(self).parts
        if not isinstance(former, RenamedAttribute):  # a subclass with the former name
            warn_of_former("parts", "bands", f"rename the method of {type(self).__name__}")
            bands: tuple[Band, ...] = former(self, plan)
            return bands
        raise TypeError(f"{type(self).__name__} must implement bands(plan)")

    parts = RenamedAttribute("bands")

    def extend(self, plan: ExtensionPlan) -> ExtensionPlan:
        if plan.bands:
            raise InvalidParameterError(f"{plan.method} remaps positions twice; compose at most one such method")
        scale, plan = self.query_scale(plan), plan.with_edits(Band, *self.bands(plan))
        return plan if scale is None else with_query_scale(plan, scale)

    def query_scale(self, plan: ExtensionPlan) -> QueryScale | None:
        """Return the scale of queries by position; `None` by default."""
        return None


def near_and_far(window: int, query: PositionMap, key: PositionMap) -> tuple[Band, ...]:
    """Return a band of the distances below `window`, unchanged, and one of all others, remapped."""
    return Band(SAME, SAME, high=window), Band(query, key, low=window)


def window_of(method: Method, plan: ExtensionPlan, share: float, name: str = "window") -> int:
    """Return a window of a method in tokens: its hyper-parameter, or a share of the trained length by default.

    Raises:
        InvalidParameterError: the window is outside the trained length.
    """
    given: int | None = getattr(method, name)
    value = max(1, round(plan.trained_length * share)) if given is None else given
    if not 1 <= value <= plan.trained_length:
        raise InvalidParameterError(
            f"Expected a {method.name} {name} of 1 to {plan.trained_length} (the trained length), got {value}."
        )
    return value


def with_query_scale(plan: ExtensionPlan, scale: QueryScale) -> ExtensionPlan:
    """Add a query scale to a plan.

    Raises:
        InvalidParameterError: the plan has one already.
    """
    if plan.query_scale is not None:
        raise InvalidParameterError(f"{plan.method} scales queries twice; compose at most one such method")
    return plan.with_edits(QueryScale, scale)


def require_far_band(method: Method, plan: ExtensionPlan) -> Band:
    """Return the last band of a remapping method, which contains all farther keys.

    Raises:
        InvalidParameterError: the methods before it have no such band.
    """
    if not plan.bands or not plan.bands[-1].is_far:
        raise InvalidParameterError(
            f"Expected {method.name} after a method with a band of far keys, got {plan.method!r}. "
            f"Pass e.g. 'rerope+{method.name}'."
        )
    return plan.bands[-1]


def require_one_set(method: Method, plan: ExtensionPlan) -> Rotary:
    """Return the one set of frequencies of a model, for a method that maps positions by rotary pairs.

    Raises:
        InvalidParameterError: several sets, or a shipped scaling that changes with the input.
    """
    rotaries = plan.scheme.rotaries
    planned = {entry.name for entry in plan.rotaries}
    if len(rotaries) > 1:
        names = ", ".join(rotary.name for rotary in rotaries)
        raise InvalidParameterError(f"Expected a model with one set of frequencies for {method.name}, got {names}.")
    if rotaries[0].shipped_type in ("dynamic", "longrope") and rotaries[0].name not in planned:
        raise InvalidParameterError(
            f"Expected frequencies that stay for {method.name}, got {rotaries[0].shipped_type}. "
            f"Pass e.g. 'yarn+{method.name}'."
        )
    return rotaries[0]
