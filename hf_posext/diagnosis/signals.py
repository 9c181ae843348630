"""The signal that encodes the position of a token: values by channel, over positions or distances."""

from __future__ import annotations

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
from .weights import power_spectrum

CELLS = 2048
"""Largest number of columns of a signal. In longer texts, a column is the mean of several positions."""

SAMPLES = 8
"""Positions that are averaged for a column."""

CHANNELS = 128
"""Largest number of rows of a signal. Wider tables are sampled evenly."""


_WORDS = {
    "learned": ("table value", "dimension", "position"),
    "sinusoidal": ("sine", "dimension", "position"),
    "rotary": ("cosine of the phase", "rotary pair", "distance"),
    "alibi": ("bias of the score (nats)", "head", "distance"),
    "relative": ("bias of the score (nats)", "head", "distance"),
}
"""Quantity, channel and column of the signal of each scheme that can be drawn."""


@dataclass(frozen=True)
class Signal:
    """Signal of positions, as one picture shows it.

    Args:
        method (`str`): name of the method; `"none"` for the model as it is.
        quantity (`str`): quantity of the values, with its unit.
        channel (`str`): kind of a row: a dimension, a rotary pair or a head.
        over (`str`): kind of a column: `"position"` or `"distance"`, in tokens.
        channels (`numpy.ndarray` of shape `(channels,)`): numbers of the channels, from fast to slow.
        at (`numpy.ndarray` of shape `(columns,)`): first token of each column.
        values (`numpy.ndarray` of shape `(channels, columns)`): NaN where the model has no value.
        new (`numpy.ndarray` of shape `(channels, columns)`): bool; whether the value is unseen in training.
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
    """Return the signal of a model as it is, or under a plan.

    Learned tables and sinusoids: each dimension over positions, from the fastest wave to the slowest. Rotary: the
    cosine of the phase of each pair over the distance, from the last token of the text back. ALiBi and buckets: the
    bias of each head over distances.

    Args:
        model (`PreTrainedModel`): with weights and without a patch. It is not changed.
        scheme (`PositionalScheme`): scheme of the model.
        plan (`ExtensionPlan`, *optional*): `None` for the model as it is.
        length (`int`): tokens to draw.
        trained_length (`int`, *optional*): tokens that training has shown. `None` if unknown; no value counts as
            unseen then.

    Returns:
        [`Signal`], *optional*: `None` if the model has no positions that can be drawn.
    """
    if scheme.kind not in _WORDS or scheme.obstacle:
        return None
    begins = np.unique(np.arange(CELLS) * length // CELLS) if length > CELLS else np.arange(length)
    steps = np.diff([*begins, length])
    places = begins[:, None] + np.arange(SAMPLES)[None] * steps[:, None] // SAMPLES
    tokens = torch.from_numpy(places.ravel())
    values, new = _values(model, scheme, plan, tokens, length, trained_length or length)
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
    """Return the numbers of the channels to draw, from top to bottom."""
    if scheme.kind == "rotary":
        return np.arange(first_rotary(scheme).pairs)
    if scheme.kind == "alibi":
        return np.argsort(-np.array(scheme.slopes), kind="stable")
    if scheme.kind == "relative":
        return np.arange(bucket_biases(model).shape[1])
    table = sinusoid_rows(model, torch.arange(min(length, CELLS))) if scheme.kind == "sinusoidal" else _table(model)
    rows = table[table.isfinite().all(1)][:trained_length].numpy()
    power = power_spectrum(rows)
    frequency = (power * np.arange(1, len(power) + 1)[:, None]).sum(0) / np.maximum(power.sum(0), 1e-30)
    order = np.argsort(-frequency, kind="stable")
    places = np.unique(np.linspace(0, len(order) - 1, min(CHANNELS, len(order))).round().astype(int))
    return np.asarray(order[places])


def _table(model: PreTrainedModel) -> torch.Tensor:
    """Return the learned table of a model, or the first of two."""
    return next(iter(table_rows(model).values()))


def _values(
    model: PreTrainedModel,
    scheme: PositionalScheme,
    plan: ExtensionPlan | None,
    places: torch.Tensor,
    length: int,
    trained: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values, and whether they are unseen in training, both of shape `(channels, places)`."""
    if scheme.kind == "learned":
        rows = _table(model)
        if plan is not None and plan.table is not None:
            stretched = stretch(rows[: plan.trained_length], plan.table, places).T
            return stretched, torch.zeros_like(stretched, dtype=torch.bool)
        values = rows[places.clamp(max=len(rows) - 1)].masked_fill(places[:, None] >= len(rows), torch.nan)
        return values.T.double(), (places >= trained).expand(rows.shape[1], -1)
    if scheme.kind == "sinusoidal":
        rule = None if plan is None else plan.sinusoids
        values = sinusoid_rows(model, places, rule).T.double()
        return values, (mapped(places, rule or PositionMap()) >= trained).expand(len(values), -1)
    if scheme.kind == "rotary":
        rotary = first_rotary(scheme)
        frequencies = planned_frequencies(rotary, frequencies_in_force(model, length), plan, length)[: rotary.pairs]
        last = torch.tensor([length - 1])
        apart = torch.cat([relative_positions(plan, last, last - places, pair) for pair in range(rotary.pairs)])
        phases = frequencies.double()[:, None] * apart
        return phases.cos(), is_new(phases, powers(rotary.theta, rotary).double()[:, None] * trained)
    if scheme.kind == "alibi":
        shipped = torch.tensor(scheme.slopes).double()[:, None] * slope_scale(model)
        slopes = torch.tensor(plan.slopes).double()[:, None] * slope_scale(model) if plan and plan.slopes else shipped
        return -slopes * places[None], slopes * places[None] > shipped * trained
    buckets = plan.buckets if plan is not None and plan.buckets is not None else BucketPlan()
    values = bucket_biases(model)[buckets_of(model, places, buckets)].T.double()
    return values, torch.zeros_like(values, dtype=torch.bool)
