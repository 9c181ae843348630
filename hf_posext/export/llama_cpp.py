"""GGUF files of llama.cpp: keys and tensors, and copies of a file with the positions of a plan.

Read from llama.cpp 0c1e57098 as vendored by llama-cpp-python 0.3.36: `src/llama-{model,context,arch}.cpp`,
`src/models/*.cpp`, `ggml/src/ggml-cpu/ops.cpp`, `common/arg.cpp`, `conversion/{base,llama}.py`,
`tools/{server,completion}/*.cpp`. The package `gguf` of llama.cpp reads and writes the files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, ExportError
from ..packages import require
from ..patching.untrusted import DIVISORS, open_gguf
from ..plan import ExtensionPlan, RotaryPlan
from ..scheme import Rotary

SERVER = "llama.cpp"
READ_FROM = "llama.cpp 0c1e57098"

LLAMA_LIKE = (
    "llama apertus deci granite granitemoe granite_swa minicpm mistral3 pangu-embedded refact step35"  # load two lists
).split()
WITH_FREQUENCIES = [
    *LLAMA_LIKE,
    *"arcee exaone exaone4 exaone-moe falcon-h1 granitehybrid llada llama4 nanbeige".split(),
]
"""Architectures, by their names in GGUF, that load a divisor for each frequency.

