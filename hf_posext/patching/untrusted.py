"""Looks at a directory that somebody else wrote before anything in it is opened.

What is opened afterwards is safetensors and JSON. Pickles are never read, and remote code is never run: transformers
does so only with `trust_remote_code=True`, which this package does not pass.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..decode import short
from ..errors import CheckpointError

MAX_JSON_BYTES = 16 * 2**20
"""Of a config or an index of shards; the index of a model of a thousand billion parameters has a tenth of that."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.h5", "*.msgpack")


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object from a file of somebody else's.

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
    """Refuse a directory of weights that only pickle would open, or whose index names files outside of it.

    Args:
        directory (`str` or `Path`): the directory.
        weights (`str`, *optional*): pattern of the files that hold the weights.

    Raises:
        CheckpointError: says which file, and why.
    """
    path = Path(directory)
    if not path.is_dir():
        raise CheckpointError(f"no such directory: {directory}")
    check_shards(path)
    if not any(path.glob(weights)):
        pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
        held = f"only {', '.join(pickles)}, which could execute code when opened" if pickles else "no weights"
        raise CheckpointError(f"{directory} holds {held}; save the weights as safetensors ({weights})")


def check_shards(path: Path) -> None:
    """Refuse a directory whose configs are not JSON, or whose index names files outside of it.

    Args:
        path (`Path`): the directory.

    Raises:
        CheckpointError: says which file, and why.
    """
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
