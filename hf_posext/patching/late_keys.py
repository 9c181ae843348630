"""Keys that stay in the cache as the latest token sees them, so that a step of decoding turns two and not all.

There is one cache. A key is turned for the near part as it comes, and for the far one as it leaves the window; a
forward of several tokens, whose queries see the same key in both, gets the keys turned back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer

from ..plan import Part, PositionMap
from .banded_attention import belongs, mapped
from .rotary_layout import LayerLayout, Layout, Phases

if TYPE_CHECKING:
    from .late_state import LateRotation, Positions


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
    parts, known = late.plan.parts, late.cache._posext_turned
    before = known.pop(module.layer_idx, None)
    settle = at.regular and not key.requires_grad
    if before is None and not (settle and tokens == 1):
        return key, False
    positions = at.keys.to(key.device)
    newest, held = positions[:, -1:], key.shape[2] - tokens
    if before is not None and before[1] == held and settle and tokens == 1:
        _step(late, layout.key, at, key, positions)
    else:
        plain, wrong = key, None
        if before is not None:
            old = stand(parts, before[0], positions[:, :held])
            back = _once(at, ("back", before[1], held), layout.key, key, lambda: _back(*late.phases(at, old, key)))
            plain = torch.cat([layout.key.rotate(key[:, :, :held], back), key[:, :, held:]], 2)
            wrong = torch.cat([old != stand(parts, newest, positions[:, :held]), positions[:, held:] >= 0], 1)
        if not settle:
            layer.keys = plain
            return plain, False
        wanted = stand(parts, newest, positions)
        phases = _once(at, ("all", key.shape[2]), layout.key, key, lambda: late.phases(at, wanted, key))
        layer.keys = layout.key.rotate(plain, phases)
        if wrong is not None:  # what stands right keeps its bits, so that no error adds up from turn to turn
            layer.keys = torch.where(wrong[:, None, :, None], layer.keys, key)
        key = layer.keys if tokens == 1 else plain
    known[module.layer_idx] = newest, layer.keys.shape[2]
    return key, tokens == 1


def _layer(late: LateRotation, module: nn.Module, key: torch.Tensor) -> DynamicLayer | None:
    """The layer of the cache that holds these very keys and nothing but keys as they came."""
    index: Any = getattr(module, "layer_idx", None)
    layers: list[Any] = getattr(late.cache, "layers", [])
    if not late.keeps_turned or index is None or not 0 <= index < len(layers):  # zamba2's shared one says -1
        return None
    layer = layers[index]
    return layer if type(layer) is DynamicLayer and layer.keys is key else None


def _step(late: LateRotation, layout: Layout, at: Positions, key: torch.Tensor, positions: torch.Tensor) -> None:
    """Turn, in place, the key of a new token and the one that it pushes over the border."""
    parts, last = late.plan.parts, key.shape[2] - 1
    far = at.once("border", lambda: border(parts) or 0)
    moves = 0 < far <= last
    columns = slice(last - far, None, far) if moves else slice(last, None)  # of all rows: their positions are regular

    def phases() -> Phases:
        there = positions[:, columns]
        newest = mapped(there[:, -1:], _key_map(parts, 0))
        if not moves:
            return layout.phases(*late.phases(at, newest, key), key.dtype)
        moved = there[:, :1]
        new, old = mapped(moved, _key_map(parts, far)), mapped(moved, _key_map(parts, far - 1))
        both = late.phases(at, torch.cat([newest, new, old], 1), key)
        dtype = torch.promote_types(key.dtype, torch.float32)
        turn = torch.complex(*(one.to(dtype) for one in both))
        turn = torch.cat([turn[:, 1:2] / turn[:, 2:], turn[:, :1]], 1)  # an attention factor cancels out
        return layout.phases(turn.real, turn.imag, key.dtype)

    turned = key[:, :, columns]
    turned.copy_(layout.rotate(turned, at.once(("step", layout.kind, last, key.dtype, key.device), phases)))


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
