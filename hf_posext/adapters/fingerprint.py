"""Tells a base model from another of the same shape, without reading all of it twice.

A few numbers of a few weights that no adapter layer holds. They survive a change of dtype to within its rounding, and
a model that was trained further has others.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from ..decode import decode
from ..errors import CheckpointError, PlanError
from ..patching import unwrap
from ..patching.sites import path_without_adapter, position_tables
from ..patching.untrusted import read_json

BASE_FILE = "posext_base.json"
TENSORS = 16
VALUES = 8
ROUNDING = 2**-8  # bfloat16 keeps 8 bits: half a unit in the last place, once when written and once when read
SMALLEST = 1e-6  # below this float16 has no full precision


@dataclass(frozen=True)
class Sample:
    """Some numbers of one weight.

    Args:
        name (`str`): path of the weight in the base model.
        shape (`tuple[int, ...]`): of the whole weight.
        values (`tuple[float, ...]`): evenly spaced over it.
    """

    name: str
    shape: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class BaseModel:
    """What an adapter remembers of the model that it was trained on.

    Args:
        architecture (`str`): class of the model in transformers.
        revision (`str`, *optional*): commit on the Hub that it was loaded from.
        samples (`tuple[Sample, ...]`): numbers of its weights.
    """

    architecture: str
    revision: str | None
    samples: tuple[Sample, ...]

    @classmethod
    def of(cls, model: nn.Module) -> BaseModel:
        """Of a model in memory, with or without an adapter."""
        inner = unwrap(model)
        found = {name: weight for name, weight in _weights(model).items() if weight.numel()}
        names = sorted(found)
        chosen = [names[i * len(names) // TENSORS] for i in range(TENSORS)] if len(names) > TENSORS else names
        samples = tuple(Sample(name, tuple(found[name].shape), _values(found[name])) for name in chosen)
        return cls(type(inner).__name__, getattr(inner.config, "_commit_hash", None), samples)

    @classmethod
    def load(cls, directory: Path) -> BaseModel:
        """From the directory of an adapter.

        Raises:
            CheckpointError: no such file, or not what [`~BaseModel.save`] writes.
        """
        try:
            return decode(cls, read_json(directory / BASE_FILE), where=BASE_FILE)
        except PlanError as error:
            raise CheckpointError(
                f"{directory / BASE_FILE} is corrupt: {error}; save the adapter again: save_adapter(model, path)"
            ) from error

    def save(self, directory: Path) -> None:
        """Into the directory of an adapter."""
        (directory / BASE_FILE).write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")

    def differs(self, model: nn.Module) -> str | None:
        """What tells a model from the one remembered; `None` where nothing does."""
        name = type(unwrap(model)).__name__
        if name != self.architecture:
            return f"it is a {name}, the adapter was trained on a {self.architecture}"
        weights = _weights(model)
        for sample in self.samples:
            weight = weights.get(sample.name)
            if weight is None:  # in a quantised model, or on another device
                continue
            if tuple(weight.shape) != sample.shape:
                return f"its {sample.name} has shape {tuple(weight.shape)}, not {sample.shape}"
            pairs = zip(_values(weight), sample.values, strict=True)
            if not all(math.isclose(a, b, rel_tol=ROUNDING, abs_tol=SMALLEST) for a, b in pairs):
                return f"its {sample.name} has other values"
        return None


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of the base by the path that they have without an adapter, but those that an adapter layer holds or a
    patch replaces."""
    inner = unwrap(model)
    replaced = {f"{path_without_adapter(path)}.weight" for path in position_tables(inner)}
    found: dict[str, torch.Tensor] = {}
    for path, weight in inner.named_parameters():
        module, _, name = path.rpartition(".")
        path = f"{path_without_adapter(module)}.{name}".replace(".token_adapter.base_layer.", ".")
        adapted = any(word in path for word in (".base_layer.", "lora_", "trainable_tokens_"))
        if adapted or ".modules_to_save." in f"{module}.":
            continue
        if path not in replaced and weight.is_floating_point() and not weight.is_meta:
            found[path] = weight
    return found


def _values(weight: torch.Tensor) -> tuple[float, ...]:
    flat = weight.detach().flatten()
    count = min(VALUES, flat.numel())
    at = torch.tensor([i * flat.numel() // count for i in range(count)], device=flat.device)
    return tuple(flat[at].float().cpu().tolist())