llama.cpp refuses a file of any other architecture that contains the tensor.
"""

BETA_FAST, BETA_SLOW = 32.0, 1.0
"""Bounds of YaRN that llama.cpp uses unless flags give others."""


def refuse(server: str, plan: ExtensionPlan, reason: str, instead: str = "") -> ExportError:
    """Return the error for a plan whose positions a server cannot compute."""
    what = instead or "a plan that only changes frequencies (yarn, ntk, theta, ...) can be exported"
    if any(entry.growth for entry in plan.rotaries):
        what += "; the rope type 'dynamic' of servers is another thing, a base that is fixed when they start"
    return ExportError(f"{server} cannot run ({plan.describe()}): {reason}; {what}")


@dataclass(frozen=True)
class RopeKeys:
    """Positions in the form of a GGUF file: metadata without the prefix of the architecture, tensors, and flags.

    The tensors contain divisors of the frequencies. `by_converter` is true if llama.cpp's `convert_hf_to_gguf.py`
    writes the same from the exported config.
    """

    keys: Mapping[str, Any]
    tensors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    by_converter: bool = True

    @property
    def architectures(self) -> Sequence[str]:
        """Architectures, by their names in GGUF, that load the tensors."""
        return LLAMA_LIKE if len(self.tensors) > 1 else WITH_FREQUENCIES


def rope_keys(plan: ExtensionPlan) -> RopeKeys:
    """Return the keys and tensors with which llama.cpp gives every token the positions of a plan."""
    limit = {"context_length": plan.target_length}
    if not plan.rotaries:
        return RopeKeys(limit)
    if len(plan.rotaries) > 1:
        raise refuse(SERVER, plan, "a GGUF file says one set of frequencies, the plan changes several")
    entry = plan.rotaries[0]
    rotary = plan.scheme.rotary(entry.name)
    if rotary.dim != 2 * rotary.pairs or rotary.pairs != rotary.slots:
        raise refuse(SERVER, plan, "frequencies that are padded with zeros have another form there")
    parameters = dict(entry.rope_parameters or {})
    kind, base = parameters.get("rope_type"), {"rope.freq_base": float(rotary.theta)}
    if kind == "default" and entry.attention_factor == 1.0:
        return RopeKeys(limit | {"rope.freq_base": float(parameters["rope_theta"])})
    if kind == "linear" and entry.attention_factor == 1.0:
        scale = {"rope.scaling.type": "linear", "rope.scaling.factor": float(parameters["factor"])}
        return RopeKeys(limit | base | scale)
    if kind == "yarn" and parameters.get("truncate", True):
        return _yarn(plan, entry, parameters, limit | base)
    return _divisors(plan, entry, rotary, limit | base)


def _yarn(plan: ExtensionPlan, entry: RotaryPlan, parameters: Mapping[str, Any], keys: dict[str, Any]) -> RopeKeys:
    factor = float(parameters["factor"])
    keys |= {"rope.scaling.type": "yarn", "rope.scaling.factor": factor}
    keys["rope.scaling.original_context_length"] = int(parameters["original_max_position_embeddings"])
    mscale = 0.1 * math.log(factor) + 1.0  # llama.cpp always multiplies by this, and ignores yarn_attn_factor
    usual = math.isclose(entry.attention_factor, mscale, rel_tol=1e-6)
    if not usual:
        keys["rope.scaling.attn_factor"] = entry.attention_factor / mscale
    bounds = ("--yarn-beta-fast", "beta_fast", BETA_FAST), ("--yarn-beta-slow", "beta_slow", BETA_SLOW)
    flags = [
        (flag, f"{parameters[name]:g}") for flag, name, default in bounds if parameters.get(name, default) != default
    ]
    return RopeKeys(keys, flags=tuple(word for pair in flags for word in pair), by_converter=usual)


def _divisors(plan: ExtensionPlan, entry: RotaryPlan, rotary: Rotary, keys: dict[str, Any]) -> RopeKeys:
    """Return the keys and tensors of arbitrary frequencies: those of the base, each with its own divisor."""
    if entry.attention_factor != 1.0:
        keys["rope.scaling.attn_factor"] = entry.attention_factor

    def divisors(inv_freq: tuple[float, ...]) -> tuple[float, ...]:
        shipped = [rotary.theta ** (-2 * i / rotary.dim) for i in range(rotary.pairs)]
        # a pair that does not rotate: an angle divided by 1e30 has a cosine of exactly 1 in float32
        return tuple(old / new if new else 1e30 for old, new in zip(shipped, inv_freq, strict=True))

    if entry.short_inv_freq is None:
        return RopeKeys(keys, {"rope_freqs.weight": divisors(entry.inv_freq)}, by_converter=False)
    keys |= {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": plan.trained_length}
    lists = {
        "rope_factors_long.weight": divisors(entry.inv_freq),
        "rope_factors_short.weight": divisors(entry.short_inv_freq),
    }
    return RopeKeys(keys, lists, by_converter=False)


OURS = re.compile(r"context_length|rope\.freq_base|rope\.scale_linear|rope\.scaling\..*")
"""Metadata to replace. Any other scaling in a file would add to that of the plan."""


def write_gguf(plan: ExtensionPlan | str | Path, source: str | Path, path: str | Path) -> Path:
    """Copy a GGUF file and give it the positions of a plan.

    Args:
        plan (`ExtensionPlan`, `str` or `Path`): the plan, or the directory that contains it, such as an export.
        source (`str` or `Path`): file made by llama.cpp's `convert_hf_to_gguf.py`. It may be quantized.
        path (`str` or `Path`): new file, which must not exist.

    Returns:
        `Path`: the new file.

    Raises:
        ExportError: llama.cpp cannot compute the positions for this architecture.
        MissingExtraError: `gguf` is not installed.
        CheckpointError: `source` is not a GGUF file, is one of several parts, or contains a model of another shape.
        FileExistsError: `path` exists.
    """
    require("gguf")
    plan = plan if isinstance(plan, ExtensionPlan) else ExtensionPlan.load(plan)
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists. Choose another name, or remove it first.")
    reader, arch = open_gguf(source)
    rope = rope_keys(plan)
    _check(reader, arch, source, plan, rope)
    try:
        _copy(reader, arch, rope, path)
    except BaseException:
        path.unlink(missing_ok=True)  # an incomplete file would pass for a complete one
        raise
    return path


def read_gguf(path: str | Path) -> RopeKeys:
    """Read the positions of a GGUF file.

    Args:
        path (`str` or `Path`): the file.

    Returns:
        [`RopeKeys`]: the keys and tensors. Its `flags` and `by_converter` have their defaults.

    Raises:
        CheckpointError: the file is not a GGUF file.
        MissingExtraError: `gguf` is not installed.
    """
    reader, arch = open_gguf(path)
    named = {name.removeprefix(f"{arch}."): field for name, field in reader.fields.items()}
    keys = {name: field.contents() for name, field in named.items() if OURS.fullmatch(name)}
    tensors = {tensor.name: tuple(tensor.data.tolist()) for tensor in reader.tensors if tensor.name in DIVISORS}
    return RopeKeys(keys, tensors)


def _copy(reader: Any, arch: str, rope: RopeKeys, path: Path) -> None:
    """Write a copy of a file, with the positions of a plan in place of its own."""
    import gguf

    writer = gguf.GGUFWriter(path, arch, endianess=reader.endianess)
    for entry in reader.fields.values():
        written = entry.name == "general.architecture" or entry.name.startswith("GGUF.")
        if written or OURS.fullmatch(entry.name.removeprefix(f"{arch}.")):
            continue
        kind = entry.types[0]
        inner = entry.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(entry.name, entry.contents(), kind, sub_type=inner)
    for key, value in rope.keys.items():
        types = {str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
        writer.add_key_value(f"{arch}.{key}", value, types[type(value)])
    for name, numbers in rope.tensors.items():
        writer.add_tensor(name, np.array(numbers, dtype=np.float32))
    for tensor in reader.tensors:
        if tensor.name not in DIVISORS:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check(reader: Any, arch: str, source: str | Path, plan: ExtensionPlan, rope: RopeKeys) -> None:
    """Refuse a file that does not fit a plan."""

    def value(key: str) -> Any:
        entry = reader.get_field(key)
        return None if entry is None else entry.contents()

    if (value("split.count") or 0) > 1:
        raise CheckpointError(
            f"Expected a whole GGUF file, got one of several parts, {source}. Join them by llama-gguf-split --merge."
        )
    if rope.tensors and arch not in rope.architectures:
        others = ", ".join(rope.architectures)
        reason = f"of the architecture {arch!r} it loads no tensor of frequencies (of {others} it does)"
        raise refuse(SERVER, plan, reason, "yarn, linear, ntk and theta can be exported to any")
    for entry in plan.rotaries:
        channels, width = value(f"{arch}.rope.dimension_count"), plan.scheme.rotary(entry.name).dim
        if channels is not None and channels != width:
            raise CheckpointError(
                f"Expected a model that rotates {width} channels of a head, as the plan does, got {channels} in "
                f"{source}. Convert the exported model."
            )
