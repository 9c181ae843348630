"""Refusal of plans, and of components of a composition, that would change nothing.

What a plan writes into modules is compared with what was there. What it does inside attention is computed from the
plan: an input that is long enough to show it may be longer than a machine can run.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..errors import NoEffectError
from ..methods.base import components_of, without_each
from ..plan import Band, ExtensionPlan, QueryScale, RotaryPlan
from .kernels.bands import SAME, belongs, decay, fade, mapped
from .sites import makes_windows

logger = logging.get_logger(__name__)

DISTANCES = 1024
"""Distances of each kind that are looked at: the nearest ones, those of the first keys, and some evenly between."""

ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Relative difference of frequencies that are computed by other operations, such as YaRN's at factor 1."""

LATE = RotaryPlan | Band | QueryScale
"""Edits of which this module computes whether they change a pair of tokens."""

Layers = set[tuple[int | None, int]]
"""Attention layers that rotate: how many tokens each sees, `None` without a bound, and its number."""

EVERYWHERE: Layers = {(None, sys.maxsize)}
"""One layer that sees all tokens and comes after all others."""


def no_effect(plan: ExtensionPlan, what: str) -> NoEffectError:
    """Return the error for a plan that leaves something as it is."""
    return NoEffectError(
        f"Expected a plan that changes {what} of {plan.scheme.model_type}, got {plan.describe()} without effect. Pass "
        "a larger factor, or method 'none' to compare with the unpatched model."
    )


def layer_number(layer: nn.Module) -> int | None:
    """Return the number of an attention layer; `None` where it has none, or is shared by several (-1 in Zamba2)."""
    number = getattr(layer, "layer_idx", None)
    return number if isinstance(number, int) and number >= 0 else None


def claimed_window(layer: Any) -> int | None:
    """Return the sliding window that a layer claims, if the file of its model makes masks for one; else `None`.

    Masks decide where a text is long enough to show them. Some layers read the window from the config (Mistral), which
    then holds for all layers unless the config has layer types.
    """
    if not makes_windows(layer):
        return None
    config = getattr(layer, "config", None)
    shared = None if getattr(config, "layer_types", None) else getattr(config, "sliding_window", None)
    window: int | None = getattr(layer, "sliding_window", shared)
    return window


def refuse_idle(plan: ExtensionPlan, layers: Layers) -> None:
    """Refuse edits of attention that change no pair of tokens within reach of a layer that rotates, in texts of up to
    twice the target length."""
    # new frequencies were compared with the former ones when they were written
    if plan.rotaries or differ(plan, replace(plan, edits=()), 2 * plan.target_length - 1, layers):
        return
    bounds = [window for window, _ in layers if window is not None]
    reach = f"at most {max(bounds)} tokens back" if len(bounds) == len(layers) else "all tokens"
    raise NoEffectError(
        f"Expected a plan that changes a pair of tokens, got {plan.describe()} for layers of {plan.scheme.model_type} "
        f"that see {reach}. Pass other hyper-parameters, such as a smaller window, or method 'none' to compare with "
        "the unpatched model."
    )


def refuse_idle_components(model: nn.Module, plan: ExtensionPlan) -> None:
    """Refuse a composition of which a component changes nothing, in texts of up to twice the target length.

    A component that begins to act behind the target length is named in a warning: at the lengths that the plan is for,
    logits are those of the other components.
    """
    target = plan.target_length
    components = components_of(plan) if len(plan.parameters) > 1 else ()
    rotating: list[Any] = [module for module in model.modules() if hasattr(module, "_posext_layer")]
    layers = {(module._posext_layer.window, layer_number(module) or 0) for module in rotating} or EVERYWHERE
    for component, without in without_each(plan, components):
        if not differ(plan, without, 2 * target - 1, layers):
            raise NoEffectError(
                f"Expected each component of {plan.method!r} to change something, got {component!r} without effect up "
                f"to {2 * target:,} tokens. Pass other hyper-parameters of it, or leave it out."
            )
        if target > plan.trained_length and not differ(plan, without, target - 1, layers):
            logger.warning_once(
                f"{component!r} of {plan.method!r} has no effect up to {target:,} tokens, the target length: it "
                "begins to act in longer texts. Up to there, logits are those of the other components alone"
            )


