"""What a model shall have: a plan is frozen, is plain JSON, and is all that travels between machines.

A plan says the numbers themselves (every frequency), not how to compute them, so that it can be applied, checked
and drawn where the method that made it is not installed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .errors import PlanError
from .scheme import PositionalScheme, Rotary

SCHEMA = 1
PLAN_FILE = "posext_plan.json"
MAX_PLAN_BYTES = 4 * 2**20
MAX_LENGTH = 2**40


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
    """

    name: str
    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0
    short_inv_freq: tuple[float, ...] | None = None
    rope_parameters: Mapping[str, Any] | None = None


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
    """

    method: str
    parameters: tuple[Mapping[str, Any], ...]
    scheme: PositionalScheme
    factor: float
    original_length: int
    target_length: int
    rotaries: tuple[RotaryPlan, ...] = ()

    @property
    def multipass(self) -> bool:
        """Whether the positions of a token depend on the length of the input, so that one forward at the longest
        length does not tell the shorter ones."""
        return any(rotary.short_inv_freq is not None for rotary in self.rotaries)

    @property
    def changes_nothing(self) -> bool:
        """Whether the plan leaves the model as it is (the method `none`)."""
        return not self.rotaries

    def describe(self) -> str:
        """One line: method, lengths, parameters."""
        given = ", ".join(
            f"{key}={_short(value)}"
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
        data = dict(_typed("plan", data, Mapping))
        schema = data.pop("schema", None)
        if schema != SCHEMA:
            raise PlanError(
                f"plan has schema {schema!r}; this version of hf_posext reads {SCHEMA}: upgrade it, or plan again"
            )
        _check_keys("plan", data, cls)
        scheme = dict(_typed("scheme", data["scheme"], Mapping))
        _check_keys("scheme", scheme, PositionalScheme)
        scheme["rotaries"] = tuple(
            Rotary(**_check_keys("rotary", dict(_typed("rotary", entry, Mapping)), Rotary))
            for entry in _typed("scheme.rotaries", scheme["rotaries"], list)
        )
        scheme["layer_types"] = tuple(_typed("scheme.layer_types", scheme["layer_types"], list))
        plan = cls(
            method=_typed("method", data["method"], str),
            parameters=tuple(
                _typed("parameters", entry, Mapping) for entry in _typed("parameters", data["parameters"], list)
            ),
            scheme=PositionalScheme(**scheme),
            factor=_number("factor", data["factor"]),
            original_length=_length("original_length", data["original_length"]),
            target_length=_length("target_length", data["target_length"]),
            rotaries=tuple(_rotary_plan(entry) for entry in _typed("rotaries", data["rotaries"], list)),
        )
        for rotary in plan.rotaries:
            if all(rotary.name != known.name for known in plan.scheme.rotaries):
                raise PlanError(f"plan changes frequencies {rotary.name!r}, which its own scheme does not have")
            slots = plan.scheme.rotary(rotary.name).slots
            for numbers in (rotary.inv_freq, rotary.short_inv_freq):
                if numbers is not None and len(numbers) != slots:
                    raise PlanError(f"plan has {len(numbers)} frequencies for {rotary.name!r}; its scheme has {slots}")
        return plan


def _rotary_plan(data: Any) -> RotaryPlan:
    entry = _check_keys("rotaries", dict(_typed("rotaries", data, Mapping)), RotaryPlan)
    short = entry["short_inv_freq"]
    parameters = entry["rope_parameters"]
    return RotaryPlan(
        name=_typed("rotaries.name", entry["name"], str),
        inv_freq=_frequencies(entry["inv_freq"]),
        attention_factor=_number("attention_factor", entry["attention_factor"]),
        short_inv_freq=None if short is None else _frequencies(short),
        rope_parameters=None if parameters is None else _typed("rope_parameters", parameters, Mapping),
    )


def _frequencies(values: Any) -> tuple[float, ...]:
    numbers = tuple(_number("inv_freq", value, minimum=0.0) for value in _typed("inv_freq", values, list))
    if any(number > 2 * math.pi for number in numbers):
        raise PlanError(f"inv_freq has {max(numbers)}; a pair turns by at most 2 pi radians a token")
    return numbers


def _number(name: str, value: Any, minimum: float = 1e-6) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not minimum <= value <= MAX_LENGTH:
        raise PlanError(f"{name} is {_short(value)}; a plan has a number from {minimum:g} to {MAX_LENGTH:g} there")
    return float(value)


def _length(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_LENGTH:
        raise PlanError(f"{name} is {_short(value)}; a plan has a number of tokens there")
    return value


def _typed(name: str, value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise PlanError(f"{name} is {_short(value)}; a plan has a {kind.__name__} there")
    return value


def _check_keys(name: str, data: dict[str, Any], cls: type) -> dict[str, Any]:
    wanted = {entry.name for entry in fields(cls)}
    if set(data) != wanted:
        missing, unknown = sorted(wanted - set(data)), sorted(set(data) - wanted)
        raise PlanError(f"{name} in the plan lacks {missing} and has unknown {unknown}; plan again with this version")
    return data


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number that a plan can hold")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
