"""Keys that stay in the cache as the latest token sees them, so that a step of decoding turns two and not all.

There is one cache. A key is turned for the near part as it comes, and for the far one as it leaves the window; a
forward of several tokens, whose queries see the same key in both, gets the keys turned back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from ..plan import Part, PositionMap
from .banded_attention import belongs, mapped
from .late_cache import is_static
from .rotary_layout import LayerLayout, Layout, Phases

if TYPE_CHECKING:
    from .late_positions import Positions
    from .late_state import LateRotation

HOLDERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer)
"""Layers of a cache that hold keys as they came, one behind the other. A static one that slides rolls them, and a
quantised one holds others: there all keys are turned at every step."""


def border(parts: tuple[Part, ...]) -> int | None:
    """The one distance at which a key is turned anew as tokens follow; 0 where none is, `None` where several are."""
    if len({part.key for part in parts}) <= 1:
        return 0
    if any(part.chunk > 1 or part.keys_below is not None for part in parts):
        return None
    found = {part.high for part in parts if part.high is not None} | {part.low for part in parts if part.low > 0}
    return found.pop() if len(found) == 1 else None


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
    if at.slot is not None:
        _step(late, layout.key, at, key, at.given.to(key.device))
        return key, True
    parts, known = late.plan.parts, late.cache._posext_turned
    before = known.pop(module.layer_idx, None)
    settle = at.regular and not key.requires_grad
    if before is None and not (settle and (tokens == 1 or is_static(late.cache))):
        return key, False  # static ones are turned at once: in a compiled step there is no first time
    count = min(key.shape[2], at.keys.shape[1])  # of a static cache some slots are free, a sliding one drops keys
    filled = key if count == key.shape[2] else key[:, :, :count]
    positions = at.once(("held", count, key.device), lambda: at.keys[:, -count:].to(key.device))
    newest = at.once(("newest", key.device), lambda: positions[:, -1:])
    held = count - tokens
    if before is not None and before[1] == held and settle and tokens == 1:
        _step(late, layout.key, at, filled, newest)
    else:
        plain, wrong = filled, None
        if before is None and tokens > 1:
            plain = filled.clone()
        if before is not None:
            old = stand(parts, before[0], positions[:, :held])
            back = _once(at, ("back", before[1], held), layout.key, key, lambda: _back(*late.phases(at, old, key)))
            plain = torch.cat([layout.key.rotate(filled[:, :, :held], back), filled[:, :, held:]], 2)
            wrong = torch.cat([old != stand(parts, newest, positions[:, :held]), positions[:, held:] >= 0], 1)
        if not settle:
            filled.copy_(plain)
            return plain, False
        wanted = stand(parts, newest, positions)
        turned = layout.key.rotate(
            plain, _once(at, ("all", count), layout.key, key, lambda: late.phases(at, wanted, key))
        )
        if wrong is not None:  # what stands right keeps its bits, so that no error adds up from turn to turn
            turned = torch.where(wrong[:, None, :, None], turned, filled)
        filled.copy_(turned)  # in place: the cache may hold a part of these keys, or must keep its memory
        key = key if tokens == 1 else plain
    known[module.layer_idx] = newest, min(count, layer.keys.shape[2])
    return key, tokens == 1


def _layer(late: LateRotation, module: nn.Module, key: torch.Tensor) -> DynamicLayer | StaticLayer | None:
    """The layer of the cache whose memory these very keys lie in, if it holds nothing but keys as they came."""
    index: Any = getattr(module, "layer_idx", None)
    layers: list[Any] = getattr(late.cache, "layers", [])
    if not late.keeps_turned or index is None or not 0 <= index < len(layers):  # zamba2's shared one says -1
        return None
    layer = layers[index]
    if torch.compiler.is_compiling() and index not in late.cache._posext_turned:
        return None  # a graph keeps its shape, and cannot say how many keys there are
    if type(layer) not in HOLDERS:
        return None
    if late.slot is not None:
        return layer
    there = layer.keys is key or layer.keys.untyped_storage()._cdata == key.untyped_storage()._cdata
    return layer if there else None


def _step(late: LateRotation, layout: Layout, at: Positions, key: torch.Tensor, newest: torch.Tensor) -> None:
    """Turn, in place, the key of a new token and the one that it pushes over the border; it is at `newest` (rows, 1).

    Positions are regular, so that the same columns of all rows are turned. In a compiled step these are a tensor, and
    whether a key has come to the border yet must not be asked.
    """
    parts, last = late.plan.parts, key.shape[2] - 1
    far = at.once("border", lambda: border(parts) or 0)
    moves = far > 0 and (at.slot is not None or far <= last)

    def phases() -> Phases:
        moved = (newest - far).clamp(min=0)
        turns = [(newest, 0), (moved, far), (moved, far - 1)] if moves else [(newest, 0)]
        wanted = [mapped(there, _key_map(parts, distance)) for there, distance in turns]
        rules = late.query_maps[0] or (PositionMap(),)
        cos, sin = late.phases(at, torch.cat([*wanted, *(mapped(newest, rule) for rule in rules)], 1), key)
        # those of the query, which comes after its key
        at.memo["phases", key.dtype, key.device] = cos[:, len(turns) :], sin[:, len(turns) :]
        if not moves:
            return layout.phases(cos[:, :1], sin[:, :1], key.dtype)
        on_cos, on_sin = cos[:, 1:2], sin[:, 1:2]
        back_cos, back_sin = _back(cos[:, 2:3], sin[:, 2:3])  # an attention factor cancels out
        on_cos, on_sin = on_cos * back_cos - on_sin * back_sin, on_sin * back_cos + on_cos * back_sin
        if at.slot is not None:
            there = at.slot >= far
            on_cos, on_sin = torch.where(there, on_cos, 1.0), torch.where(there, on_sin, 0.0)
        return layout.phases(torch.cat([on_cos, cos[:, :1]], 1), torch.cat([on_sin, sin[:, :1]], 1), key.dtype)

    turn = at.once(("step", layout.kind, last, key.dtype, key.device), phases)
    if at.slot is None:
        turned = key[:, :, last - far :: far] if moves else key[:, :, last:]
        turned.copy_(layout.rotate(turned, turn))
        return
    columns = torch.stack([(at.slot - far).clamp(min=0), at.slot] if moves else [at.slot]).to(key.device)
    key.index_copy_(2, columns, layout.rotate(key.index_select(2, columns), turn))


def _key_map(parts: tuple[Part, ...], distance: int) -> PositionMap:
    """What a key at a distance from the newest token is turned to, where parts are windows or all turn keys alike."""
    inside = (part for part in parts if part.low <= distance and (part.high is None or distance < part.high))
    return next(inside, parts[0]).key if parts else PositionMap()


def _back(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The opposite turn; phases may be larger than 1 by an attention factor."""
    dtype = torch.promote_types(cos.dtype, torch.float32)
    cos, sin = cos.to(dtype), sin.to(dtype)
    size = cos.square() + sin.square()
    return cos / size, -sin / size


def _once(
    at: Positions, what: Any, layout: Layout, like: torch.Tensor, make: Callable[[], tuple[torch.Tensor, torch.Tensor]]
) -> Phases:
    return at.once((what, "kept", layout.kind, like.dtype, like.device), lambda: layout.phases(*make(), like.dtype))
