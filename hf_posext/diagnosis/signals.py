"""The signal that tells a model where a token stands: numbers by channel, over positions or distances."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from ..methods.frequencies import first_rotary, powers
from ..patching.kernels import mapped
from ..patching.observe import (
    bucket_biases,
    buckets_of,
    frequencies_in_force,
    sinusoid_rows,
    slope_scale,
    table_rows,
)
from ..patching.tables import stretch
from ..plan import BucketPlan, ExtensionPlan, PositionMap
from ..scheme import PositionalScheme
from .phases import is_new, planned_frequencies, relative_positions
from .table_rows import power_spectrum

CELLS = 2048
"""Columns of a signal at most; past that, each is the mean of several positions."""

SAMPLES = 8
"""Positions of which the mean is taken for a column."""

CHANNELS = 128
"""Rows of a signal at most, of a table with more channels every so many of them."""


@dataclass(frozen=True)
class Signal:
    """What one picture of a signal shows.

    Args:
        method (`str`): `"none"` for the model as it is, else the method in whose plan it would be.
        quantity (`str`): what the values are, with their unit.
        channel (`str`): what a row is: a dimension, a rotary pair, a head.
        over (`str`): what a column is: `"position"` or `"distance"`, in tokens.
        channels (`numpy.ndarray` of shape `(channels,)`): their numbers, from fast to slow.
        at (`numpy.ndarray` of shape `(columns,)`): the first token of each column.
        values (`numpy.ndarray` of shape `(channels, columns)`): NaN where the model has none.
        new (`numpy.ndarray` of shape `(channels, columns)`): bool; where training has shown nothing of the kind.
    """

    method: str
    quantity: str
    channel: str
    over: str
    channels: np.ndarray
    at: np.ndarray
    values: np.ndarray
    new: np.ndarray


def position_signal(
    model: PreTrainedModel,
    scheme: PositionalScheme,
    plan: ExtensionPlan | None,
    length: int,
    trained_length: int | None,
) -> Signal | None:
    """The signal of a model as it is, or as a plan would make it.

    Learned tables and sinusoids: each dimension over positions, from the one that waves fastest to the slowest.
    Rotary: the cosine of the phase of each pair over the distance, from the last token of the text back. ALiBi and
    buckets: the bias of each head over distances.

    Args:
        model (`PreTrainedModel`): with weights, without a patch; as before afterwards.
        scheme (`PositionalScheme`): of it.
        plan (`ExtensionPlan`, *optional*): `None` for the model as it is.
        length (`int`): tokens to draw.
        trained_length (`int`, *optional*): tokens that training has shown; `None` where nothing tells, and nothing is
            called new then.

    Returns:
        [`Signal`], *optional*: `None` where the model has no positions that can be drawn.
    """
    draw = _KINDS.get(scheme.kind)
    if draw is None or scheme.obstacle:
        return None
    begins = np.unique(np.arange(CELLS) * length // CELLS) if length > CELLS else np.arange(length)
    steps = np.diff([*begins, length])
    places = begins[:, None] + np.arange(SAMPLES)[None] * steps[:, None] // SAMPLES
    tokens = torch.from_numpy(places.ravel())
    values, new = draw(model, scheme, plan, tokens, length, trained_length or length)
    means = values.double().reshape(len(values), *places.shape).nanmean(-1).numpy()
    order = _order(model, scheme, length, trained_length)
    return Signal(
        "none" if plan is None else plan.method,
        *_WORDS[scheme.kind],
        order,
        begins,
        means[order],
        new.numpy().reshape(len(values), *places.shape)[order, :, 0],
    )


def _order(model: PreTrainedModel, scheme: PositionalScheme, length: int, trained_length: int | None) -> np.ndarray:
    """Which channels are drawn, from top to bottom."""
    if scheme.kind == "rotary":
        return np.arange(first_rotary(scheme).pairs)
    if scheme.kind == "alibi":
        return np.argsort(-np.array(scheme.slopes), kind="stable")
    if scheme.kind == "relative":
        return np.arange(bucket_biases(model).shape[1])
    own = sinusoid_rows(model, torch.arange(min(length, CELLS))) if scheme.kind == "sinusoidal" else _table(model)
    rows = own[own.isfinite().all(1)][:trained_length].numpy()
    power = power_spectrum(rows)
    frequency = (power * np.arange(1, len(power) + 1)[:, None]).sum(0) / np.maximum(power.sum(0), 1e-30)
    order = np.argsort(-frequency, kind="stable")
    places = np.unique(np.linspace(0, len(order) - 1, min(CHANNELS, len(order))).round().astype(int))
    return np.asarray(order[places])


Drawn = tuple[torch.Tensor, torch.Tensor]
"""Values and whether they are new, both of shape `(channels, places)`."""


def _learned(
    model: PreTrainedModel,
    scheme: PositionalScheme,
    plan: ExtensionPlan | None,
    places: torch.Tensor,
    length: int,
    trained: int,
) -> Drawn:
    rows = _table(model)
    if plan is None or plan.table is None:
        held = rows[places.clamp(max=len(rows) - 1)].masked_fill(places[:, None] >= len(rows), torch.nan)
        return held.T.double(), (places >= trained).expand(rows.shape[1], -1)
    values = stretch(rows[: plan.trained_length], plan.table, places).T
    return values, torch.zeros_like(values, dtype=torch.bool)


def _sinusoidal(
    model: PreTrainedModel,
    scheme: PositionalScheme,
    plan: ExtensionPlan | None,
    places: torch.Tensor,
    length: int,
    trained: int,
) -> Drawn:
    rule = None if plan is None else plan.sinusoids
    values = sinusoid_rows(model, places, rule).T.double()
    return values, (mapped(places, rule or PositionMap()) >= trained).expand(len(values), -1)


def _table(model: PreTrainedModel) -> torch.Tensor:
    """The only learned table of a model, or the first of two."""
    return next(iter(table_rows(model).values()))


def _rotary(
    model: PreTrainedModel,
    scheme: PositionalScheme,
    plan: ExtensionPlan | None,
    places: torch.Tensor,
    length: int,
    trained: int,
) -> Drawn:
    rotary = first_rotary(scheme)
    frequencies = planned_frequencies(rotary, frequencies_in_force(model, length), plan, length)[: rotary.pairs]
    last = torch.tensor([length - 1])
    apart = torch.cat([relative_positions(plan, last, last - places, pair) for pair in range(rotary.pairs)])
    phases = frequencies.double()[:, None] * apart
    return phases.cos(), is_new(phases, powers(rotary.theta, rotary).double()[:, None] * trained)


def _alibi(
    model: PreTrainedModel,
    scheme: PositionalScheme,
    plan: ExtensionPlan | None,
    places: torch.Tensor,
    length: int,
    trained: int,
) -> Drawn:
    slopes = torch.tensor(plan.slopes if plan is not None and plan.slopes else scheme.slopes).double()[:, None]
    costs = slopes * slope_scale(model) * places[None]
    return -costs, costs > torch.tensor(scheme.slopes).double()[:, None] * slope_scale(model) * trained


def _relative(
    model: PreTrainedModel,
    scheme: PositionalScheme,
    plan: ExtensionPlan | None,
    places: torch.Tensor,
    length: int,
    trained: int,
) -> Drawn:
    squeezed = plan.buckets if plan is not None and plan.buckets is not None else BucketPlan()
    values = bucket_biases(model)[buckets_of(model, places, squeezed)].T.double()
    return values, torch.zeros_like(values, dtype=torch.bool)


_WORDS = {
    "learned": ("table value", "dimension", "position"),
    "sinusoidal": ("sine", "dimension", "position"),
    "rotary": ("cosine of the phase", "rotary pair", "distance"),
    "alibi": ("bias of the score (nats)", "head", "distance"),
    "relative": ("bias of the score (nats)", "head", "distance"),
}

_KINDS: dict[str, Callable[..., Drawn]] = {
    "learned": _learned,
    "sinusoidal": _sinusoidal,
    "rotary": _rotary,
    "alibi": _alibi,
    "relative": _relative,
}
