"""Rotates late: queries and keys reach the attention function, and the cache, unrotated.

Rotary modules return the identity (cosine 1, sine 0); a function in transformers' `AttentionInterface` rotates with
the positions that the plan wants for each pair, then attends. No model's forward is copied. Where an indexer selects
keys by their rotated states (DeepSeek's sparse attention), the model rotates as ever and the function turns by the
difference.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from ..errors import EvaluationError, UnsupportedModelError
from ..plan import ExtensionPlan, QueryScale, RotaryPlan
from .banded_attention import Branch, banded_attention, mapped
from .detect import RotarySite
from .mixin import Mixin
from .rotary_layout import Angle, Captured, LayerLayout

MASKS = {"posext-sdpa": sdpa_mask, "posext-eager": eager_mask}
"""Names under which the attention function is registered, by the masks that the model shall build for it."""

HARMLESS = frozenset(
    "position_ids cache_position use_cache output_attentions output_hidden_states return_dict is_causal scaling "
    "dropout softcap s_aux sliding_window position_embeddings past_key_values num_items_in_batch cu_seq_lens_q cu_seq_lens_k "
    "max_length_q max_length_k output_router_logits logits_to_keep".split()
)
"""Arguments of attention functions that `banded_attention` honours, or that do not change what is attended."""


class LateRotation:
    """What the rotary modules, the attention function and the hooks of one patched model share.

    Plain data and tensors, so that copies and pickles of the model carry their own.
    """

    def __init__(self, plan: ExtensionPlan, base: str, delta: bool) -> None:
        self.plan = plan
        self.base = base
        self.delta = delta
        self.sites: dict[str, RotarySite] = {}
        self.layers: dict[str, LayerLayout] = {}
        self.angle: Angle | None = None
        self.captured: Captured = {}
        self.unmapped = True  # until the layouts are known and checked
        self.positions: dict[str, torch.Tensor] = {}
        self.key_positions: dict[str, torch.Tensor] = {}
        self.aligned = False
        self.past: torch.Tensor | None = None
        _users.add(self)
        _register()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _users.add(self)
        _register()

    def note(self, name: str, position_ids: torch.Tensor) -> None:
        """Remember the positions of the forward at hand, as a rotary module is asked for their phases."""
        flat = position_ids if position_ids.ndim == 2 else position_ids[0]
        keys = flat if self.past is None else torch.cat([self.past.expand(flat.shape[0], -1), flat], -1)
        self.positions[name], self.key_positions[name] = position_ids, keys
        if flat.shape[1] > 1:
            self.aligned = bool((keys == torch.arange(keys.shape[1], device=keys.device)).all())

    def phases(self, name: str, positions: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine (batch, tokens, slots) of a set at positions (batch, tokens), in the dtype of `like`."""
        site = self.sites[name]
        entry = next((rotary for rotary in self.plan.rotaries if rotary.name == name), None)
        if entry is None or entry.growth is None or self.unmapped:
            return _phases(site, positions, like)
        scales = self._scales(name)
        rows = [_grown_phases(site, entry, positions[row : row + 1], scales[row], like) for row in range(len(scales))]
        cos, sin = zip(*rows, strict=True)
        return torch.cat(cos), torch.cat(sin)

    def _scales(self, name: str) -> torch.Tensor:
        """`max(1, row length / original length)` of each row; the row's length is its highest position + 1."""
        positions = self.positions[name]
        flat = positions if positions.ndim == 2 else positions[0]
        return ((flat.amax(-1) + 1) / self.plan.original_length).clamp(min=1.0)

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook: find the positions of the keys in the cache."""
        cache: Any = kwargs.get("past_key_values")
        length = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
        self.past = None
        if length:
            known = getattr(cache, "_posext_positions", None)
            if known is None or known.shape[-1] < length:
                raise EvaluationError(
                    "the cache holds keys from before the patch, which are rotated already; start with an empty cache"
                )
            self.past = known[..., :length]

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Hook: leave the positions of the keys with the cache that holds them."""
        cache = getattr(output, "past_key_values", None) or kwargs.get("past_key_values")
        if cache is not None and self.key_positions:
            cache._posext_positions = next(iter(self.key_positions.values()))
        self.past = None


