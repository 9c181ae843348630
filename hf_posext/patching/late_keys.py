"""Keys that stay in the cache as the latest token sees them, so that a step of decoding turns a few and not all.

There is one cache. A key is turned for the near part as it comes, and for the far one as it leaves the window; a
forward of several tokens, whose queries see the same key in both, gets the keys turned back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer

from ..plan import Part
from .banded_attention import belongs, mapped
from .rotary_layout import LayerLayout

if TYPE_CHECKING:
    from .late_state import LateRotation, Positions


def borders(parts: tuple[Part, ...]) -> tuple[int, ...] | None:
    """Distances at which a key is turned anew as tokens follow; `None` where keys of many distances are, at once."""
    if len({part.key for part in parts}) <= 1:
        return ()
    if any(part.chunk > 1 for part in parts):
        return None
    return tuple(sorted({part.high for part in parts if part.high is not None} | {part.low for part in parts} - {0}))


def stand(parts: tuple[Part, ...], newest: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """What keys at positions (rows, keys) are turned to for a query at `newest` (rows, 1); the same shape as keys."""
    if len({part.key for part in parts}) <= 1:
        return mapped(keys, parts[0].key) if parts else keys
    wanted = mapped(keys, parts[0].key)
    for part in parts[1:]:
        wanted = torch.where(belongs(part, newest, keys)[:, 0], mapped(keys, part.key), wanted)
    return wanted


def turned_keys(
    late: LateRotation, module: nn.Module, layout: LayerLayout, at: Positions, key: torch.Tensor, tokens: int
) -> tuple[torch.Tensor, bool]:
    """The keys (batch, heads, keys, dim) that reached the attention of some new tokens, and how they stand.

    Returns:
        `tuple[torch.Tensor, bool]`: the keys, and whether they are turned for the one token that there is; if not,
        they are not turned at all.
    """
    layer = _layer(late, module, key)
    if layer is None:
        return key, False
    parts, known = late.plan.parts, late.cache._posext_turned
    before = known.pop(module.layer_idx, None)
    settle = at.regular and not key.requires_grad
    if before is None and not (settle and tokens == 1):
        return key, False
    positions = at.keys.to(key.device)
    newest, held = positions[:, -1:], key.shape[2] - tokens
    if before is not None and before[1] == held and settle and tokens == 1:
        _step(late, layout, at, key, positions)
    else:
        plain, moved = key, None
        if before is not None:
            old = stand(parts, before[0], positions[:, :held])
            back = _phases(late, at, ("back", before[1], held), old, key)
            plain = torch.cat([_turn_back(layout, key[:, :, :held], back), key[:, :, held:]], 2)
            moved = torch.cat([old != stand(parts, newest, positions[:, :held]), positions[:, held:] >= 0], 1)
        if not settle:
            layer.keys = plain
            return plain, False
        wanted = stand(parts, newest, positions)
        turned = layout.key.rotate(plain, *_phases(late, at, ("settle", key.shape[2]), wanted, key))
        # what stands right keeps its bits, so that nothing adds up from turn to turn
        layer.keys = turned if moved is None else torch.where(moved[:, None, :, None], turned, key)
        key = layer.keys if tokens == 1 else plain
    known[module.layer_idx] = newest, layer.keys.shape[2]
    return key, tokens == 1


def _layer(late: LateRotation, module: nn.Module, key: torch.Tensor) -> DynamicLayer | None:
    """The layer of the cache that holds these very keys and nothing but keys as they came."""
    index: Any = getattr(module, "layer_idx", None)
    layers: list[Any] = getattr(late.cache, "layers", [])
    if not late.keeps_turned or index is None or index >= len(layers):
        return None
    layer = layers[index]
    return layer if type(layer) is DynamicLayer and layer.keys is key else None


def _step(late: LateRotation, layout: LayerLayout, at: Positions, key: torch.Tensor, positions: torch.Tensor) -> None:
    """Turn the key of a new token, and those which it pushes over a border, where they are."""
    parts, newest = late.plan.parts, positions[:, -1:]
    new = _phases(late, at, "new", stand(parts, newest, newest), key)
    key[:, :, -1:] = layout.key.rotate(key[:, :, -1:], *new)
    if not (distances := borders(parts)):
        return
    place = at.memo.get("place")
    if place is None:  # the latest key at each of the distances; where there is none the new key, which stays
        index = torch.arange(positions.shape[1], device=key.device)
        hits = positions[:, None] == newest[..., None] - torch.tensor(distances, device=key.device)[:, None]
        place = torch.where(hits, index, -1).amax(-1)
        place = at.memo["place"] = torch.where(place < 0, index[-1], place)
    there = positions.gather(1, place)
    back = _phases(late, at, "from", stand(parts, newest - 1, there), key)
    on = _phases(late, at, "to", stand(parts, newest, there), key)
    column = place[:, None, :, None].expand(key.shape[0], key.shape[1], -1, key.shape[3])
    moved = layout.key.rotate(_turn_back(layout, key.gather(2, column), back), *on)
    key.scatter_(2, column, moved)


def _turn_back(
    layout: LayerLayout, states: torch.Tensor, phases: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Keys before the turn by these phases, which may be larger than 1 by an attention factor."""
    cos, sin = phases
    size = cos.float().square() + sin.float().square()
    return layout.key.rotate(states, (cos / size).to(cos.dtype), (-sin / size).to(sin.dtype))


def _phases(
    late: LateRotation, at: Positions, what: Any, wanted: torch.Tensor, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine at wanted positions, once for all layers of a forward."""
    memo = what, like.dtype, like.device
    if memo not in at.memo:
        at.memo[memo] = late.phases(at, wanted, like)
    found: tuple[torch.Tensor, torch.Tensor] = at.memo[memo]
    return found
