"""Identity of a base model among others of the same shape, from samples of its weights.

A few numbers of a few weights that no adapter layer holds. They survive a change of dtype to within its rounding, and
a model that was trained further has others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..decode import decode
from ..errors import CheckpointError, PlanError
from .sites import path_without_adapter, position_tables
from .undo import unwrap
from .untrusted import read_json

BASE_FILE = "posext_base.json"
BASE_KEY = "posext_base"
"""Entry of `adapter_config.json` that contains the same, where PEFT wrote the directory."""

TENSORS = 16
VALUES = 8
ROUNDING = 2**-8  # bfloat16 keeps 8 bits: half a unit in the last place, once when written and once when read
SMALLEST = 1e-6  # below this float16 has no full precision


@dataclass(frozen=True)
class Sample:
    """Numbers evenly spaced over one weight, with its path in the base model and its whole shape."""

    name: str
    shape: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class BaseModel:
    """Identity of the model that an adapter was trained on: its class, its commit on the Hub, and samples of its
    weights."""

    architecture: str
    revision: str | None
    samples: tuple[Sample, ...]

    @classmethod
    def of(cls, model: nn.Module) -> BaseModel:
        """Return the identity of a model in memory, with or without an adapter."""
        inner = unwrap(model)
        weights = {name: weight for name, weight in _weights(model).items() if weight.numel()}
        names = sorted(weights)
        chosen = [names[i * len(names) // TENSORS] for i in range(TENSORS)] if len(names) > TENSORS else names
        samples = tuple(Sample(name, tuple(weights[name].shape), _values(weights[name])) for name in chosen)
        return cls(type(inner).__name__, getattr(inner.config, "_commit_hash", None), samples)

    @classmethod
    def load(cls, directory: Path) -> BaseModel:
        """Read the identity from the directory of an adapter.

        Raises:
            CheckpointError: no such file or entry, or not what [`~BaseModel.save`] writes.
        """
        path = directory / BASE_FILE
        beside = None if path.is_file() else read_json(directory / "adapter_config.json").get(BASE_KEY)
        try:
            return decode(cls, read_json(path) if beside is None else beside, where=BASE_FILE)
        except PlanError as error:
            raise CheckpointError(
                f"{directory / BASE_FILE} is corrupt: {error}. Save the adapter again: save_adapter(model, path)"
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return plain

    def save(self, directory: Path) -> None:
        """Write the identity into the directory of an adapter."""
        (directory / BASE_FILE).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    def differs(self, model: nn.Module, trained: Container[str] = ()) -> str | None:
        """Return the difference between a model, with or without an adapter, and this one; `None` without one.

        Args:
            trained (`Container[str]`): names in the file of the adapter, whose weights need not be those of the base.
        """
        name = type(unwrap(model)).__name__
        if name != self.architecture:
            return f"it is a {name}, the adapter was trained on a {self.architecture}"
        weights = _weights(model)
        for sample in self.samples:
            weight = weights.get(sample.name)
            if weight is None or f"base_model.model.{sample.name}" in trained:  # quantised, or on another device
                continue
            if tuple(weight.shape) != sample.shape:
                return f"its {sample.name} has shape {tuple(weight.shape)}, not {sample.shape}"
            pairs = zip(_values(weight), sample.values, strict=True)
            if not all(math.isclose(a, b, rel_tol=ROUNDING, abs_tol=SMALLEST) for a, b in pairs):
                return f"its {sample.name} has other values"
        return None


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of the base by the path that they have without an adapter.

    Those that an adapter layer contains, that a patch replaces, that are quantized, or of which this process has a
    share only, are left out.
    """
    inner = unwrap(model)
    adapted = tuple(
        f"{path}." for path, module in inner.named_modules() if type(module).__module__.startswith("peft.")
    )
    replaced = {f"{path_without_adapter(path)}.weight" for path in position_tables(inner)}
    return {
        path: weight
        for path, weight in inner.named_parameters()
        if not path.startswith(adapted)
        and path not in replaced
        and weight.is_floating_point()
        # shards and quantized weights may be tensors of their own class, with few operations
        and type(weight.data) is torch.Tensor
        and not weight.is_meta
    }


def _values(weight: torch.Tensor) -> tuple[float, ...]:
    flat = weight.detach().flatten()
    count = min(VALUES, flat.numel())
    index = torch.tensor([i * flat.numel() // count for i in range(count)], device=flat.device)
    return tuple(flat[index].float().cpu().tolist())
