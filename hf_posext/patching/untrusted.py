"""Checks of untrusted files before anything in them is opened.

What is opened afterwards is safetensors, JSON and GGUF. Pickles are never read, and remote code runs only where the
user passes `trust_remote_code=True`. The header of a GGUF file states more about positions and vocabulary than
transformers reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from ..decode import short
from ..errors import CheckpointError
from ..packages import require

MAX_JSON_BYTES = 16 * 2**20
"""Of a config or an index of shards; the index of a model of a thousand billion parameters has a tenth of that."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.h5", "*.msgpack")


def read_json(path: Path) -> Mapping[str, Any]:
    """Return the JSON object in a file.

    Raises:
        CheckpointError: no such file, too large, not JSON, nested without end, or no object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}; it is incomplete: copy all files of the directory")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; at most {MAX_JSON_BYTES} are read of JSON")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{path} holds {short(data)}; a JSON object belongs there")
    return data


def check_directory(directory: str | Path, weights: str = "model*.safetensors") -> None:
    """Refuse a directory without weights that match a pattern, or whose index names files outside of it.

    Raises:
        CheckpointError: states which file, and why.
    """
    path = Path(directory)
    if not path.is_dir():
        raise CheckpointError(f"no such directory: {directory}")
    check_shards(path)
    if not any(path.glob(weights)):
        pickles = pickles_of(path)
        held = f"only {', '.join(pickles)}, which could execute code when opened" if pickles else "no weights"
        raise CheckpointError(f"{directory} contains {held}. Save the weights as safetensors ({weights}).")


def pickles_of(path: Path) -> list[str]:
    """Return the names of the files in a directory that only pickle-based loaders open."""
    return sorted(file.name for pattern in PICKLES for file in path.glob(pattern))


def check_shards(path: Path) -> None:
    """Refuse a directory whose configs are not JSON, or whose index names files outside of it."""
    for name in ("config.json", "generation_config.json", "adapter_config.json"):
        if (path / name).exists():
            read_json(path / name)
    for index in path.glob("*.index.json"):
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, Mapping):
            raise CheckpointError(f"{index} has no weight_map; it does not tell where the weights are")
        for name in shards.values():
            if not isinstance(name, str) or Path(name).name != name or "\\" in name:
                raise CheckpointError(f"{index} names the file {short(name)}, which is outside of the directory")


DIVISORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that divide the frequencies of the rotary embedding, pair by pair."""


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata of a GGUF file."""

    path: Path
    scaling: Mapping[str, Any]  # the keys under `rope.scaling` and `rope.scale_linear`, without the architecture
    divisors: Mapping[str, np.ndarray]  # tensors of `DIVISORS`, each of shape `(pairs,)`
    types: tuple[str, ...]  # names of the types that tensors are stored in, the commonest first
    has_vocabulary: bool

    @classmethod
    def read(cls, path: str | Path) -> GGUFHeader:
        """Read the header of a file; weights stay on disk.

        Raises:
            CheckpointError: the file is not GGUF.
            MissingExtraError: the package gguf is not installed.
        """
        path = Path(path)
        return _read(path, path.stat().st_mtime_ns if path.exists() else 0)

    def check_vocabulary(self, name: str) -> None:
        """Refuse a file without a tokenizer; `name` is for the message."""
        if not self.has_vocabulary:
            raise CheckpointError(f"{name} contains no vocabulary. Convert the model together with its tokenizer.")

    def correct_positions(self, config: PreTrainedConfig, name: str) -> None:
        """Write the scaling of positions into a config that transformers read from this file without it.

        The divisors of Llama 3 are turned back into the parameters that produced them.

        Raises:
            CheckpointError: any other scaling, of which transformers would compute other positions.
        """
        rope = dict(getattr(config, "rope_parameters", None) or {})
        kind = self.scaling.get("rope.scaling.type", "linear")
        factor = self.scaling.get("rope.scaling.factor", self.scaling.get("rope.scale_linear", 1.0))
        stated = kind != "none" and not (kind == "linear" and factor in (0.0, 1.0))  # 0 is llama.cpp's "not given"
        if rope.get("rope_type", "default") != "default" or not (stated or self.divisors):
            return
        if not stated and set(self.divisors) == {"rope_freqs.weight"} and "rope_theta" in rope:
            divisors = self.divisors["rope_freqs.weight"]
            if np.all(divisors == 1.0):
                return
            llama3 = llama3_of(divisors, rope["rope_theta"])
            if llama3 is not None:
                config.rope_parameters = {**rope, **llama3}
                return
        what = f"rope scaling {kind!r}" if stated else ", ".join(sorted(self.divisors))
        raise CheckpointError(
            f"{name} scales its positions ({what}), and transformers reads GGUF files without that. Pass the "
            "safetensors checkpoint that the file was made from."
        )


def llama3_of(divisors: np.ndarray, theta: float) -> dict[str, Any] | None:
    """Return Llama 3's parameters that give these divisors (pairs,) of frequencies to a base; `None` if none do."""
    divisors = np.asarray(divisors, dtype=np.float64)
    wavelengths = 2 * math.pi * theta ** (np.arange(len(divisors)) / len(divisors))
    factor = float(divisors.max())
    # Between both ends, 1/divisor mixes 1/factor and 1 by a share that is linear in 1/wavelength:
    # share = (length/wavelength - low)/(high - low). A line through the shares gives all three, up to a common scale.
    between = (divisors > 1 + 1e-4) & (divisors < factor * (1 - 1e-4))
    if between.sum() < 2:
        return None
    share = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)
    slope, constant = np.polyfit(1 / wavelengths[between], share, 1)
    low = 1.0  # as all published checkpoints have it; scaling all three changes no frequency
    high = low - low / constant
    length = slope * (high - low)
    mixed = np.clip((length / wavelengths - low) / (high - low), 0, 1)
    if not np.allclose(1 / ((1 - mixed) / factor + mixed), divisors, rtol=1e-4):
        return None
    return {
        "rope_type": "llama3",
        "factor": round(factor, 4),
        "low_freq_factor": low,
        "high_freq_factor": round(float(high), 3),
        "original_max_position_embeddings": round(length),
    }


def open_gguf(path: str | Path) -> tuple[Any, str]:
    """Open a GGUF file by the package `gguf`.

    Returns:
        `tuple`: the reader, and the architecture of the model.

    Raises:
        CheckpointError: the file is not GGUF, or does not name its architecture.
        MissingExtraError: the package gguf is not installed.
    """
    require("gguf")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        arch = reader.fields["general.architecture"].contents()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, IndexError, MemoryError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a GGUF file: {error}") from error
    if not isinstance(arch, str):
        raise CheckpointError(f"{path} does not name its architecture")
    return reader, arch


@lru_cache(maxsize=4)
def _read(path: Path, written: int) -> GGUFHeader:
    """Read a header once: a vocabulary of 100,000 tokens takes seconds."""
    reader, arch = open_gguf(path)
    arch += "."
    scaling = {
        name.removeprefix(arch): field.contents()
        for name, field in reader.fields.items()
        if name.removeprefix(arch).startswith(("rope.scaling.", "rope.scale_linear"))
    }
    divisors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors if tensor.name in DIVISORS}
    kinds = [tensor.tensor_type.name for tensor in reader.tensors for _ in range(int(tensor.n_bytes) >> 10)]
    types = tuple(sorted(set(kinds), key=lambda kind: -kinds.count(kind)))
    return GGUFHeader(path, scaling, divisors, types, "tokenizer.ggml.tokens" in reader.fields)
