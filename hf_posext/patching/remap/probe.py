"""Puts late rotation into a live model: swap, probe the layouts, and check that nothing else has changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ...errors import UnsupportedModelError
from ...plan import ExtensionPlan, Part, PositionMap
from ..detect import RotarySite, rotary_sites, text_config
from ..journal import Journal
from ..mixin import mix
from ..modes import evaluation_mode
from ..switching import switch_attention
from .layout import Captured, Quarters, UnknownLayout, measure
from .state import LateRotation, RotatesLate, own_phases

CHECK_TOKENS = 24

SELECTED = ("index_topk", "indexer_budget")
"""What configs call the number of keys that an indexer selects. The check is no longer than that, since selection
follows the positions of the model."""

TWICE = PositionMap(rate=2)


def apply_late_rotation(model: PreTrainedModel, plan: ExtensionPlan, journal: Journal) -> str:
    """Make a model rotate in its attention, at the positions of the plan.

    Before the positions are remapped, the model must give the same logits as with its own rotation; a model that does
    not is refused, not patched wrongly.

    Returns:
        `str`: why a saved checkpoint needs this package.

    Raises:
        UnsupportedModelError: the model's attention cannot be reached or does not rotate as RoPE; says which.
    """
    kind = plan.scheme.model_type
    if any(entry.short_inv_freq is not None for entry in plan.rotaries):
        raise UnsupportedModelError(
            f"{plan.method}: two LongRoPE lists cannot be combined with remapping; give one list"
        )
    indexed = any("Indexer" in type(module).__name__ for module in model.modules())
    if indexed and plan.follows_rows:
        raise UnsupportedModelError(
            f"{kind} selects keys by their rotated states; {plan.method} cannot follow each row there, yarn can"
        )
    config = text_config(model.config)
    base = config._attn_implementation or "eager"
    if base not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            f"{kind} runs with {base!r} attention; {plan.method} needs 'sdpa' or 'eager': "
            "model.set_attn_implementation('sdpa')"
        )
    late = LateRotation(plan, base, delta=indexed)
    journal.on_undo(_release, late)
    with evaluation_mode(model):
        selected = [getattr(config, name, CHECK_TOKENS) for name in SELECTED]
        probe = torch.arange(3, 3 + min(CHECK_TOKENS, *selected), device=model.device)[None] % config.vocab_size
        strides = (1, 2) if indexed else (1,)
        wanted = torch.cat([_logits(model, probe, stride) for stride in strides])
        _swap(model, late, journal)
        _probe_layouts(model, late, probe[:, :5], kind, journal)
        got = _logits(model, probe)
        late.unmapped = False
        if indexed:  # so far nothing was turned there; the model must also give what it gives at doubled positions
            late.plan = replace(plan, parts=(Part(TWICE, TWICE),), query_scale=None)
            got = torch.cat([got, _logits(model, probe)])
            late.plan = plan
        late.keeps_turned = not indexed and _keeps_turned(model, late, probe[:, :7])
    tolerance = _tolerance(wanted)
    difference = (got - wanted).float().abs().max()
    if not difference <= tolerance:
        raise UnsupportedModelError(
            f"{kind} gives other logits when its attention rotates late (by {difference:.1e}, {tolerance:.1e} allowed)"
            f": it uses rotated states elsewhere; {plan.method} cannot be applied, a frequency method such as yarn can"
        )
    return "positions are remapped inside attention"


def _release(late: LateRotation) -> None:
    late.release()


def _logits(model: PreTrainedModel, ids: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """Logits of tokens at positions 0, stride, ...; positions with gaps need a mask, or are taken for a pack."""
    gaps = {"position_ids": torch.arange(ids.shape[1], device=ids.device)[None] * stride}
    gaps["attention_mask"] = torch.ones_like(ids)
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=ids, use_cache=False, **(gaps if stride > 1 else {}))[0]
    return out


def _keeps_turned(model: PreTrainedModel, late: LateRotation, ids: torch.Tensor) -> bool:
    """Whether cached keys may stay turned: the plan turns one at a time, turns can be undone, and decoding shows that
    nothing else in the model reads them (layers that share their keys would)."""
    if late.plan.follows_rows or late.border is None or not all(at.key.is_rotation() for at in late.layers.values()):
        return False
    wanted, late.keeps_turned = _logits(model, ids)[:, -1], True
    try:
        cache, first = None, 0
        for last in (ids.shape[1] - 3, *range(ids.shape[1] - 2, ids.shape[1] + 1)):
            with torch.no_grad():
                out = model(input_ids=ids[:, first:last], past_key_values=cache, use_cache=True)
            cache, first = out.get("past_key_values"), last
            if cache is None:
                return False
        difference = (out.logits[:, -1] - wanted).float().abs().max()
        return bool(difference <= _tolerance(wanted))
    finally:
        late.keeps_turned = False


def _tolerance(wanted: torch.Tensor) -> torch.Tensor:
    """For float32 sums in another order; half precision rounds each rotated state once."""
    return (1e-4 if wanted.dtype in (torch.float32, torch.float64) else 5e-2) * wanted.float().abs().max()


def _swap(model: PreTrainedModel, late: LateRotation, journal: Journal) -> None:
    """Identity rotary modules, our attention function, and hooks that keep the positions of cached keys."""
    for site in list(rotary_sites(model)):
        late.sites.setdefault(site.name, site)
        sets = {**getattr(site.module, "_posext_sets", {}), site.layer_type: site.name}
        journal.set(site.module, "_posext_sets", sets)
        if not isinstance(site.module, RotatesLate):
            journal.set(site.module, "__class__", mix(RotatesLate, type(site.module)))
            if "_old_forward" in vars(site.module):  # with a device_map, accelerate calls the method that it found
                journal.set(site.module, "_old_forward", type(site.module).forward.__get__(site.module))
    for path, module in model.named_modules():
        journal.set(module, "_posext_late", late)
        journal.set(module, "_posext_path", path)
    name = "posext-eager" if late.base == "eager" else "posext-sdpa"
    switch_attention(model, name, journal)
    backbone = _backbone(model, next(iter(late.sites.values())))
    for handle in (
        backbone.register_forward_pre_hook(late.before_forward, with_kwargs=True),
        backbone.register_forward_hook(late.after_forward, with_kwargs=True),
    ):
        journal.on_undo(handle.remove)


def _backbone(model: PreTrainedModel, site: RotarySite) -> Any:
    """The innermost transformers model that holds the rotary module: it is handed the cache."""
    holders = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
        and (site.path == path or site.path.startswith(f"{path}." if path else ""))
    ]
    return max(holders, key=lambda holder: len(holder[0]))[1]


def _probe_layouts(model: PreTrainedModel, late: LateRotation, ids: torch.Tensor, kind: str, journal: Journal) -> None:
    """Measure every layer's layout, and refuse a model that does not show one."""

    def forward(quarters: Quarters) -> Captured:
        late.captured, late.quarters = {}, quarters
        try:
            _logits(model, ids.expand(len(next(iter(quarters.values()))), -1))
        finally:
            late.quarters = None
        return late.captured

    def groups(name: str) -> torch.Tensor:
        """Slots whose phases agree at some odd positions belong to one pair."""
        positions = torch.tensor([[1, 7, 31, 101, 997, 4001]], device=ids.device)
        cos, sin = own_phases(late.sites[name], positions, torch.zeros(1, device=ids.device))
        signature = torch.cat([cos.flatten(0, -2), sin.flatten(0, -2)]).T.double()
        pairs: torch.Tensor = torch.unique(signature, dim=0, return_inverse=True)[1]
        return pairs.cpu()

    try:
        late.layers = measure(forward, {name: groups(name) for name in late.sites})
    except UnknownLayout as error:
        raise UnsupportedModelError(
            f"{kind}: {error}; remapping methods cannot turn it, frequency methods can"
        ) from error
    if not late.captured:
        raise UnsupportedModelError(
            f"{kind} does not send its attention through transformers' AttentionInterface; remapping methods cannot "
            "reach it, frequency methods can"
        )
    if not late.layers:
        raise UnsupportedModelError(f"{kind} has no attention layer that rotates; there is nothing to remap")
    modules = dict(model.named_modules())
    scale = late.plan.query_scale
    if scale is not None and scale.first_layer > 0:
        unnumbered = [path for path in late.layers if not isinstance(getattr(modules[path], "layer_idx", None), int)]
        if unnumbered:
            raise UnsupportedModelError(
                f"{kind} does not number its attention layers ({unnumbered[0]} has no layer_idx); "
                f"{late.plan.method} treats the first ones in another way"
            )
    if late.plan.parts:
        free = [path for path in late.layers if not getattr(modules[path], "is_causal", True)]
        if free:
            raise UnsupportedModelError(
                f"{kind} attends to both sides ({free[0]}); {late.plan.method} is defined for causal attention"
            )
    for path in late.layers:
        handle = model.get_submodule(path).register_forward_pre_hook(late.before_layer, with_kwargs=True)
        journal.on_undo(handle.remove)
    late.captured = {}
