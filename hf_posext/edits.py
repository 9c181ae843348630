"""Edits of a plan: plain data, whose bounds are part of their types, because a plan may come from any file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from .decode import Bound, Count, Index, Positive, short
from .errors import PlanError

if TYPE_CHECKING:
    from .plan import ExtensionPlan

MAX_TABLE_BYTES = 2**31
"""Largest table of positions that a plan may ask for, at 4 bytes a number."""


class Change:
    """Base of the edits of a plan."""

    def check(self, plan: ExtensionPlan) -> None:
        """Check what no type can express.

        Raises:
            PlanError: the plan asks for more than can be made, or for what no method can have meant.
        """


Frequency = Annotated[float, Bound("from 0 to 2 pi", lambda radians: 0 <= radians <= 2 * math.pi)]


@dataclass(frozen=True)
class RotaryPlan(Change):
    """New values of one set of rotary frequencies.

    Args:
        name (`str`): the [`Rotary`] it is for.
        inv_freq (`tuple[float, ...]`): radians per token of each pair, each exactly a float32.
        attention_factor (`float`, *optional*, defaults to 1.0): cosine and sine are multiplied by it, so that
            attention logits scale by its square.
        short_inv_freq (`tuple[float, ...]`, *optional*): used instead within the trained length (LongRoPE).
        rope_parameters (`Mapping`, *optional*): the config entry from which transformers computes the same numbers;
            `None` where none of its rope types can express them.
        growth (`Growth`, *optional*): how they follow the length of each row; `inv_freq` are those of a short one.
    """

    name: str
    inv_freq: tuple[Frequency, ...]
    attention_factor: Positive = 1.0
    short_inv_freq: tuple[Frequency, ...] | None = None
    rope_parameters: Mapping[str, Any] | None = None
    growth: Growth | None = None

    def check(self, plan: ExtensionPlan) -> None:
        slots = next((rotary.slots for rotary in plan.scheme.rotaries if rotary.name == self.name), None)
        if slots is None:
            raise PlanError(f"plan changes frequencies {short(self.name)!r}, which its own scheme does not have")
        grown = (self.growth.moving, self.growth.power, self.growth.kept) if self.growth else ()
        for numbers in filter(None, (self.inv_freq, self.short_inv_freq, *grown)):
            if len(numbers) != slots:
                raise PlanError(f"plan has {len(numbers)} numbers for {self.name!r}; its scheme has {slots}")


@dataclass(frozen=True)
class Growth:
    """Frequencies that follow the length of each row.

    With `s = max(1, row length / trained length)`, pair i rotates by `moving_i * s ** -power_i + kept_i` radians a
    token, and cosine and sine are multiplied by `1 + temperature * ln s`.
    """

    moving: tuple[float, ...]
    power: tuple[float, ...]
    kept: tuple[float, ...]
    temperature: float = 0.0

    @property
    def acts(self) -> bool:
        """`True` if anything depends on the row length."""
        powers = zip(self.moving, self.power, strict=True)
        return self.temperature != 0 or any(moving != 0 and power != 0 for moving, power in powers)


@dataclass(frozen=True)
class RowGroup:
    """Group size that grows with the length of each row: `max(1, ceil((row length - beyond) / span))`."""

    span: Count
    beyond: Index = 0


@dataclass(frozen=True)
class RowCurve:
    """A number of positions that grows with the length of each row: `limit / (1 + exp(-(slope * n + shift)))` in a row
    of n tokens. Rows of at most `beyond` tokens keep their positions."""

    limit: float
    slope: float
    shift: float
    beyond: int


@dataclass(frozen=True)
class PositionMap:
    """Map from the position p of a token to its position in a band.

    `min(rate * f(p mod modulo) + offset, limit)` with `f(p) = p // group`; `modulo` and `limit` count only where they
    are given. The map f has other forms:

    - `row_group`: `p // G`, where the group G follows the length of the row.
    - `row_curve`: `floor(p * M / (n - 1))` in a row of n tokens, where M follows n.
    - `pair_groups`: `p // g`, with a group g for each slot of frequencies.
    - `pair_shares`, with `row_group` for `s = max(1, (n - beyond) / span)`: `p * (1 - share * (1 - 1 / s))`, with a
      share for each slot of frequencies.

    In each of these, `kept - f(kept)` is added, so that the position `kept` stays; where `row_curve` maps a row, 1
    less.
    """

    rate: float = 1.0
    group: Count = 1
    offset: float = 0.0
    modulo: Count | None = None
    limit: float | None = None
    row_group: RowGroup | None = None
    kept: Index = 0
    row_curve: RowCurve | None = None
    pair_groups: tuple[Count, ...] = ()
    pair_shares: tuple[Annotated[float, Bound("from 0 to 1", lambda share: 0 <= share <= 1)], ...] = ()

    @property
    def by_pair(self) -> bool:
        """`True` if rotary pairs have separate positions."""
        return bool(self.pair_groups or self.pair_shares)

    @property
    def follows_rows(self) -> bool:
        """`True` if positions depend on the length of each row."""
        return self.row_group is not None or self.row_curve is not None

    def of_pair(self, pair: int) -> PositionMap:
        """Return the map of index rotary pair."""
        index = slice(pair, pair + 1)
        return replace(self, pair_groups=self.pair_groups[index], pair_shares=self.pair_shares[index])

    def check(self, rows: bool = False) -> None:
        """Refuse shares without a group that follows rows, and what a table has no rows of text or pairs for."""
        if (self.follows_rows or self.by_pair) and not rows:
            raise PlanError(
                "plan maps positions of a table by groups that follow rows or by rotary pairs; a table has no rows of "
                "text and no pairs"
            )
        if self.pair_shares and (self.row_group is None or self.pair_groups):
            raise PlanError("plan has shares of pairs without a group that follows rows, or beside groups of pairs")


@dataclass(frozen=True)
class CountFade:
    """Reduction of a band's logits by the number of its keys.

    The query at position p loses `strength * ln(max(1, n / reference))`. The band of a query holds
    `n = (p // chunk - low + 1) * chunk` keys.

    Args:
        strength (`float`): at 1 the band weighs no more than `reference` keys did.
        reference (`int`): number of keys up to which nothing changes.
    """

    strength: Positive
    reference: Count


@dataclass(frozen=True)
class DistanceDecay:
    """Reduction of a band's logits by distance, constant within each octave of distances.

    A pair at distance d loses `strength * ln(2) * (k + 1/2)`, where `start * 2 ** k <= d < start * 2 ** (k + 1)`.
    That is `strength * ln(d / start)` at the geometric middle of the octave, and at most `0.35 * strength` off
    elsewhere. Pairs nearer than `start` lose nothing.

    Args:
        strength (`float`): share of the logarithm of the distance.
        start (`int`): first distance that loses, in tokens.
    """

    strength: Positive
    start: Count


@dataclass(frozen=True)
class Band(Change):
    """Band of the pairs of query i and key j, and the positions of its rotary phases.

    A pair belongs to the band when `low <= i // chunk - j // chunk < high`, and `j < keys_below` where that is given;
    bounds that are `None` do not bound. The bands of a plan are disjoint; a pair in no band is not attended. What
    `fade` and `decay` take is taken from the logits that reach the softmax, after a softcap.
    """

    query: PositionMap
    key: PositionMap
    low: int = 0
    high: int | None = None
    chunk: Count = 1
    keys_below: int | None = None
    fade: CountFade | None = None
    decay: DistanceDecay | None = None

    @property
    def is_far(self) -> bool:
        """`True` if the band contains all farther keys and grows without bound."""
        return self.low > 0 and self.high is None and self.keys_below is None

    def check(self, plan: ExtensionPlan) -> None:
        slots = {rotary.slots for rotary in plan.scheme.rotaries}
        for mapping in (self.query, self.key):
            mapping.check(rows=True)
            if mapping.by_pair and slots != {len(mapping.pair_groups or mapping.pair_shares)}:
                raise PlanError(f"plan maps positions by rotary pairs of another number than its scheme has: {slots}")
        if (self.fade or self.decay) and not self.is_far:
            raise PlanError("plan fades a band, or lets it decay, that does not contain all farther keys")
        if self.decay and self.chunk != 1:
            raise PlanError(f"plan lets a band of chunks of {self.chunk} decay by distance; chunks of 1 are possible")


@dataclass(frozen=True)
class QueryScale(Change):
    """Factor of queries, in layers from `first_layer` on: `constant`, times `max(1, ln(p + 1) / ln length)` at
    position p where `log` is set, times `(1 + temperature * ln max(1, (p + 1) / length)) ** 2`. Where `step` is given,
    the last is `1 + temperature * ln(floor((p + 1) / step) + 1)` instead, and where `row` is given,
    `1 + temperature * ln max(1, (n - beyond) / span)` with its numbers, in a row of n tokens.
    """

    length: Annotated[int, Bound("of at least 2", lambda length: length >= 2)]
    log: bool = False
    temperature: float = 0.0
    constant: float = 1.0
    step: Count | None = None
    first_layer: Index = 0
    row: RowGroup | None = None

    def acts_at(self, position: int) -> bool:
        """Return whether the last query of a row, at a position, is scaled by another number than 1."""
        count = position + 1
        past = warmer = count > self.length
        if self.step is not None:
            warmer = count >= self.step
        elif self.row is not None:
            warmer = count - self.row.beyond > self.row.span
        return self.constant != 1 or (self.temperature != 0 and warmer) or (self.log and past)


@dataclass(frozen=True)
class TablePlan(Change):
    """Source of the rows of a longer table of positions.

    Position p gets the trained table at `position`, between two rows by `interpolation`; where `coarse` is given, plus
    `alpha / (1 - alpha)` times the difference of its rows at `coarse` and at 0. Rows before the table's offset stay.

    Args:
        position (`PositionMap`): from a position of the new table to one of the trained table.
        interpolation (`str`, *optional*, defaults to `"linear"`): or `"cubic"`, a natural spline.
        coarse (`PositionMap`, *optional*): of a hierarchical table.
        alpha (`float`, *optional*, defaults to 0): its share.
    """

    position: PositionMap
    interpolation: Literal["linear", "cubic"] = "linear"
    coarse: PositionMap | None = None
    alpha: Annotated[float, Bound("from 0 up to, but not including, 1", lambda alpha: 0 <= alpha < 1)] = 0.0

    def check(self, plan: ExtensionPlan) -> None:
        for entry in filter(None, (self.position, self.coarse)):
            entry.check()
        usable, width = (plan.scheme.table.usable, plan.scheme.table.width) if plan.scheme.table else (0, 1)
        check_table_size(plan.target_length, width)
        if plan.trained_length > usable:
            raise PlanError(f"plan stretches {plan.trained_length} rows of a table that has {usable}")


@dataclass(frozen=True)
class Slopes(Change):
    """Slope of ALiBi of each head."""

    values: tuple[Annotated[float, Bound("of at least 0", lambda slope: slope >= 0)], ...]

    def check(self, plan: ExtensionPlan) -> None:
        if len(self.values) != len(plan.scheme.slopes):
            raise PlanError(f"plan has {len(self.values)} slopes; its scheme has {len(plan.scheme.slopes)} heads")


@dataclass(frozen=True)
class BucketPlan(Change):
    """Change of a relative distance before it is sorted into a bucket: its size is divided by `factor` and
    rounded up, and buckets reach to `max_distance` where that is given."""

    factor: Positive = 1.0
    max_distance: int | None = None

    def check(self, plan: ExtensionPlan) -> None:
        buckets = plan.scheme.buckets
        if buckets is None:
            raise PlanError("plan changes buckets of distances, which its own scheme does not have")
        if self.max_distance is not None and self.max_distance < buckets.max_distance:
            raise PlanError(
                f"plan has buckets up to distance {self.max_distance}; the {buckets.max_distance} of its scheme or "
                "more are possible"
            )


@dataclass(frozen=True)
class Sinusoids(Change):
    """Map from the position of a token to the position of its sines."""

    position: PositionMap

    def check(self, plan: ExtensionPlan) -> None:
        self.position.check()


Edit: TypeAlias = RotaryPlan | Band | QueryScale | TablePlan | Slopes | BucketPlan | Sinusoids
"""One change of a positional scheme. A plan has its edits in this order."""


def check_table_size(rows: int, width: int, count: int = 1) -> None:
    """Refuse tables that would not fit into memory, before they are made.

    Raises:
        PlanError: contains the most positions that are possible.
    """
    if rows * width * count * 4 > MAX_TABLE_BYTES:
        raise PlanError(
            f"a table of {rows} positions x {width} numbers has {rows * width * count * 4} bytes; at most "
            f"{MAX_TABLE_BYTES} are made, which is {MAX_TABLE_BYTES // (4 * width * count)} positions: "
            "pass a smaller factor or target_length"
        )
