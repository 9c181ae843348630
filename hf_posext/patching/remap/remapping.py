"""Remapping of a patched model, in frozen objects that all its forwards share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...plan import Band, ExtensionPlan, Growth, PositionMap, QueryScale
from ..kernels import SAME, belongs, mapped
from .layout import LayerLayout


class Bands:
    """Bands of a plan, and values that follow from them alone.

    Args:
        bands (`tuple[Band, ...]`): disjoint bands.

    Attributes:
        query_maps (`tuple[PositionMap, ...]`): distinct maps of queries.
        query_choice (`tuple[int, ...]`): for each band, the index of its map in `query_maps`.
        key_maps (`tuple[PositionMap, ...]`): distinct maps of keys.
        key_choice (`tuple[int, ...]`): for each band, the index of its map in `key_maps`.
        edge (`int`, *optional*): window edge, the distance at which a key is rotated again. 0 if no key is rotated
            again. `None` if keys cannot stay rotated: with several edges, chunks, bands limited by `keys_below`, or
            maps by rotary pair.
        nearest (`PositionMap`): map of a key at the newest token.
        stays (`int`, *optional*): index of `nearest` in `query_maps`. `None` if queries do not use it.
        onward (`tuple[PositionMap, ...]`): other maps of queries.
        chunked (`bool`): whether some bands consist of chunks.
        slide (`bool`): whether all bands are windows that move with each query.
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
        """Return the map of a key at a distance from the newest token, for bands that slide or share a key map."""
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
        """Return whether a layer with a sliding window sees all pairs at the positions of the model.

        It does without bands, or if the window contains only pairs of a band that leaves positions unchanged.
        """
        if not self.bands:
            return True
        near = self.bands[0]
        unmoved = near.query == near.key == SAME and near.chunk == 1
        return window is not None and unmoved and (near.high is None or window <= near.high)

    def rotated_positions(self, newest: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return the positions to which keys (rows, keys) are rotated for a query at `newest` (rows, 1)."""
        targets = mapped(keys, self.bands[0].key) if self.bands else keys
        for band in self.bands[1:] if len(self.key_maps) > 1 else ():
            targets = torch.where(belongs(band, newest, keys)[:, 0], mapped(keys, band.key), targets)
        return targets

    def step_positions(self, newest: torch.Tensor) -> torch.Tensor:
        """Return all positions that a decoding step requests from its rotary module, in one call.

        The query is rotated further for each other band, and a key when it leaves the window. These rotations are
        computed from the phases of both positions. The phases of their difference would be another rotation at far
        positions, because a module rounds angles to float32.

        Args:
            newest (`torch.Tensor` of shape `(batch or 1, 1)`): position of the token.

        Returns:
            `torch.Tensor` of shape `(batch or 1, 1 + 2 * rotations)`: the position for the model's own rotation, then
            the position from which each further rotation starts, then the position at which it ends.
        """
        nearest, *further = (mapped(newest, rule) for rule in (self.nearest, *self.onward))
        within, behind = self.crossing(newest)
        return torch.cat([nearest, *[nearest] * len(further), *within, *further, *behind], -1)

    def crossing(self, newest: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the positions, inside and outside of the window, of the key that the token at `newest` pushes out.

        Both lists are empty if no key is rotated again.
        """
        if not self.edge:
            return [], []
        leaving_position = (newest - self.edge).clamp(min=0)
        within, behind = (mapped(leaving_position, self._key_map(self.edge - near)) for near in (1, 0))
        return [within], [behind]

    def leaving(self, count: int) -> int | None:
        """Return the index, among `count` keys, of the key that the newest one pushes out of the window, or `None`."""
        return count - 1 - self.edge if self.edge and count > self.edge else None


@dataclass(frozen=True)
class Layer:
    """Attention layer that rotates. Created when a model is patched, and stored on the layer's module.

    Args:
        remapping (`Remapping`): remapping of the model.
        layout (`LayerLayout`): layouts of the layer's queries and keys, on the CPU.
        window (`int`, *optional*): number of tokens that the layer's masks let it see back. `None` without a limit.
        near (`bool`): whether all pairs within the window are at the positions of the model.
        scale (`QueryScale`, *optional*): scale of the layer's queries.
        base (`Callable`): attention function of the unpatched module.
        index (`int`, *optional*): index of the layer in the cache.
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
        """Return the layer's layout on a device. A copy is kept for each device."""
        layout = self._copies.get(device)
        if layout is None:
            layout = self._copies[device] = self.layout.to(device)
        return layout


@dataclass(frozen=True)
class Remapping:
    """Remapping of positions in a patched model.

    It contains no state of a forward, a device, or a thread. Copies and pickles of the model have their own.

    Args:
        plan (`ExtensionPlan`): plan that is applied.
        base (`str`): attention implementation of the unpatched model, `"sdpa"` or `"eager"`.
        layers (`dict[str, LayerLayout]`): layout of each attention layer that rotates, by path.
        windows (`dict[str, int | None]`): sliding window of each of these layers, as in [`Layer`].
        delta (`bool`): whether the model rotates by its own positions and attention adds the difference. Used if an
            indexer reads rotated states (DeepSeek's sparse attention).
        rotates_cached_keys (`bool`): whether keys may stay rotated in the cache. The plan must rotate at most one
            cached key per step, rotations must be invertible, and nothing else in the model may read the cached keys.
        refused (`frozenset[str]`): arguments that the unpatched attention reads and attention over bands does not
            support.

    Attributes:
        bands (`Bands`): bands of the plan. Empty for a plan that only scales queries or only makes frequencies follow
            the length.
        growths (`dict[str, Growth]`): growth of the frequencies with the length of a document, by set of frequencies.
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

        A copy is kept for each device, because the host would have to wait for a transfer in every forward.
        """
        known = self._copies.get((name, device))
        if known is None:
            known = self._copies[name, device] = self._copies[name].to(device)
        return known


def _distinct(maps: Iterable[PositionMap]) -> tuple[tuple[PositionMap, ...], tuple[int, ...]]:
    maps = tuple(maps)
    distinct = tuple(dict.fromkeys(maps))
    return distinct, tuple(distinct.index(rule) for rule in maps)
