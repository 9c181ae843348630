"""What a model shall have: a plan is frozen, is plain JSON, and is all that travels between machines.

A plan says the numbers themselves (every frequency), not how to compute them, so that it can be applied, checked
and drawn where the method that made it is not installed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .decode import decode, short
from .errors import PlanError
from .plan_bounds import check_bounds
from .scheme import PositionalScheme

SCHEMA = 2
"""Schema 1, which is read as well, had no `fade` and no `decay` in its parts."""
PLAN_FILE = "posext_plan.json"
MAX_PLAN_BYTES = 4 * 2**20


@dataclass(frozen=True)
class RotaryPlan:
    """What one set of rotary frequencies shall become.

    Args:
        name (`str`): the [`Rotary`] it is for.
        inv_freq (`tuple[float, ...]`): radians per token of each pair, each exactly a float32.
        attention_factor (`float`, *optional*, defaults to 1.0): cosine and sine are multiplied by it, so that
            attention logits scale by its square.
        short_inv_freq (`tuple[float, ...]`, *optional*): used instead while the input is no longer than the original
            length (LongRoPE).
        rope_parameters (`Mapping`, *optional*): the config entry from which transformers computes the same numbers;
            `None` where none of its rope types can say them.
        growth (`Growth`, *optional*): how they follow the length of each row; `inv_freq` are those of a short one.
    """

    name: str
    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0
    short_inv_freq: tuple[float, ...] | None = None
    rope_parameters: Mapping[str, Any] | None = None
    growth: Growth | None = None


@dataclass(frozen=True)
class Growth:
    """Frequencies that follow the length of each row.

    With `s = max(1, row length / original length)`, pair i turns by `moving_i * s ** -power_i + kept_i` radians a
    token, and cosine and sine are multiplied by `1 + temperature * ln s`.
    """

    moving: tuple[float, ...]
    power: tuple[float, ...]
    kept: tuple[float, ...]
    temperature: float = 0.0


@dataclass(frozen=True)
class PositionMap:
    """Position p of a token as a part of the attention sees it.

    `min(rate * ((p mod modulo) // group) + offset, limit)`; `modulo` and `limit` count only where they are given.
    """

    rate: float = 1.0
    group: int = 1
    offset: float = 0.0
    modulo: int | None = None
    limit: float | None = None


@dataclass(frozen=True)
class CountFade:
    """Logits of a band that fall with the number of its keys.

    The query at position p loses `strength * ln(max(1, n / reference))`. The band of a query holds
    `n = (p // chunk - low + 1) * chunk` keys.

    Args:
        strength (`float`): above 0. At 1 the band weighs no more than `reference` keys did.
        reference (`int`): number of keys up to which nothing changes.
    """

    strength: float
    reference: int


@dataclass(frozen=True)
class DistanceDecay:
    """Logits of a band that fall with distance, by the same amount within each octave of distances.

    A pair at distance d loses `strength * ln(2) * (k + 1/2)`, where `start * 2 ** k <= d < start * 2 ** (k + 1)`.
    That is `strength * ln(d / start)` at the geometric middle of the octave, and at most `0.35 * strength` off
    elsewhere. Pairs nearer than `start` lose nothing.

    Args:
        strength (`float`): above 0.
        start (`int`): first distance that loses, in tokens.
    """

    strength: float
    start: int


@dataclass(frozen=True)
class Part:
    """A band: some of the pairs of query i and key j, and the positions that rotary phases have there.

    A pair belongs to the part when `low <= i // chunk - j // chunk < high`, and `j < keys_below` where that is given;
    bounds that are `None` do not bound. The parts of a plan are disjoint; a pair in no part is not attended. What
    `fade` and `decay` take is taken from the logits that reach the softmax, after a softcap.
    """

    query: PositionMap
    key: PositionMap
    low: int = 0
    high: int | None = None
    chunk: int = 1
    keys_below: int | None = None
    fade: CountFade | None = None
    decay: DistanceDecay | None = None

    @property
    def is_far(self) -> bool:
        """Whether the band holds all farther keys, so that it grows without end."""
        return self.low > 0 and self.high is None and self.keys_below is None


@dataclass(frozen=True)
class QueryScale:
    """What queries are multiplied by: `constant`, times `max(1, ln(p + 1) / ln length)` at position p where `log` is
    set, times `(1 + temperature * ln max(1, (p + 1) / length)) ** 2`.
    """

    length: int
    log: bool = False
    temperature: float = 0.0
    constant: float = 1.0


@dataclass(frozen=True)
class TablePlan:
    """Where the rows of a longer table of positions come from.

    Position p gets the trained table at `position`, between two rows by `interpolation`; where `coarse` is given, plus
    `alpha / (1 - alpha)` times the difference of its rows at `coarse` and at 0. Rows before the table's offset stay.

    Args:
        position (`PositionMap`): from a position of the new table to one of the trained table.
        interpolation (`str`, *optional*, defaults to `"linear"`): or `"cubic"`, a natural spline.
        coarse (`PositionMap`, *optional*): of a hierarchical table.
        alpha (`float`, *optional*, defaults to 0): its share, 0 up to but not including 1.
    """

    position: PositionMap
    interpolation: str = "linear"
    coarse: PositionMap | None = None
    alpha: float = 0.0


@dataclass(frozen=True)
class BucketPlan:
    """What is done to a relative distance before it is sorted into a bucket: its size is divided by `factor` and
    rounded up, and buckets reach to `max_distance` where that is given."""

    factor: float = 1.0
    max_distance: int | None = None


@dataclass(frozen=True)
class ExtensionPlan:
    """What shall be done to one positional scheme by one method.

    Args:
        method (`str`): the method's name, or several joined by `+`.
        parameters (`tuple[Mapping, ...]`): the hyper-parameters of each of them, with its `name`.
        scheme (`PositionalScheme`): what the plan was made for.
        factor (`float`): `target_length / original_length`.
        original_length (`int`): trained length that the plan counts from, in tokens.
        target_length (`int`): length that the plan is for, in tokens.
        rotaries (`tuple[RotaryPlan, ...]`): the sets of frequencies that change; the others stay as shipped.
        parts (`tuple[Part, ...]`): which positions each pair of query and key gets; all as they are where empty.
        query_scale (`QueryScale`, *optional*): how queries grow with their position.
        table (`TablePlan`, *optional*): how the learned table is stretched to `target_length` positions.
        slopes (`tuple[float, ...]`): the slope of ALiBi of each head; as they are where empty.
        buckets (`BucketPlan`, *optional*): how distances are sorted into buckets.
        sinusoids (`PositionMap`, *optional*): the position of which each token gets the sines.
    """

    method: str
    parameters: tuple[Mapping[str, Any], ...]
    scheme: PositionalScheme
    factor: float
    original_length: int
    target_length: int
    rotaries: tuple[RotaryPlan, ...] = ()
    parts: tuple[Part, ...] = ()
    query_scale: QueryScale | None = None
    table: TablePlan | None = None
    slopes: tuple[float, ...] = ()
    buckets: BucketPlan | None = None
    sinusoids: PositionMap | None = None

    @property
    def rotates_late(self) -> bool:
        """Whether phases depend on the pair of query and key, or on the row, so that they are applied in attention."""
        return bool(self.parts) or self.query_scale is not None or any(entry.growth for entry in self.rotaries)

    @property
    def changes_nothing(self) -> bool:
        """Whether the plan leaves the model as it is (the method `none`)."""
        return not (self.rotaries or self.rotates_late or self.slopes or self.table or self.buckets or self.sinusoids)

    def check(self) -> None:
        """Refuse a plan that asks for more than can be made, or for what no method can have meant.

        Raises:
            PlanError: says what, and the bound.
        """
        check_bounds(self)

    def describe(self) -> str:
        """One line: method, lengths, parameters."""
        given = ", ".join(
            f"{key}={short(value)}"
            for entry in self.parameters
            for key, value in entry.items()
            if key not in ("name", "factor") and value is not None
        )
        lengths = f"{self.original_length} -> {self.target_length} tokens (x{self.factor:g})"
        return f"{self.method}: {lengths}" + (f", {given}" if given else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, with the schema's number."""
        plain: dict[str, Any] = json.loads(json.dumps({"schema": SCHEMA, **asdict(self)}, allow_nan=False))
        return plain

    def save(self, directory: str | Path) -> Path:
        """Write `posext_plan.json` into a directory and return its path."""
        path = Path(directory) / PLAN_FILE
        path.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> ExtensionPlan:
        """Read a plan from its file, or from the directory that holds it.

        Raises:
            PlanError: no such file, not JSON, too large, of a newer schema, or with values out of bounds.
        """
        path = Path(path)
        path = path / PLAN_FILE if path.is_dir() else path
        if not path.is_file():
            raise PlanError(f"no plan at {path}; a patched model saved by patch.save_pretrained(...) has one")
        if path.stat().st_size > MAX_PLAN_BYTES:
            raise PlanError(f"{path} has {path.stat().st_size} bytes; a plan has at most {MAX_PLAN_BYTES}")
        try:
            data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{path} is not a plan in JSON: {error}") from error
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Any) -> ExtensionPlan:
        """The plan that `to_dict` gave.

        Raises:
            PlanError: a newer schema, missing or unknown keys, wrong types, or values out of bounds.
        """
        schema = data.get("schema") if isinstance(data, Mapping) else None
        if schema not in (1, SCHEMA):
            raise PlanError(
                f"plan has schema {short(schema)}; this version of hf_posext reads 1 to {SCHEMA}: "
                "upgrade it, or plan again"
            )
        data = {key: value for key, value in data.items() if key != "schema"}
        if schema == 1 and isinstance(data.get("parts"), list):
            data["parts"] = [
                {**part, "fade": None, "decay": None} if isinstance(part, Mapping) else part for part in data["parts"]
            ]
        plan = decode(cls, data)
        plan.check()
        return plan


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number that a plan can hold")
