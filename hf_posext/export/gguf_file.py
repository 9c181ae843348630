"""Writes the positions of a plan into a GGUF file, and reads them back.

The package `gguf` of llama.cpp does both; this says what, not how.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..packages import require
from ..plan import ExtensionPlan
from .llama_cpp import LLAMA_LIKE, SERVER, WITH_FREQUENCIES, RopeKeys, rope_keys
from .serving import refuse

OURS = re.compile(r"context_length|rope\.freq_base|rope\.scale_linear|rope\.scaling\..*")
"""Metadata that is replaced; whatever else a file says of scaling would be added to the plan's."""

TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def write_gguf(plan: ExtensionPlan | str | Path, source: str | Path, path: str | Path) -> Path:
    """Copy a GGUF file and give it the positions of a plan.

    Args:
        plan (`ExtensionPlan`, `str` or `Path`): or the directory that holds it, such as that of an export.
        source (`str` or `Path`): made by llama.cpp's `convert_hf_to_gguf.py`; it may be quantised.
        path (`str` or `Path`): of the new file; must not exist.

    Returns:
        `Path`: the new file.

    Raises:
        ExportError: llama.cpp cannot compute the positions for this architecture.
        MissingExtraError: `gguf` is not installed.
        CheckpointError: `source` is not a GGUF file, is one of several parts, or is of a model of another shape.
        FileExistsError: `path` exists.
    """
    gguf = _library()
    plan = plan if isinstance(plan, ExtensionPlan) else ExtensionPlan.load(plan)
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another name, or remove it first")
    reader = _open(gguf, source)
    said = rope_keys(plan)
    arch = _check(reader, source, plan, said)
    try:
        _copy(gguf, reader, arch, said, path)
    except BaseException:
        path.unlink(missing_ok=True)  # half a file would be taken for a whole one
        raise
    return path


def read_gguf(path: str | Path) -> RopeKeys:
    """What a GGUF file says of positions.

    Args:
        path (`str` or `Path`): of the file.

    Raises:
        CheckpointError: not a GGUF file.
        MissingExtraError: `gguf` is not installed.
    """
    reader = _open(_library(), path)
    arch = f"{_value(reader, 'general.architecture')}."
    named = {name.removeprefix(arch): field for name, field in reader.fields.items()}
    keys = {name: field.contents() for name, field in named.items() if OURS.fullmatch(name)}
    tensors = {tensor.name: tuple(tensor.data.tolist()) for tensor in reader.tensors if tensor.name in TENSORS}
    return RopeKeys(keys, tensors)


def _copy(gguf: Any, reader: Any, arch: str, said: RopeKeys, path: Path) -> None:
    """All of a file but what it says of positions, and that of a plan instead."""
    writer = gguf.GGUFWriter(path, arch, endianess=reader.endianess)
    for field in reader.fields.values():
        written = field.name == "general.architecture" or field.name.startswith("GGUF.")
        if written or OURS.fullmatch(field.name.removeprefix(f"{arch}.")):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    for key, value in said.keys.items():
        types = {str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
        writer.add_key_value(f"{arch}.{key}", value, types[type(value)])
    for name, numbers in said.tensors.items():
        writer.add_tensor(name, np.array(numbers, dtype=np.float32))
    for tensor in reader.tensors:
        if tensor.name not in TENSORS:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _library() -> Any:
    require("gguf")
    import gguf

    return gguf


def _open(gguf: Any, path: str | Path) -> Any:
    try:
        return gguf.GGUFReader(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, IndexError, MemoryError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a GGUF file: {error}") from error


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _check(reader: Any, source: str | Path, plan: ExtensionPlan, said: RopeKeys) -> str:
    """The architecture of a file that a plan fits."""
    arch = _value(reader, "general.architecture")
    if not isinstance(arch, str):
        raise CheckpointError(f"{source} does not name its architecture")
    if (_value(reader, "split.count") or 0) > 1:
        raise CheckpointError(f"{source} is one of several parts; join them first: llama-gguf-split --merge")
    known = LLAMA_LIKE if len(said.tensors) > 1 else WITH_FREQUENCIES
    if said.tensors and arch not in known:
        reason = f"of the architecture {arch!r} it loads no tensor of frequencies (of {', '.join(known)} it does)"
        raise refuse(SERVER, plan, reason, "yarn, linear, ntk and theta can be exported to any")
    for entry in plan.rotaries:
        held, width = _value(reader, f"{arch}.rope.dimension_count"), plan.scheme.rotary(entry.name).dim
        if held is not None and held != width:
            raise CheckpointError(
                f"{source} rotates {held} channels of a head, the plan is for {width}; convert the exported model"
            )
    return arch
