"""Positions in the weights: signals of a token's position, rows of a table, reach of heads, buckets, rotary phases.

A learned table shows which of its rows training has reached. Training makes neighbouring positions alike, because text
hardly depends on whether a word stands one place further on. Rows that no token was ever trained on keep their random
initialisation, in which neighbours have nothing in common. Norms say nothing: trained rows have larger, smaller or
equal ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from ..errors import RenamedAttribute
from ..methods.rotary import first_rotary, powers
from ..patching.kernels.bands import belongs, mapped
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
from ..scheme import KINDS, Buckets, PositionalScheme, Rotary

CELLS = 2048
"""Largest number of columns of a signal. In longer texts, a column is the mean of several positions."""

SAMPLES = 8
"""Positions that are averaged for a column."""

CHANNELS = 128
"""Largest number of rows of a signal. Wider tables are sampled evenly."""

QUERIES = 64
"""Queries, spread evenly over the target, whose largest relative position is taken."""

Frequencies = Mapping[str, torch.Tensor]
"""Radians per token by the name of the set, float32 of shape `(slots,)`."""


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
        unseen (`numpy.ndarray` of shape `(channels, columns)`): bool; whether training has not shown the value.
    """

    method: str
    quantity: str
    channel: str
    over: str
    channels: np.ndarray
    at: np.ndarray
    values: np.ndarray
    unseen: np.ndarray

    new = RenamedAttribute("unseen")


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
    quantity = KINDS[scheme.kind].unit
    if not quantity or scheme.obstacle:
        return None
    over = "position" if scheme.kind in ("learned", "sinusoidal") else "distance"
    channel = "rotary pair" if scheme.kind == "rotary" else "dimension" if over == "position" else "head"
    begins = np.unique(np.arange(CELLS) * length // CELLS) if length > CELLS else np.arange(length)
    steps = np.diff([*begins, length])
    places = begins[:, None] + np.arange(SAMPLES)[None] * steps[:, None] // SAMPLES
    tokens = torch.from_numpy(places.ravel())
    values, unseen = _values(model, scheme, plan, tokens, length, trained_length or length)
    means = values.double().reshape(len(values), *places.shape).nanmean(-1).numpy()
    order = _order(model, scheme, length, trained_length)
    return Signal(
        "none" if plan is None else plan.method,
        quantity,
        channel,
        over,
        order,
        begins,
        means[order],
        unseen.numpy().reshape(len(values), *places.shape)[order, :, 0],
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
        return phases.cos(), is_unseen(phases, powers(rotary.theta, rotary).double()[:, None] * trained)
    if scheme.kind == "alibi":
        shipped, slopes = (
            torch.tensor(values, dtype=torch.float32).double()[:, None] * slope_scale(model)
            for values in (scheme.slopes, plan.slopes if plan and plan.slopes else scheme.slopes)
        )
        return -slopes * places[None], slopes * places[None] > shipped * trained
    buckets = plan.buckets if plan is not None and plan.buckets is not None else BucketPlan()
    values = bucket_biases(model)[buckets_of(model, places, buckets)].T.double()
    return values, torch.zeros_like(values, dtype=torch.bool)


def frequency_table(scheme: PositionalScheme, in_force: Frequencies, trained_length: int) -> pd.DataFrame:
    """Return a line for each rotary pair of each set.

    Columns: `set`, `pair`, `wavelength` (tokens per rotation, as trained), `turns` (within the trained length), and
    `slowed` (factor by which the shipped scaling slows the pair in an input of the shipped length; 1 without scaling).
    """
    lines = []
    for rotary in scheme.rotaries:
        trained = powers(rotary.theta, rotary).double()
        for pair, (radians, now) in enumerate(zip(trained.tolist(), in_force[rotary.name].tolist(), strict=False)):
            wavelength = 2 * math.pi / radians
            slowed = radians / now if now else math.inf
            lines.append((rotary.name, pair, wavelength, trained_length / wavelength, slowed))
    return pd.DataFrame(lines, columns=["set", "pair", "wavelength", "turns", "slowed"])


def critical_dimension(rotary: Rotary, trained_length: int) -> int:
    """Return the number of channels of a head that rotate fully within the trained length.

    `2 ceil(d / 2 log_theta(L / 2 pi))` of Liu et al., *Scaling Laws of RoPE-based Extrapolation*, 2023. Training does
    not show all phases of the other channels.
    """
    if trained_length <= 2 * math.pi:
        return 0
    pairs = math.ceil(rotary.dim / 2 * math.log(trained_length / (2 * math.pi)) / math.log(rotary.theta))
    return 2 * min(pairs, rotary.pairs)


def phase_table(
    scheme: PositionalScheme,
    in_force: Frequencies,
    plans: Mapping[str, ExtensionPlan | None],
    trained_length: int,
    target_length: int,
) -> pd.DataFrame:
    """Return the phases that a text of the target length needs, a line for each plan, set and pair.

    Columns: `method`, `set`, `pair`, `turns` (between the two tokens farthest apart), `new` (whether training has not
    shown that phase: it is past the phase of the trained length, and the trained phases are less than a rotation).
    The plan `None` is the model as it is, whose frequencies are those in force.
    """
    lines = []
    for method, plan in plans.items():
        by_pair = plan is not None and any(band.query.by_pair for band in plan.bands)
        for rotary in scheme.rotaries:
            farthest = [
                target_length - 1 if plan is None else farthest_position(plan, target_length, pair)
                for pair in range(rotary.pairs if by_pair else 1)
            ]
            reach = torch.tensor(farthest, dtype=torch.float64).clamp(max=(rotary.window or target_length) - 1)
            radians = planned_frequencies(rotary, in_force, plan, target_length)[: rotary.pairs].double()
            phases = radians * reach
            new = is_unseen(phases, powers(rotary.theta, rotary).double() * trained_length)
            for pair, (turns, unseen) in enumerate(zip((phases / (2 * math.pi)).tolist(), new.tolist(), strict=True)):
                lines.append((method, rotary.name, pair, turns, unseen))
    return pd.DataFrame(lines, columns=["method", "set", "pair", "turns", "new"])


def is_unseen(phases: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
    """Return whether phases are past the `trained` ones, and these are less than a rotation; all in radians."""
    return (phases > trained) & (trained < 2 * math.pi)


def planned_frequencies(
    rotary: Rotary, in_force: Frequencies, plan: ExtensionPlan | None, length: int
) -> torch.Tensor:
    """Return the radians per token of one set in an input of `length` tokens, float32 of shape `(slots,)`."""
    entry = None if plan is None else next((entry for entry in plan.rotaries if entry.name == rotary.name), None)
    if plan is None or entry is None:
        return in_force[rotary.name]
    if entry.growth is None:
        return torch.tensor(entry.inv_freq, dtype=torch.float32)
    scale = max(1.0, length / plan.trained_length)
    moving, power, constant = (
        torch.tensor(numbers, dtype=torch.float32)
        for numbers in (entry.growth.moving, entry.growth.power, entry.growth.kept)
    )
    return moving * scale**-power + constant


def relative_positions(
    plan: ExtensionPlan | None, queries: torch.Tensor, keys: torch.Tensor, pair: int = 0
) -> torch.Tensor:
    """Return the relative position of each query and key under a plan, in tokens; float64 of shape `(queries, keys)`.

    NaN where the query does not attend to the key: the key comes later, or no band of the plan contains the pair of
    tokens. If rotary pairs have positions of their own, those of rotary pair `pair`: the fastest by default.
    """
    apart = (queries[:, None] - keys[None]).double()
    relative = apart.clone() if plan is None or not plan.bands else torch.full_like(apart, math.nan)
    row = queries.max() + 1
    for band in plan.bands if plan is not None else ():
        sides = ((queries, band.query), (keys, band.key))
        moves = [mapped(side, rule.of_pair(pair) if rule.by_pair else rule, row) for side, rule in sides]
        moved = moves[0].double()[:, None] - moves[1].double()[None]
        relative = torch.where(belongs(band, queries, keys), moved, relative)
    return relative.masked_fill(apart < 0, math.nan)


def farthest_position(plan: ExtensionPlan, length: int, pair: int = 0) -> float:
    """Return the largest relative position that a plan gives to any two tokens of a text, in a rotary pair."""
    # The keys that a query has in a band are adjacent, and their positions grow except where they begin anew
    # (`modulo`). The farthest is therefore the first of them, or the first one after such a beginning.
    queries = torch.linspace(0, length - 1, min(QUERIES, length), dtype=torch.float64).round().long()
    keys = torch.zeros(1, dtype=torch.long)
    for band in plan.bands:
        chunks = 0 * queries if band.high is None else (queries // band.chunk - band.high + 1).clamp(min=0)
        first, step = chunks * band.chunk, band.key.modulo or 1
        keys = torch.cat([keys, first, (first + step - 1) // step * step])
    apart = relative_positions(plan, queries, keys, pair)
    return float(apart.nan_to_num(0.0).max())


WINDOW = 16
"""Rows in a line of the statistics, and rows that are averaged before they count as alike or unlike."""

ALIKE = 0.25
"""Smallest mean cosine of neighbours over a window that counts as a pattern."""

SLOW = 0.1
"""Share of the frequencies, from the lowest, that count as slow. In noise they have this share of the power."""

FADED = 0.01
"""Weight, relative to the nearest token, below which a token is out of reach of a head."""


def last_stretch(values: np.ndarray) -> int | None:
    """Return the first index of the final stretch with the largest sum: `argmax_k sum(values[k:])`.

    This is the maximum-likelihood place of a change of mean from below zero to as far above it: the CUSUM of Page
    (1954) read from the end. Pass `values - threshold`, with the threshold half-way between the two levels. `None` if
    no stretch has a sum above zero.
    """
    sums = np.cumsum(np.asarray(values, dtype=np.float64)[::-1])[::-1]
    return int(sums.argmax()) if len(sums) and sums.max() > 0 else None


def untrained_from(rows: np.ndarray) -> int | None:
    """Return the first row from which on the table looks untrained; `None` if all rows look trained, or none does.

    `rows` have the shape `(positions, width)`, without those before position 0.
    """
    if len(rows) <= 2 * WINDOW or not has_pattern(rows):
        return None
    # Cosines of random rows have a standard deviation of 1 / sqrt(width). The limit between trained and untrained is
    # twice that, at least 0.15, and at most half of what the smoothest window has.
    cosines, noise = neighbour_cosines(rows), 1 / math.sqrt(rows.shape[1])
    limit = min(_best_window(cosines) / 2, max(0.15, 2 * noise))
    place = last_stretch(limit - cosines)
    if place is None or len(cosines) - place < WINDOW:
        return None
    # The tail is untrained if its mean is that of random rows, within 0.05 and four standard errors.
    tail = cosines[place:]
    return None if abs(tail.mean()) > 0.05 + 4 * noise / math.sqrt(len(tail)) else place + 1


def has_pattern(rows: np.ndarray) -> bool:
    """Return whether any window of the table is smoother than random rows are."""
    return _best_window(neighbour_cosines(rows)) >= max(ALIKE, 1.5 / math.sqrt(rows.shape[1]))


def _best_window(cosines: np.ndarray) -> float:
    window = min(WINDOW, len(cosines))
    return float(np.convolve(cosines, np.full(window, 1 / window), mode="valid").max()) if window else 0.0


def neighbour_cosines(rows: np.ndarray) -> np.ndarray:
    """Return the cosine of each row and the next, of shape `(positions - 1,)`.

    Zero where a row is zero or a copy of the row before it: such rows are a fill and were not trained.
    """
    rows = rows.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1)
    products = norms[1:] * norms[:-1]
    cosines = (rows[1:] * rows[:-1]).sum(1) / np.where(products > 0, products, 1)
    return np.where((rows[1:] == rows[:-1]).all(1), 0.0, cosines)


def row_statistics(rows: np.ndarray) -> pd.DataFrame:
    """Return statistics of the rows, a line for every sixteen.

    Columns: `begin` and `end` (positions), `norm` (mean), `cosine` (of neighbours, mean), `slow` (share of the power
    in the lowest tenth of the frequencies along positions, over the sixty-four rows around the line; 1 in a smooth
    table, about 0.1 in noise).
    """
    cosines, norms = neighbour_cosines(rows), np.linalg.norm(rows.astype(np.float64), axis=1)
    lines = []
    for begin in range(0, len(rows), WINDOW):
        end = min(begin + WINDOW, len(rows))
        inside = cosines[begin : end - 1]
        slow = slow_share(rows[max(0, begin - 24) : begin + 40])
        lines.append((begin, end, norms[begin:end].mean(), inside.mean() if len(inside) else math.nan, slow))
    return pd.DataFrame(lines, columns=["begin", "end", "norm", "cosine", "slow"])


def slow_share(rows: np.ndarray) -> float:
    """Return the share of the power along positions in the lowest tenth of the frequencies, without the mean."""
    power = power_spectrum(rows).sum(1)
    count = max(1, round(SLOW * len(power)))
    return float(power[:count].sum() / power.sum()) if power.sum() > 0 else math.nan


def power_spectrum(rows: np.ndarray) -> np.ndarray:
    """Return the power of each column at 1, 2, ... cycles over the rows, of shape `(positions // 2, width)`."""
    centred = rows - rows.mean(0)
    return np.asarray(np.abs(np.fft.rfft(centred, axis=0)[1:]) ** 2)


def reach_table(slopes: tuple[float, ...], scale: float) -> pd.DataFrame:
    """Return the reach of each head of an ALiBi model, steepest first.

    Columns: `head`, `slope` (nats per token), `reach` (tokens, `ln 100 / slope`: at that distance an equal score gets
    1 % of the weight of the nearest token). The model multiplies its biases by `scale`.
    """
    table = pd.DataFrame({"head": range(len(slopes)), "slope": np.multiply(slopes, scale)})
    with np.errstate(divide="ignore"):  # a head without a slope sees as far as it likes
        table["reach"] = -math.log(FADED) / table.slope
    return table.sort_values("slope", ascending=False, ignore_index=True)


def bucket_table(model: PreTrainedModel, buckets: Buckets) -> pd.DataFrame:
    """Return the distances, to keys before the query, that share a bucket, nearest first.

    Columns: `bucket`, `first` and `last` (tokens). The last bucket has no last distance (NaN).
    """
    distances = torch.arange(2 * buckets.max_distance + 2)
    bucket_of = buckets_of(model, distances, BucketPlan())
    lines = []
    for bucket in dict.fromkeys(bucket_of.tolist()):
        members = distances[bucket_of == bucket]
        lines.append({"bucket": bucket, "first": int(members.min()), "last": float(members.max())})
    lines[-1]["last"] = math.nan
    return pd.DataFrame(lines)
