"""Remapping of a patched model, in frozen objects that all its forwards share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...plan import Band, ExtensionPlan, Growth, PositionMap
from ..kernels import SAME, belongs, mapped
from .layout import Layer


class Bands:
    """Disjoint bands of a plan, and values that follow from them alone."""

    def __init__(self, bands: tuple[Band, ...]) -> None:
        self.bands = bands
        # distinct maps of queries and of keys, and for each band the indices of its maps among them
        self.query_maps, self.query_choice = _distinct(band.query for band in bands)
        self.key_maps, self.key_choice = _distinct(band.key for band in bands)
        self.edge = self._edge()
        self.nearest = self._key_map(0)  # map of a key at the newest token
        # maps of a key that leaves the window: in its last step inside, and from then on
        self.leaves = [self._key_map(self.edge - 1), self._key_map(self.edge)] if self.edge else []
        self.stays = self.query_maps.index(self.nearest) if self.nearest in self.query_maps else None
        self.onward = tuple(rule for rule in self.query_maps if rule != self.nearest)  # maps beyond the nearest
        self.chunked = any(band.chunk > 1 for band in bands)
        self.slide = not self.chunked and all(band.keys_below is None for band in bands)  # windows of each query

    def _key_map(self, distance: int) -> PositionMap:
        """Return the map of a key at a distance from the newest token, for bands that slide or share a key map."""
        inside = (band for band in self.bands if band.low <= distance and (band.high is None or distance < band.high))
        return next(inside, self.bands[0]).key if self.bands else SAME

    def _edge(self) -> int | None:
        """Return the window edge, the distance at which a key is rotated again. 0 if no key is rotated again.

        `None` if keys cannot stay rotated: with several edges, chunks, bands limited by `keys_below`, or maps by
        rotary pair.
        """
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
        """Return all positions that a decoding step at `newest` (batch or 1, 1) requests from its rotary module.

        These are the position for the model's own rotation, then the positions from which further rotations start,
        then the positions at which these end. The query is rotated further for each other band, and a key when it
        leaves the window. These rotations are computed from the phases of both positions. The phases of their
        difference would be another rotation at far positions, because a module rounds angles to float32.
        """
        nearest, *further = (mapped(newest, rule) for rule in (self.nearest, *self.onward))
        leaving = self.crossing(newest)
        return torch.cat([nearest, *[nearest] * len(further), *leaving[:1], *further, *leaving[1:]], -1)

    def crossing(self, newest: torch.Tensor) -> list[torch.Tensor]:
        """Return the positions, inside and outside of the window, of the key that the token at `newest` pushes out.

        Empty if no key is rotated again.
        """
        if not self.edge:
            return []
        position = (newest - self.edge).clamp(min=0)
        return [mapped(position, rule) for rule in self.leaves]

    def leaving(self, count: int) -> int | None:
        """Return the index, among `count` keys, of the key that the newest one pushes out of the window, or `None`."""
        return count - 1 - self.edge if self.edge and count > self.edge else None


@dataclass(frozen=True)
class Remapping:
    """Remapping of positions in a patched model.

    It contains no state of a forward or a thread. Copies and pickles of the model have their own.
    """

    plan: ExtensionPlan
    base: str  # attention implementation of the unpatched model, "sdpa" or "eager"
    layers: dict[str, Layer] = field(default_factory=dict)  # attention layers that rotate, by path
    # Whether the model rotates by its own positions and attention adds the difference. Used if an indexer reads
    # rotated states (DeepSeek's sparse attention).
    delta: bool = False
    # Whether keys may stay rotated in the cache: the plan rotates at most one cached key per step, rotations are
    # invertible, and nothing else in the model reads the cached keys.
    rotates_cached_keys: bool = False
    # arguments that the unpatched attention reads and attention over bands does not support
    refused: frozenset[str] = frozenset()
    bands: Bands = field(init=False)  # empty for a plan that only scales queries or follows the length of rows
    growths: dict[str, Growth] = field(init=False)  # by set of frequencies
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
        numbers = self._copies.get((name, device))
        if numbers is None:
            numbers = self._copies[name, device] = self._copies[name].to(device)
        return numbers


def _distinct(maps: Iterable[PositionMap]) -> tuple[tuple[PositionMap, ...], tuple[int, ...]]:
    maps = tuple(maps)
    distinct = tuple(dict.fromkeys(maps))
    return distinct, tuple(distinct.index(rule) for rule in maps)