class RotatesLate(Mixin):
    """Mixed into the class of a rotary module: notes the positions and returns the identity."""

    _posext_late: LateRotation
    _posext_sets: dict[str, str]
    """The set of frequencies that each layer type asks for."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        late = self._posext_late
        extra = {} if layer_type is None else {"layer_type": layer_type}
        out = super().forward(x, position_ids, **extra)
        name = self._posext_sets[layer_type or ""]
        if late.angle is not None:
            return _identity_or(out, late.angle, name)
        late.note(name, position_ids)
        return out if late.delta else _identity_or(out, lambda _, cos: torch.zeros_like(cos), name)


def _identity_or(out: Any, angle: Angle, name: str) -> Any:
    """A rotary module's output with quarter turns in place of its phases."""
    cos, _ = _parts(out)
    turned = angle(name, cos)
    if isinstance(out, torch.Tensor):
        return torch.complex((1 - turned).float(), turned.float())
    return type(out)((1 - turned, turned))


def _parts(out: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of a rotary module's output, which may be complex."""
    return (out.real, out.imag) if isinstance(out, torch.Tensor) else (out[0], out[1])


def _phases(site: RotarySite, positions: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the module's own forward gives at positions, below the mixin."""
    module: Any = site.module
    extra = {"layer_type": site.layer_type} if site.layer_type else {}
    return _parts(super(RotatesLate, module).forward(like, positions, **extra))


def _grown_phases(
    site: RotarySite, entry: RotaryPlan, positions: torch.Tensor, scale: torch.Tensor, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Phases of one row whose frequencies follow its length."""
    assert entry.growth is not None
    name = f"{site.prefix}inv_freq"
    held: torch.Tensor = getattr(site.module, name)
    moving, power, kept = (held.new_tensor(n) for n in (entry.growth.moving, entry.growth.power, entry.growth.kept))
    try:
        setattr(site.module, name, moving * scale ** (-power) + kept)
        cos, sin = _phases(site, positions, like)
    finally:
        setattr(site.module, name, held)
    sharper = (1 + entry.growth.temperature * scale.log()).to(cos.dtype)
    return cos * sharper, sin * sharper


def late_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The function in `AttentionInterface`: rotate as the plan says, then attend.

    Layers that do not rotate, and sliding-window layers that see only the nearest part, attend as in the unpatched
    model.
    """
    late: LateRotation | None = getattr(module, "_posext_late", None)
    if late is None:
        raise EvaluationError(f"{type(module).__name__} was made after the patch; undo the patch, then patch again")
    path: str = module._posext_path  # type: ignore[assignment]
    if late.angle is not None:
        late.captured[path] = (query.detach(), key.detach())
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None
    layout = late.layers.get(path)
    if layout is None:
        return _base_attention(late, module, query, key, value, attention_mask, **kwargs)
    if attention_mask is None and query.shape[2] > 1 and key.shape[2] > query.shape[2]:
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]  # an empty static cache

    at_query = late.positions[layout.rotary]
    given = kwargs.get("position_ids")
    if given is not None and given.shape == at_query.shape and key.shape[2] == query.shape[2]:
        at_query = given  # the layer's own: a gradient checkpoint may run after another forward
    flat = at_query if at_query.ndim == 2 else at_query[0]
    flat = flat.expand(query.shape[0], -1)
    at_key = flat if key.shape[2] == query.shape[2] else _key_positions(late, layout.rotary, key)

    parts = () if late.unmapped else late.plan.parts
    scale = None if late.unmapped else late.plan.query_scale
    window = kwargs.get("sliding_window")
    if not parts or (window is not None and parts[0].chunk == 1 and window <= (parts[0].high or window)):
        query = _turn(late, layout, 0, query, at_query, at_query)
        key = _turn(late, layout, 1, key, at_key if at_query.ndim == 2 else _as_axes(at_key, at_query), at_key)
        query = _scaled(query, flat, scale)
        return _base_attention(late, module, query, key, value, attention_mask, **kwargs)

    unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in HARMLESS)
    if unknown:
        raise UnsupportedModelError(
            f"{type(module).__name__} asks its attention for {', '.join(unknown)}, which remapping cannot honour"
        )
    branches = []
    for part in parts:
        turned_query = _turn(late, layout, 0, query, mapped(flat, part.query), flat)
        turned_key = _turn(late, layout, 1, key, mapped(at_key, part.key), at_key)
        branches.append(Branch(part, _scaled(turned_query, flat, scale), turned_key))
    scaling = kwargs.get("scaling")
    out = banded_attention(
        branches,
        value,
        flat,
        at_key,
        mask=attention_mask,
        aligned=late.aligned and query.shape[2] > 1,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        dropout=kwargs.get("dropout") or 0.0,
    )
    return out, None


def _turn(
    late: LateRotation, layout: LayerLayout, side: int, states: torch.Tensor, wanted: torch.Tensor, now: torch.Tensor
) -> torch.Tensor:
    """Queries or keys turned to the wanted positions from 0, or from where the model has turned them already."""
    cos, sin = late.phases(layout.rotary, wanted - now if late.delta else wanted, states)
    if late.delta:
        factor = getattr(late.sites[layout.rotary].module, f"{late.sites[layout.rotary].prefix}attention_scaling", 1.0)
        cos, sin = cos / factor, sin / factor
    return (layout.key if side else layout.query).rotate(states, cos, sin)


def _as_axes(positions: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Positions (batch, tokens) on the leading axes that a multimodal rotary module wants."""
    return positions[None].expand(like.shape[0], -1, -1)


def _key_positions(late: LateRotation, name: str, key: torch.Tensor) -> torch.Tensor:
    """Positions of all keys: the latest ones in a sliding cache; slots of a static cache not yet filled are masked."""
    known = late.key_positions[name]
    known = known[..., -key.shape[2] :].expand(key.shape[0], -1)
    return nn.functional.pad(known, (0, key.shape[2] - known.shape[-1]))


def _scaled(query: torch.Tensor, positions: torch.Tensor, scale: QueryScale | None) -> torch.Tensor:
    """Queries (batch, heads, tokens, dim) that grow with their positions (batch, tokens)."""
    if scale is None:
        return query
    past = (positions.float() + 1) / scale.length
    factor = (1 + scale.temperature * past.clamp(min=1).log()).square() * scale.constant
    if scale.log:
        log_length = torch.log(torch.tensor(float(scale.length)))
        factor = factor * ((positions.float() + 1).log() / log_length).clamp(min=1)
    return query * factor.to(query.dtype)[:, None, :, None]


def _base_attention(
    late: LateRotation, module: nn.Module, query: Any, key: Any, value: Any, mask: torch.Tensor | None, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention that the unpatched model would call."""
    if late.base != "eager":
        attend = AttentionInterface._global_mapping.get(late.base, sdpa_attention_forward)
        result: tuple[torch.Tensor, torch.Tensor | None] = attend(module, query, key, value, mask, **kwargs)
        return result
    homes = [sys.modules[cls.__module__] for cls in type(module).__mro__]
    eager = next(home.eager_attention_forward for home in homes if hasattr(home, "eager_attention_forward"))
    attended: tuple[torch.Tensor, torch.Tensor | None] = eager(module, query, key, value, mask, **kwargs)
    return attended


_users: weakref.WeakSet[LateRotation] = weakref.WeakSet()
"""The late rotations that live in some model; the last one to go takes the names out of transformers' registries."""


def _register() -> None:
    for name, mask in MASKS.items():
        AttentionInterface.register(name, late_attention)
        AttentionMaskInterface.register(name, mask)


def release(late: LateRotation) -> None:
    """Take a late rotation out of use, and the names out of the registries when it was the last."""
    _users.discard(late)
    if not _users:
        for name in MASKS:
            AttentionInterface._global_mapping.pop(name, None)
            AttentionMaskInterface._global_mapping.pop(name, None)
