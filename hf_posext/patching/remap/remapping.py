"""Remapping of a patched model: frozen objects that all its forwards share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...plan import Band, ExtensionPlan, Growth, PositionMap, QueryScale
from ..kernels import SAME, belongs, mapped
from .layout import LayerLayout


class Bands:
    """The bands of a plan, and what follows from them alone.

    Args:
        bands (`tuple[Band, ...]`): disjoint.

    Attributes:
        query_maps (`tuple[PositionMap, ...]`): each map of queries once.
        query_choice (`tuple[int, ...]`): for each band, which of them.
        key_maps (`tuple[PositionMap, ...]`): each map of keys once.
        key_choice (`tuple[int, ...]`): for each band, which of them.
        edge (`int`, *optional*): the distance at which a key is rotated anew; 0 without one, `None` with several.
        nearest (`PositionMap`): of a key at the newest token.
        stays (`int`, *optional*): which map of queries is `nearest`.
        onward (`tuple[PositionMap, ...]`): the other maps of queries.
        chunked (`bool`): some of them are made of chunks.
        slide (`bool`): all of them are windows that move with each query.
    """

    def __init__(self, bands: tuple[Band, ...]) -> None:
        self.bands = bands
        self.query_maps, self.query_choice = _distinct(band.query for band in bands)
        self.key_maps, self.key_choice = _distinct(band.key for band in bands)
        self.edge = self._edge()
        self.nearest = self._key_map(0)
        self.stays = self.query_maps.index(self.nearest) if self.nearest in self.query_maps else None
        self.onward = tuple(rule for rule in self.query_maps if rule != self.nearest)
        self.chunked = any(band.chunk > 1 for band in bands)
        self.slide = not self.chunked and all(band.keys_below is None for band in bands)

    def _key_map(self, distance: int) -> PositionMap:
        """Return how a key at a distance from the newest token is mapped, where bands slide or map keys alike."""
        inside = (band for band in self.bands if band.low <= distance and (band.high is None or distance < band.high))
        return next(inside, self.bands[0]).key if self.bands else SAME

    def _edge(self) -> int | None:
        if any(band.key.by_pair or band.query.by_pair for band in self.bands):
            return None
        if len(self.key_maps) <= 1:
            return 0
        if any(band.chunk > 1 or band.keys_below is not None for band in self.bands):
            return None
        edges = {edge for band in self.bands for edge in (band.low, band.high) if edge}
        return edges.pop() if len(edges) == 1 else None

    def sees_one(self, window: int | None) -> bool:
        """Return whether a layer sees all pairs at the positions of the model.

        There are no bands, or its sliding window holds only pairs of a band that leaves positions as they are.
        """
        if not self.bands:
            return True
        near = self.bands[0]
        unmoved = near.query == near.key == SAME and near.chunk == 1
        return window is not None and unmoved and (near.high is None or window <= near.high)

    def rotated_positions(self, newest: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return what keys at positions (rows, keys) are rotated to for a query at `newest` (rows, 1)."""
        wanted = mapped(keys, self.bands[0].key) if self.bands else keys
        for band in self.bands[1:] if len(self.key_maps) > 1 else ():
            wanted = torch.where(belongs(band, newest, keys)[:, 0], mapped(keys, band.key), wanted)
        return wanted

    def step_positions(self, newest: torch.Tensor) -> torch.Tensor:
        """Return all positions of which a step of decoding asks its rotary module, in one call.

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
        within, behind = (mapped(there, self._key_map(self.edge - near)) for near in (1, 0))
        return [within], [behind]

    def leaving(self, count: int) -> int | None:
        """Return the index of the key, of some, that the newest pushes out of the window; `None` without one."""
        return count - 1 - self.edge if self.edge and count > self.edge else None


@dataclass(frozen=True)
class Layer:
    """An attention layer that rotates, as the attention function finds it on the module: decided when patched.

    Args:
        remapping (`Remapping`): of the model.
        layout (`LayerLayout`): how it rotates, on the CPU.
        window (`int`, *optional*): how many tokens back its masks let it see; `None` without a bound.
        near (`bool`): within it, all pairs are at the positions of the model; otherwise there are several bands.
        scale (`QueryScale`, *optional*): of its queries.
        base (`Callable`): the attention function of the unpatched module.
        index (`int`, *optional*): its layer of the cache.
    """

    remapping: Remapping
    layout: LayerLayout
    window: int | None
    near: bool
    scale: QueryScale | None
    base: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
    index: int | None
    _copies: dict[torch.device, LayerLayout] = field(default_factory=dict, init=False, repr=False, compare=False)

    def layout_on(self, device: torch.device) -> LayerLayout:
        """Return how the layer rotates, on a device."""
        layout = self._copies.get(device)
        if layout is None:
            layout = self._copies[device] = self.layout.to(device)
        return layout


@dataclass(frozen=True)
class Remapping:
    """Positions in force on a patched model.

    Nothing in it belongs to a forward, a device or a thread. Copies and pickles of the model have their own.

    Args:
        plan (`ExtensionPlan`): the plan.
        base (`str`): the attention of the unpatched model, `"sdpa"` or `"eager"`.
        layers (`dict[str, LayerLayout]`): for each attention layer that rotates, by its path, how.
        windows (`dict[str, int | None]`): their sliding windows, as [`Layer`] has them.
        delta (`bool`): the model rotates by its own positions, and attention adds the difference. So it is where an
            indexer reads rotated states (DeepSeek's sparse attention).
        rotates_cached_keys (`bool`): keys may stay rotated in the cache: the plan rotates one key anew at a step at
            most, rotations can be undone, and nothing else in the model reads the cached keys.
        refused (`frozenset[str]`): arguments that the unpatched attention reads, and attention over bands does not
            honour.

    Attributes:
        bands (`Bands`): of the plan. Empty where queries are scaled or frequencies follow the length only.
        growths (`dict[str, Growth]`): by set of frequencies, how they follow the length of a document.
    """

    plan: ExtensionPlan
    base: str
    layers: dict[str, LayerLayout] = field(default_factory=dict)
    windows: dict[str, int | None] = field(default_factory=dict)
    delta: bool = False
    rotates_cached_keys: bool = False
    refused: frozenset[str] = frozenset()
    bands: Bands = field(init=False)
    growths: dict[str, Growth] = field(init=False)
    _copies: dict[Any, torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        growths = {entry.name: entry.growth for entry in self.plan.rotaries if entry.growth is not None}
        object.__setattr__(self, "bands", Bands(self.plan.bands))
        object.__setattr__(self, "growths", growths)
        for name, growth in growths.items():
            numbers = (growth.moving, growth.power, growth.kept)
            self._copies[name] = torch.tensor(numbers, dtype=torch.float32, device="cpu")

    def growth(self, name: str, device: torch.device) -> torch.Tensor:
        """Return `moving`, `power` and `kept` of [`Growth`] as float32 (3, slots) on a device.

        One copy is made for each device. To get it there in every forward, the host would wait.
        """
        known = self._copies.get((name, device))
        if known is None:
            known = self._copies[name, device] = self._copies[name].to(device)
        return known


def _distinct(maps: Iterable[PositionMap]) -> tuple[tuple[PositionMap, ...], tuple[int, ...]]:
    maps = tuple(maps)
    distinct = tuple(dict.fromkeys(maps))
    return distinct, tuple(distinct.index(one) for one in maps)
