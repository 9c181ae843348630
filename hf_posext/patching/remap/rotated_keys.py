"""Keys that stay in the cache as the newest token sees them, so that a step of decoding rotates two and not all.

There is one cache. A key is rotated for the near band as it comes, and for the far one as it leaves the window. A
forward of several tokens, whose queries see the same key in both, gets the keys rotated back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from ...errors import EvaluationError
from ..kernels import mapped
from .cache import START_ANEW, is_static
from .decoding_step import leaving, step_keys
from .layout import LayerLayout, Layout, Phases
from .positions import Positions, rotated_positions
from .rotary import phases_at

HOLDERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer)
"""Layers of a cache that hold keys as they came, one behind the other. A static one that slides rolls them, and a
quantised one holds others: there all keys are rotated at every step."""


def cached_keys(
    module: nn.Module, layout: LayerLayout, at: Positions, key: torch.Tensor, tokens: int, leave: bool = False
) -> tuple[torch.Tensor, bool, int | None]:
    """Rotate the keys of a layer in the cache as the newest token sees them, where they may stay so.

    Args:
        module (`nn.Module`): the attention layer.
        layout (`LayerLayout`): of the layer.
        at (`Positions`): of the forward.
        key (`torch.Tensor` of shape `(batch, heads, keys, dim)`): all keys that reached the attention.
        tokens (`int`): how many of them are new.
        leave (`bool`): leave the key that goes out of the window to the caller.

    Returns:
        `tuple[torch.Tensor, bool, int | None]`: the keys; whether they are rotated, for a single token, or not at all;
        and the index of the key that the caller has to rotate.
    """
    state = at.state
    layer = _layer(module, at, key)
    if layer is not None and at.slot is not None:
        step_keys(layout.key, at, key, at.query_axes.to(key.device))
        return key, True, None
    rotated = state.record.rotated if layer is not None and state.record is not None else {}
    index: Any = getattr(module, "layer_idx", None)
    before = rotated.pop(index, None)
    settle = at.regular and at.key_axes.ndim == 2 and not key.requires_grad
    if before is None and at.rotated:
        raise EvaluationError(
            "The cache gave a layer other keys than those that the last forward left there, and the model has rotated "
            f"the new key for those. {START_ANEW}"
        )
    if layer is None or before is None and not (settle and (tokens == 1 or is_static(state.cache))):
        state.loose.add(layout.rotary)
        return key, False, None  # static ones are rotated at once: in a compiled step there is no first time
    count = min(key.shape[2], at.keys.shape[1])  # of a static cache some slots are free, a sliding one drops keys
    filled = key if count == key.shape[2] else key[:, :, :count]
    positions = at.once(("held", count, key.device), lambda: at.keys[:, -count:].to(key.device))
    newest = at.once(("newest", key.device), lambda: positions[:, -1:])
    cached, last = count - tokens, None
    if before is not None and before[1] == cached and settle and tokens == 1:
        # a step: two keys
        if leave:
            last = leaving(state.remapping.bands, count)
        else:
            step_keys(layout.key, at, filled, newest)
    else:
        # all keys: the first step, several tokens, a crop, or a position that does not follow
        bands = state.remapping.bands
        plain, wrong = filled, None
        if before is None and tokens > 1:
            plain = filled.clone()
        if before is not None:
            old = rotated_positions(bands.parts, before[0], positions[:, :cached])
            if at.rotated:  # a single token's, by the model
                old = torch.cat([old, mapped(newest, bands.nearest)], 1)
            came = old.shape[1]
            back = _once(at, ("back", before[1], cached), layout.key, key, lambda: _back(*phases_at(at, old, key)))
            plain = torch.cat([layout.key.rotate(filled[:, :, :came], back), filled[:, :, came:]], 2)
            stands = old == rotated_positions(bands.parts, newest, positions[:, :came])
            wrong = torch.cat([~stands, positions[:, came:] >= 0], 1)
        if not settle:
            filled.copy_(plain)
            state.loose.add(layout.rotary)
            return plain, False, None
        wanted = rotated_positions(bands.parts, newest, positions)
        phases = _once(at, ("all", count), layout.key, key, lambda: phases_at(at, wanted, key))
        turned = layout.key.rotate(plain, phases)
        if wrong is not None:  # what stands right keeps its bits, so that no error adds up from step to step
            turned = torch.where(wrong[:, None, :, None], turned, filled)
        filled.copy_(turned)  # in place: the cache may hold a part of these keys, or must keep its memory
        key = key if tokens == 1 else plain
    rotated[index] = newest, min(count, layer.keys.shape[2])
    return key, tokens == 1, last


def _layer(module: nn.Module, at: Positions, key: torch.Tensor) -> DynamicLayer | StaticLayer | None:
    """The layer of the cache whose memory these very keys lie in, if it holds nothing but keys as they came."""
    state, index = at.state, getattr(module, "layer_idx", None)
    if not state.remapping.rotates_cached_keys or state.record is None or index is None:
        return None
    layers: list[Any] = getattr(state.cache, "layers", [])
    if not 0 <= index < len(layers):  # zamba2's shared one says -1
        return None
    if torch.compiler.is_compiling() and index not in state.record.rotated:
        return None  # a graph keeps its shape, and cannot say how many keys there are
    layer = layers[index]
    if type(layer) not in HOLDERS:
        return None
    if at.slot is not None:
        return layer
    there = layer.keys is key or layer.keys.untyped_storage()._cdata == key.untyped_storage()._cdata
    return layer if there else None


def _back(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The opposite rotation; phases may be larger than 1 by an attention factor."""
    dtype = torch.promote_types(cos.dtype, torch.float32)
    cos, sin = cos.to(dtype), sin.to(dtype)
    size = cos.square() + sin.square()
    return cos / size, -sin / size


def _once(
    at: Positions, what: Any, layout: Layout, like: torch.Tensor, make: Callable[[], tuple[torch.Tensor, torch.Tensor]]
) -> Phases:
    return at.once((what, "kept", layout.kind, like.dtype, like.device), lambda: layout.phases(*make(), like.dtype))
