"""Plan of an extension: frozen, plain JSON, and complete enough to move between machines.

A plan contains the numbers themselves (every frequency), not how to compute them, so that it can be applied, checked
and drawn where the method that made it is not installed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self, TypeVar, get_args

from .decode import MAX_TOKENS, PLAN_RULES, Positive, Rules, check_fields, decode, short
from .edits import (
    Band,
    BucketPlan,
    CountFade,
    DistanceDecay,
    Edit,
    Growth,
    PositionMap,
    QueryScale,
    RotaryPlan,
    RowCurve,
    RowGroup,
    Sinusoids,
    Slopes,
    TablePlan,
)
from .errors import PlanError, RenamedAttribute, renamed_names, warn_of_former
from .escaping import html_table, visible
from .scheme import KINDS, PositionalScheme

__all__ = [
    "Band",
    "BucketPlan",
    "CountFade",
    "DistanceDecay",
    "Edit",
    "ExtensionPlan",
    "Growth",
    "PositionMap",
    "QueryScale",
    "RotaryPlan",
    "RowCurve",
    "RowGroup",
    "Sinusoids",
    "Slopes",
    "TablePlan",
]

SCHEMA = 3
"""Schemas 1 and 2 are read as well. Schema 1 said `original_length`."""
NEWER = "fade decay step first_layer row row_group kept row_curve pair_groups pair_shares"
OLDER = Rules(optional=frozenset(NEWER.split()))
"""Fields that schemas 2 and 3 added have their defaults where an older plan lacks them."""
PLAN_FILE = "posext_plan.json"
PLAN_KEY = "posext_plan"
"""Entry of `config.json`, or of `adapter_config.json`, that contains the plan whoever has written it."""
MAX_PLAN_BYTES = 4 * 2**20
MAX_BANDS = 64
"""Each band is one more pass over keys in every attention layer; no method here has more than a handful."""


E = TypeVar("E", bound=Edit)


@dataclass(frozen=True)
class _Labels:
    method: str
    parameters: tuple[Mapping[str, Any], ...]
    scheme: PositionalScheme
    factor: Positive
    trained_length: int
    target_length: int


@dataclass(frozen=True)
class _File(_Labels):
    """Plan in the form of its file: a field for each type of edit, in the order of `Edit`."""

    rotaries: tuple[RotaryPlan, ...] = ()
    parts: tuple[Band, ...] = ()
    query_scale: QueryScale | None = None
    table: TablePlan | None = None
    slopes: tuple[float, ...] = ()
    buckets: BucketPlan | None = None
    sinusoids: PositionMap | None = None

    @property
    def edits(self) -> tuple[Edit, ...]:
        slopes = Slopes(self.slopes) if self.slopes else None
        sinusoids = Sinusoids(self.sinusoids) if self.sinusoids else None
        single = (self.query_scale, self.table, slopes, self.buckets, sinusoids)
        return (*self.rotaries, *self.parts, *(edit for edit in single if edit is not None))


EDITS: tuple[type[Edit], ...] = get_args(Edit)
FORMER_FIELDS = dict(zip([entry.name for entry in fields(_File)][-len(EDITS) :], EDITS, strict=True))


@dataclass(frozen=True)
class ExtensionPlan(_Labels):
    """Edits of one positional scheme by one method.

    Args:
        method (`str`): the method's name, or several joined by `+`.
        parameters (`tuple[Mapping, ...]`): the hyper-parameters of each of them, with its `name`.
        scheme (`PositionalScheme`): what the plan was made for.
        factor (`float`): `target_length / trained_length`.
        trained_length (`int`): trained length that the plan counts from, in tokens.
        target_length (`int`): length that the plan is for, in tokens.
        edits (`tuple[Edit, ...]`): every change that the plan makes, in the order of `Edit`; empty for the method
            `none`.
    """

    edits: tuple[Edit, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "edits", tuple(sorted(self.edits, key=lambda edit: EDITS.index(type(edit)))))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return the plan itself, which is frozen. A copied cache thereby stays one of its model in compiled steps."""
        return self

    def of(self, kind: type[E]) -> tuple[E, ...]:
        """Return the edits of one type."""
        return tuple(edit for edit in self.edits if isinstance(edit, kind))

    def with_edits(self, kind: type[E], *edits: E) -> Self:
        """Return the plan with other edits of one type."""
        return replace(self, edits=(*(edit for edit in self.edits if not isinstance(edit, kind)), *edits))

    @property
    def rotaries(self) -> tuple[RotaryPlan, ...]:
        """Changed sets of frequencies. All others remain as shipped."""
        return self.of(RotaryPlan)

    @property
    def bands(self) -> tuple[Band, ...]:
        """Bands of remapped query-key pairs; empty if no position is remapped."""
        return self.of(Band)

    @property
    def query_scale(self) -> QueryScale | None:
        """Scale of queries by position."""
        return next(iter(self.of(QueryScale)), None)

    @property
    def table(self) -> TablePlan | None:
        """Source of the rows of a longer learned table."""
        return next(iter(self.of(TablePlan)), None)

    @property
    def slopes(self) -> tuple[float, ...]:
        """ALiBi slope of each head; empty if unchanged."""
        return next((edit.values for edit in self.of(Slopes)), ())

    @property
    def buckets(self) -> BucketPlan | None:
        """Change of the distances before they are sorted into buckets."""
        return next(iter(self.of(BucketPlan)), None)

    @property
    def sinusoids(self) -> PositionMap | None:
        """Map from the position of a token to the position of its sines."""
        return next((edit.position for edit in self.of(Sinusoids)), None)

    parts = RenamedAttribute("bands")
    original_length = RenamedAttribute("trained_length")

    @property
    def rotates_late(self) -> bool:
        """`True` if phases depend on the query-key pair or on the row, and are applied in attention."""
        return any(
            isinstance(edit, Band | QueryScale) or (isinstance(edit, RotaryPlan) and edit.growth is not None)
            for edit in self.edits
        )

    @property
    def follows_rows(self) -> bool:
        """`True` if positions, frequencies, or scales depend on the length of each row."""
        maps = (mapping for band in self.bands for mapping in (band.query, band.key))
        scale = self.query_scale is not None and self.query_scale.row is not None
        return scale or any(entry.growth for entry in self.rotaries) or any(mapping.follows_rows for mapping in maps)

    @property
    def changes_nothing(self) -> bool:
        """`True` if the plan contains no edit (the method `none`)."""
        return not self.edits

    def check(self) -> None:
        """Refuse a plan that asks for more than can be made, or for what no method can have meant.

        Raises:
            PlanError: contains the bound.
        """
        check_fields(self)
        if self.scheme.kind not in KINDS:
            raise PlanError(f"plan.scheme.kind is {short(self.scheme.kind)}; there are: {', '.join(KINDS)}")
        if not (self.factor <= MAX_TOKENS and 1 <= self.trained_length <= self.target_length <= MAX_TOKENS):
            raise PlanError(
                f"plan goes from {self.trained_length} to {self.target_length} tokens by factor {self.factor:g}; "
                f"lengths grow from 1 or more, up to {MAX_TOKENS}"
            )
        if abs(self.trained_length * self.factor - self.target_length) > 1:
            raise PlanError(
                f"plan has factor {self.factor:g}, but goes from {self.trained_length} to {self.target_length} tokens"
            )
        for kind in EDITS:
            count, most = len(self.of(kind)), {RotaryPlan: len(self.scheme.rotaries), Band: MAX_BANDS}.get(kind, 1)
            if count > most:
                raise PlanError(f"plan has {count} edits of the type {kind.__name__}; at most {most} are possible")
        for edit in self.edits:
            edit.check(self)

    def __repr__(self) -> str:
        return f"ExtensionPlan({visible(self.describe())})"

    def _repr_html_(self) -> str:
        return html_table({"plan": self.describe(), "scheme": self.scheme.describe()})

    def describe(self) -> str:
        """Return the method, the lengths and the parameters on one line."""
        given = ", ".join(
            f"{key}={short(value)}"
            for entry in self.parameters
            for key, value in entry.items()
            if key not in ("name", "factor") and value is not None
        )
        lengths = f"{self.trained_length} -> {self.target_length} tokens (x{self.factor:g})"
        return f"{self.method}: {lengths}" + (f", {given}" if given else "")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, with the number of the schema."""
        names = [entry.name for entry in fields(_File)]
        file = _File(**{name: getattr(self, "bands" if name == "parts" else name) for name in names})
        plain: dict[str, Any] = json.loads(json.dumps({"schema": SCHEMA, **asdict(file)}, allow_nan=False))
        return plain

    def save(self, directory: str | Path) -> Path:
        """Write `posext_plan.json` into a directory and return its path."""
        path = Path(directory) / PLAN_FILE
        path.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> ExtensionPlan:
        """Read a plan from its file, or from `posext_plan.json` or the config in a directory of an adapter or a model.

        Raises:
            PlanError: no such file, not JSON, too large, of a newer schema, or with values out of bounds.
        """
        path = Path(path)
        data = _in_directory(path) if path.is_dir() else _read(path) if path.is_file() else None
        if data is None:
            raise PlanError(f"no plan at {path}; a patched model that was saved has one")
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Any) -> ExtensionPlan:
        """Return the plan that `to_dict` gave.

        Raises:
            PlanError: a newer schema, missing or unknown keys, wrong types, or values out of bounds.
        """
        schema = data.get("schema") if isinstance(data, Mapping) else None
        if schema not in (1, 2, SCHEMA):
            raise PlanError(
                f"plan has schema {short(schema)}; this version of hf_posext reads 1 to {SCHEMA}: "
                "upgrade it, or plan again"
            )
        data = {key: value for key, value in data.items() if key != "schema"}
        if schema == 1 and "trained_length" not in data:
            data["trained_length"] = data.pop("original_length", None)
        file = decode(_File, data, rules=PLAN_RULES if schema == SCHEMA else OLDER)
        plan = cls(**{entry.name: getattr(file, entry.name) for entry in fields(cls)})
        plan.check()
        return plan


def _accept_former_fields(init: Callable[..., None]) -> Callable[..., None]:
    """Let `ExtensionPlan(...)` and `dataclasses.replace` accept the fields that preceded `edits`, with a warning."""

    @functools.wraps(init)
    def call(self: ExtensionPlan, *labels: Any, edits: tuple[Edit, ...] = (), **given: Any) -> None:
        former = {name: given.pop(name) for name in FORMER_FIELDS if name in given}
        if former:
            warn_of_former(", ".join(former), "edits", "call plan.with_edits(type, ...)")
            replaced = tuple(FORMER_FIELDS[name] for name in former)
            kept = tuple(edit for edit in edits if not isinstance(edit, replaced))
            edits = (*kept, *_File("", (), None, 1, 1, 1, **former).edits)  # type: ignore[arg-type]
        init(self, *labels, edits=edits, **given)

    return call


ExtensionPlan.__init__ = _accept_former_fields(ExtensionPlan.__init__)  # type: ignore[method-assign]
__getattr__ = renamed_names(__name__, Part="Band", MAX_PARTS="MAX_BANDS")


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number that a plan can hold")


def has_plan(directory: str | Path) -> bool:
    """Return whether a directory contains a plan, in a file of its own or in a config."""
    return _in_directory(Path(directory)) is not None


def _in_directory(path: Path) -> Any:
    if (path / PLAN_FILE).is_file():
        return _read(path / PLAN_FILE)
    configs = (path / "adapter_config.json", path / "config.json")
    read = (_read(config, lambda text: None) for config in configs if config.is_file())  # infinities mean no plan
    return next((data[PLAN_KEY] for data in read if isinstance(data, Mapping) and PLAN_KEY in data), None)


def _read(path: Path, constant: Callable[[str], Any] = _refuse_constant) -> Any:
    if path.stat().st_size > MAX_PLAN_BYTES:
        raise PlanError(f"{path} has {path.stat().st_size} bytes; at most {MAX_PLAN_BYTES} are read for a plan")
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path} is not a plan in JSON: {error}") from error
