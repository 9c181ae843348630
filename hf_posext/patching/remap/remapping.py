"""Remapping of a patched model: one frozen object that all its forwards share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ...plan import Band, ExtensionPlan, Growth, PositionMap, QueryScale
from ..kernels import mapped
from .layout import LayerLayout
from .positions import key_map, window_edge


@dataclass(frozen=True)
class Bands:
    """The bands of a plan, and what follows from them alone.

    Args:
        parts (`tuple[Band, ...]`): the bands; disjoint.

    Attributes:
        query_maps (`tuple[PositionMap, ...]`): each map of queries once.
        query_choice (`tuple[int, ...]`): for each band, which of them.
        key_maps (`tuple[PositionMap, ...]`): each map of keys once.
        key_choice (`tuple[int, ...]`): for each band, which of them.
        edge (`int`, *optional*): the distance at which a key is rotated anew; 0 without one, `None` with several.
        nearest (`PositionMap`): of a key at the newest token.
        stays (`int`, *optional*): which map of queries is `nearest`.
        onward (`tuple[PositionMap, ...]`): the other maps of queries.
    """

    parts: tuple[Band, ...]
    query_maps: tuple[PositionMap, ...] = field(init=False)
    query_choice: tuple[int, ...] = field(init=False)
    key_maps: tuple[PositionMap, ...] = field(init=False)
    key_choice: tuple[int, ...] = field(init=False)
    edge: int | None = field(init=False)
    nearest: PositionMap = field(init=False)
    stays: int | None = field(init=False)
    onward: tuple[PositionMap, ...] = field(init=False)

    def __post_init__(self) -> None:
        queries, query_choice = _distinct([part.query for part in self.parts])
        keys, key_choice = _distinct([part.key for part in self.parts])
        nearest = key_map(self.parts, 0)
        derived = {
            "query_maps": queries,
            "query_choice": query_choice,
            "key_maps": keys,
            "key_choice": key_choice,
            "edge": window_edge(self.parts),
            "nearest": nearest,
            "stays": queries.index(nearest) if nearest in queries else None,
            "onward": tuple(rule for rule in queries if rule != nearest),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def step_positions(self, newest: torch.Tensor) -> torch.Tensor:
        """
        Return all positions of which a step of decoding asks its rotary module, in one call.

        The query is rotated on for each other band, and a key as it leaves the window. Not by phases at the distance
        between: a module rounds angles to float32, so that these would be another rotation at far positions.

        Args:
            newest (`torch.Tensor` of shape `(batch or 1, 1)`): position of the token.

        Returns:
            `torch.Tensor` of shape `(batch or 1, 1 + 2 * rotations)`: the nearest, which is for the model; then from
            where each rotation goes; then to where.
        """
        nearest, *others = (mapped(newest, rule) for rule in (self.nearest, *self.onward))
        within, behind = self.crossing(newest)
        return torch.cat([nearest, *[nearest] * len(others), *within, *others, *behind], -1)

    def crossing(self, newest: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the positions of the key that the token at `newest` pushes out of the window, within it and behind;
        none where no key is rotated anew."""
        if not self.edge:
            return [], []
        there = (newest - self.edge).clamp(min=0)
        within, behind = (mapped(there, key_map(self.parts, self.edge - near)) for near in (1, 0))
        return [within], [behind]


@dataclass(frozen=True)
class Remapping:
    """Positions in force on a patched model.

    Nothing in it belongs to a forward, a device or a thread. Copies and pickles of the model have their own.

    Args:
        plan (`ExtensionPlan`): the plan.
        base (`str`): the attention of the unpatched model, `"sdpa"` or `"eager"`.
        layers (`dict[str, LayerLayout]`): for each attention layer that rotates, by its path, how.
        delta (`bool`): the model rotates by its own positions, and attention adds the difference. So it is where an
            indexer reads rotated states (DeepSeek's sparse attention).
        rotates_cached_keys (`bool`): keys may stay rotated in the cache: the plan rotates one key anew at a step at
            most, rotations can be undone, and nothing else in the model reads the cached keys.
        bands (`Bands`): of the plan. Empty where queries are scaled or frequencies follow the length only.
        query_scale (`QueryScale`, *optional*): of the plan.
        refused (`frozenset[str]`): arguments that the unpatched attention reads, and attention over bands does not
            honour.
        growths (`dict[str, Growth]`): by set of frequencies, how they follow the length of a document.
    """

    plan: ExtensionPlan
    base: str
    layers: dict[str, LayerLayout]
    delta: bool
    rotates_cached_keys: bool
    bands: Bands
    query_scale: QueryScale | None
    refused: frozenset[str]
    growths: dict[str, Growth]
    _copies: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        plan: ExtensionPlan,
        base: str,
        layers: dict[str, LayerLayout],
        *,
        delta: bool = False,
        rotates_cached_keys: bool = False,
        refused: frozenset[str] = frozenset(),
    ) -> Remapping:
        """Return what a plan does to a model of known layouts."""
        growths = {entry.name: entry.growth for entry in plan.rotaries if entry.growth is not None}
        bands = Bands(plan.parts)
        return cls(plan, base, layers, delta, rotates_cached_keys, bands, plan.query_scale, refused, growths)

    def __post_init__(self) -> None:
        for name, growth in self.growths.items():
            numbers = (growth.moving, growth.power, growth.kept)
            self._copies[name] = torch.tensor(numbers, dtype=torch.float32, device="cpu")

    def layer(self, path: str, device: torch.device) -> LayerLayout | None:
        """Return how an attention layer rotates, on a device; `None` where it does not rotate."""
        known: LayerLayout | None = self._copies.get((path, device))
        if known is None and path in self.layers:
            known = self._copies[path, device] = self.layers[path].to(device)
        return known

    def growth(self, name: str, device: torch.device) -> torch.Tensor:
        """Return `moving`, `power` and `kept` of [`Growth`] as float32 (3, slots) on a device.

        One copy is made for each device. To get it there in every forward, the host would wait.
        """
        known: torch.Tensor | None = self._copies.get((name, device))
        if known is None:
            known = self._copies[name, device] = self._copies[name].to(device)
        return known


def _distinct(maps: list[PositionMap]) -> tuple[tuple[PositionMap, ...], tuple[int, ...]]:
    """Return each map once, and which of them each band has."""
    distinct = tuple(dict.fromkeys(maps))
    return distinct, tuple(distinct.index(one) for one in maps)
