"""Plans that would change nothing are refused by name.

What a plan writes into modules is compared with what was there. What it does inside attention is computed from the
plan: an input that is long enough to show it may be longer than a machine can run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import NoEffectError
from ..plan import Band, ExtensionPlan
from .kernels import belongs, mapped
from .kernels.bands import decay, fade

DISTANCES = 1024
"""Distances of each kind that are looked at: the nearest ones, those of the first keys, and some evenly between."""


def no_effect(plan: ExtensionPlan, what: str) -> NoEffectError:
    """Return the error for a plan that leaves something as it is."""
    return NoEffectError(
        f"{plan.describe()} leaves {what} of {plan.scheme.model_type} as before. Pass a factor above 1, or method "
        "'none' to compare with the unpatched model."
    )


def refuse_idle(plan: ExtensionPlan, layers: Iterable[nn.Module]) -> None:
    """Refuse edits that change no pair of tokens within reach of a layer, in texts of up to twice the target length.

    Args:
        plan (`ExtensionPlan`): with edits that attention applies.
        layers (`Iterable[nn.Module]`): the attention layers that rotate.

    Raises:
        NoEffectError: every distance, and every logit, stays as it is.
    """
    if plan.rotaries:
        return  # new frequencies were compared with the former ones when they were written
    last, scale = 2 * plan.target_length - 1, plan.query_scale
    windows: set[int | None] = set()
    for layer in layers:
        windows.add(window := _window(layer))
        if scale is not None and getattr(layer, "layer_idx", 0) >= scale.first_layer and scale.acts_at(last):
            return
        if plan.parts and _moves(plan.parts, last, min(window or last + 1, last + 1)):
            return
    bounds = [window for window in windows if window is not None]
    reach = f"at most {max(bounds)} tokens back" if len(bounds) == len(windows) else "all tokens"
    raise NoEffectError(
        f"{plan.describe()} changes no pair of tokens: the layers of {plan.scheme.model_type} see {reach}. Pass other "
        "hyper-parameters, such as a smaller window, or method 'none' to compare with the unpatched model."
    )


def _window(layer: Any) -> int | None:
    """Return how many tokens a layer sees; `None` without a bound.

    Some layers take it from the config (Mistral), which is that of all of them where it has no layer types. A window
    counts where the file of the model makes masks for it: Moshi's attention has one, and its masks ignore it.
    """
    if not hasattr(sys.modules[type(layer).__module__], "create_sliding_window_causal_mask"):
        return None
    config = getattr(layer, "config", None)
    shared = None if getattr(config, "layer_types", None) else getattr(config, "sliding_window", None)
    window: int | None = getattr(layer, "sliding_window", shared)
    return window


def _moves(bands: tuple[Band, ...], last: int, reach: int) -> bool:
    """Return whether bands change a pair of the query at `last`, or of the first one in its chunk.

    Args:
        bands (`tuple[Band, ...]`): of a plan.
        last (`int`): position of the query.
        reach (`int`): number of keys that it sees.
    """
    periods = {period for band in bands for period in (band.chunk, band.query.modulo, band.key.modulo) if period}
    for position in {last} | {last // period * period for period in periods}:
        query, most = torch.tensor([position]), min(reach - 1, position)
        edges = [edge * band.chunk for band in bands for edge in (band.low, band.high or 0)]
        ends = torch.arange(min(DISTANCES, most + 1))
        between = torch.linspace(0, most, DISTANCES, dtype=torch.float64).long()
        distances = torch.cat([ends, most - ends, between, torch.tensor(edges).clamp(max=most)])
        keys, row = query - distances, query + 1
        attended = torch.zeros_like(keys, dtype=torch.bool)
        for band in bands:
            inside = belongs(band, query, keys)[0]
            sides = (mapped(query, band.query, row), mapped(keys, band.key, row))
            ours, theirs = (side.double().reshape(len(side), -1) for side in sides)  # a column for each rotary pair
            changed = (ours - theirs != distances[:, None]).any(1)
            faded, decayed = fade(band, query, torch.float64), decay(band, distances, torch.float64)
            changed |= (faded is not None and faded != 0) | (decayed is not None and decayed != 0)
            if (inside & changed).any():
                return True
            attended |= inside
        if not attended.all():
            return True
    return False
