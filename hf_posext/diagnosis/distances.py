"""What distances mean to a model that has no positions but those: ALiBi's penalties, and buckets."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import torch

from ..patching.observe import buckets_of
from ..plan import BucketPlan
from ..scheme import Buckets

FADED = 0.01
"""Weight, beside that of the nearest token, at which a token is called out of a head's reach."""


def reach_table(slopes: tuple[float, ...], scale: float) -> pd.DataFrame:
    """How far each head of an ALiBi model sees, a line for each head, steepest first.

    Columns: `head`, `slope` (nats per token), `reach` (tokens, `ln 100 / slope`: at that distance an equal score gets
    1 % of the weight of the nearest token).

    Args:
        slopes (`tuple[float, ...]`): of the scheme.
        scale (`float`): what the model multiplies its biases by.
    """
    lines = [
        {"head": head, "slope": slope * scale, "reach": -math.log(FADED) / (slope * scale) if slope else math.inf}
        for head, slope in enumerate(slopes)
    ]
    return pd.DataFrame(lines).sort_values("slope", ascending=False, ignore_index=True)


def bucket_table(model: Any, buckets: Buckets) -> pd.DataFrame:
    """Which distances, to keys before the query, share a bucket; a line for each, nearest first.

    Columns: `bucket`, `first` and `last` (tokens); the last bucket has no last distance (NaN).
    """
    distances = torch.arange(2 * buckets.max_distance + 2)
    found = buckets_of(model, distances, BucketPlan())
    lines = []
    for bucket in dict.fromkeys(found.tolist()):
        inside = distances[found == bucket]
        lines.append({"bucket": bucket, "first": int(inside.min()), "last": float(inside.max())})
    lines[-1]["last"] = math.nan
    return pd.DataFrame(lines)