def differ(plan: ExtensionPlan, other: ExtensionPlan, last: int, layers: Layers = EVERYWHERE) -> bool:
    """Return whether two plans, the other one with fewer edits, treat a pair of tokens within reach of a layer
    differently, in a text whose last token is at position `last`."""
    # what the model shows when it is written: tables, slopes, buckets
    ours, theirs = ([edit for edit in each.edits if not isinstance(edit, LATE)] for each in (plan, other))
    if ours != theirs:
        return True
    others, trained = {entry.name: entry for entry in other.rotaries}, plan.trained_length
    for entry in plan.rotaries:
        if entry.name not in others or _rotate_apart(entry, others[entry.name], last, trained):
            return True
    scale = plan.query_scale if plan.query_scale != other.query_scale else None
    return any(
        (scale is not None and number >= scale.first_layer and scale.acts_at(last))
        or _move(plan.bands, other.bands, last, min(window or last + 1, last + 1))
        for window, number in layers
    )


def _rotate_apart(entry: RotaryPlan, other: RotaryPlan, last: int, trained: int) -> bool:
    """Return whether two plans of one set of frequencies rotate a pair of tokens by other angles, or scale it."""
    return any(
        abs(rate - former) * length > ROUNDING * (1 + length)
        for length in {trained, last + 1}
        for rate, former in zip(_rates(entry, length, trained), _rates(other, length, trained), strict=True)
    )


def _rates(entry: RotaryPlan, length: int, trained: int) -> list[float]:
    """Return the frequencies of a set, and the factor of its phases, in a row of some length."""
    longer, growth = max(1.0, length / trained), entry.growth
    if growth is not None:
        moved = zip(growth.moving, growth.power, growth.kept, strict=True)
        grown = [moving * longer**-power + kept for moving, power, kept in moved]
        return [*grown, entry.attention_factor * (1 + growth.temperature * math.log(longer))]
    short = entry.short_inv_freq if length <= trained else None
    return [*(short or entry.inv_freq), entry.attention_factor]


def _move(bands: tuple[Band, ...], others: tuple[Band, ...], last: int, reach: int) -> bool:
    """Return whether bands treat a pair of the query at `last`, or of the first one in its chunk, unlike others do.

    The query sees `reach` keys. Without bands, positions are those of the tokens.
    """
    if bands == others:
        return False
    periods = {period for band in bands for period in (band.chunk, band.query.modulo, band.key.modulo) if period}
    for position in {last} | {last // period * period for period in periods}:
        most = min(reach - 1, position)
        edges = [edge * band.chunk for band in bands for edge in (band.low, band.high or 0)]
        ends = torch.arange(min(DISTANCES, most + 1))
        between = torch.linspace(0, most, DISTANCES, dtype=torch.float64).long()
        distances = torch.cat([ends, most - ends, between, torch.tensor(edges).clamp(max=most)])
        ours, theirs = (_seen(each or (Band(SAME, SAME),), position, distances) for each in (bands, others))
        if any((values != former).any() for values, former in zip(ours, theirs, strict=True)):
            return True
    return False


def _seen(bands: tuple[Band, ...], position: int, distances: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a query sees of keys at some distances (keys,), as float64.

    It is the distance that phases have, (keys, 1), or (keys, slots) where each rotary pair has its own, and what is
    added to the logit, (keys, 1). Keys in no band get minus infinity.
    """
    query = torch.tensor([position])
    keys, row = query - distances, query + 1
    apart, added = torch.zeros(len(keys), 1).double(), torch.full((len(keys), 1), -torch.inf).double()
    for band in bands:
        inside = belongs(band, query, keys)[0][:, None]
        sides = (mapped(query, band.query, row), mapped(keys, band.key, row))
        ours, theirs = (side.double().reshape(len(side), -1) for side in sides)
        shifts = (fade(band, query, torch.float64), decay(band, distances, torch.float64))
        apart = torch.where(inside, ours - theirs, apart)
        added = torch.where(inside, sum(shift[:, None] for shift in shifts if shift is not None), added)
    return apart, added
