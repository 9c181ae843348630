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

from ...errors import EvaluationError
from ..kernels import mapped
from .cache import is_static
from .decoding_step import leaving, step_keys
from .layout import LayerLayout, Layout, Phases
from .positions import stand

if TYPE_CHECKING:
    from .positions import Positions
    from .state import LateRotation

HOLDERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer)
"""Layers of a cache that hold keys as they came, one behind the other. A static one that slides rolls them, and a
quantised one holds others: there all keys are turned at every step."""


def turned_keys(
    late: LateRotation,
    module: nn.Module,
    layout: LayerLayout,
    at: Positions,
    key: torch.Tensor,
    tokens: int,
    leave: bool = False,
) -> tuple[torch.Tensor, bool, int]:
    """The keys (batch, heads, keys, dim) that reached the attention of some new tokens, and how they stand.

    Returns:
        `tuple[torch.Tensor, bool, int]`: the keys; whether they are turned for the one token that there is, or not at
        all; and which one has yet to be, as it goes over the border, if that shall be left to who asks; -1 for none.
    """
    layer = _layer(late, module, key)
    if layer is not None and at.slot is not None:
        step_keys(late, layout.key, at, key, at.given.to(key.device))
        return key, True, -1
    parts, known = late.plan.parts, late.cache._posext_turned if layer is not None else {}
    before = known.pop(module.layer_idx, None)
    settle = at.regular and not key.requires_grad
    if before is None and at.turned:
        raise EvaluationError(
            "the cache gave a layer other keys than those that the last forward left there; start with an empty one"
        )
    if layer is None or before is None and not (settle and (tokens == 1 or is_static(late.cache))):
        late.loose.add(layout.rotary)
        return key, False, -1  # static ones are turned at once: in a compiled step there is no first time
    count = min(key.shape[2], at.keys.shape[1])  # of a static cache some slots are free, a sliding one drops keys
    filled = key if count == key.shape[2] else key[:, :, :count]
    positions = at.once(("held", count, key.device), lambda: at.keys[:, -count:].to(key.device))
    newest = at.once(("newest", key.device), lambda: positions[:, -1:])
    held, last = count - tokens, -1
    if before is not None and before[1] == held and settle and tokens == 1:
        if leave:
            last = leaving(late, count)
        else:
            step_keys(late, layout.key, at, filled, newest)
    else:
        plain, wrong = filled, None
        if before is None and tokens > 1:
            plain = filled.clone()
        if before is not None:
            old = stand(parts, before[0], positions[:, :held])
            if at.turned:  # a single token's, by the model
                old = torch.cat([old, mapped(newest, late.nearest)], 1)
            came = old.shape[1]
            back = _once(at, ("back", before[1], held), layout.key, key, lambda: _back(*late.phases(at, old, key)))
            plain = torch.cat([layout.key.rotate(filled[:, :, :came], back), filled[:, :, came:]], 2)
            wrong = torch.cat([old != stand(parts, newest, positions[:, :came]), positions[:, came:] >= 0], 1)
        if not settle:
            filled.copy_(plain)
            late.loose.add(layout.rotary)
            return plain, False, -1
        wanted = stand(parts, newest, positions)
        turned = layout.key.rotate(
            plain, _once(at, ("all", count), layout.key, key, lambda: late.phases(at, wanted, key))
        )
        if wrong is not None:  # what stands right keeps its bits, so that no error adds up from turn to turn
            turned = torch.where(wrong[:, None, :, None], turned, filled)
        filled.copy_(turned)  # in place: the cache may hold a part of these keys, or must keep its memory
        key = key if tokens == 1 else plain
    known[module.layer_idx] = newest, min(count, layer.keys.shape[2])
    return key, tokens == 1, last


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
