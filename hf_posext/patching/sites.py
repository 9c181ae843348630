"""Modules of a model that hold positions other than rotary ones: tables, sinusoids, relative biases, ALiBi."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..scheme import Buckets, Table
from .position_zero import row_of_position_zero

TABLE_NAMES = ("wpe", "position_embeddings", "embed_positions", "position_embedding", "positions_embed")
"""Names of a learned table of positions in the modeling files of transformers."""

LENGTH_FIELDS = (
    "max_position_embeddings",
    "max_encoder_position_embeddings",
    "max_decoder_position_embeddings",
    "max_target_positions",
    "n_positions",
    "max_seq_len",
    "seq_length",
)
"""Names of the longest input in configs, most common first."""

OBSTACLES = {
    "reformer": ("learned", "its table is a sum of two (axial positions), which fixes the length"),
    "cpmant": ("relative", "it sorts distances of segments into buckets of its own"),
    "xlnet": ("relative", "its attention is relative to sinusoids (Transformer-XL)"),
    "inkling_text": ("relative", "its distances are logits of their own, not buckets"),
    "inkling2_text": ("relative", "its distances are logits of their own, not buckets"),
    "fsmt": ("sinusoidal", "its sines are made anew when the input is longer"),
    "ctrl": ("sinusoidal", "its sines are made inside the model"),
    "pegasus_x": ("sinusoidal", "its sines are made anew in every forward"),
}
"""Families that no structure below tells: their kind, and why they cannot be changed."""

_ADAPTER_COPY = re.compile(r"\.(original_module|modules_to_save\.[^.]+)$")
"""End of the path of a module of which an adapter of PEFT trains a copy (`modules_to_save`)."""

_BUCKET_FUNCTIONS = ("_relative_position_bucket", "relative_position_bucket")


def text_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """All modules with their paths, except for those of the image or audio part of a model."""
    foreign = {id(part) for part in _parts(model)} - {id(config) for config in text_configs(model)}
    outside: list[str] = []
    for path, module in model.named_modules():
        if id(getattr(module, "config", None)) in foreign:
            outside.append(f"{path}.")
        if not f"{path}.".startswith(tuple(outside)):
            yield path, module


def text_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs that say how long a text may be: of the model, of its text part, and of the text encoder of an
    `EncoderDecoderModel`."""
    configs = [model.config, model.config.get_text_config(decoder=True)]
    encoder = getattr(model, "encoder", None)
    if isinstance(encoder, PreTrainedModel) and encoder.main_input_name == "input_ids":
        configs += [part for part in _parts(model) if part is encoder.config]
    return list({id(config): config for config in configs}.values())


def _parts(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs of the parts of a multimodal or encoder-decoder model."""
    parts = (getattr(model.config, name, None) for name in model.config.sub_configs or {})
    return [part for part in parts if part is not None]


def position_tables(model: PreTrainedModel) -> dict[str, nn.Embedding]:
    """The learned tables of positions by path: none, one, or one of the encoder and one of the decoder; and the copies
    of them that adapters train."""
    return {
        path: module
        for path, module in text_modules(model)
        if isinstance(module, nn.Embedding)
        and path_without_adapter(path).rsplit(".", 1)[-1] in TABLE_NAMES
        and "Sinusoidal" not in type(module).__name__
    }


def path_without_adapter(path: str) -> str:
    """The path that a module has where no adapter trains a copy of it."""
    return _ADAPTER_COPY.sub("", path)


def first_row(model: PreTrainedModel, path: str, table: nn.Embedding) -> int | None:
    """The row of position 0 in a table: as the model reads it, else as the names of attributes say.

    BART and OPT keep an `offset`, and RoBERTa counts from behind the padding row. What names say is believed only
    where the config then gives a length that the table has; `None` otherwise.
    """
    asked = row_of_position_zero(model, path)
    if asked is not None:
        return asked
    named: Any = getattr(table, "offset", None)
    if not isinstance(named, int):
        named = 0 if table.padding_idx is None else table.padding_idx + 1
    config: Any = model.config.get_text_config(decoder=True)
    limits = {limit for name in LENGTH_FIELDS if isinstance(limit := getattr(config, name, None), int)}
    return named if not limits or limits & {table.num_embeddings, table.num_embeddings - named} else None


def sinusoids(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules that keep sines of positions by path: embeddings that are not trained, or a table that grows."""
    return {path: module for path, module in text_modules(model) if "Sinusoidal" in type(module).__name__}


def bucket_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules that hold a learned bias for each bucket of relative distances, by path."""
    return {
        path: module
        for path, module in text_modules(model)
        if any(name.endswith("relative_attention_bias") for name in module._modules)
    }


def bucket_function(module: nn.Module) -> str | None:
    """The name of the method by which a module sorts distances into buckets; `None` where it has none."""
    return next((name for name in _BUCKET_FUNCTIONS if hasattr(module, name)), None)


def read_table(model: PreTrainedModel) -> tuple[Table | None, str | None]:
    """Size of the learned tables, and why they cannot be stretched where that is so."""
    tables = position_tables(model)
    shapes = {path: tuple(module.weight.shape) for path, module in tables.items()}
    if len(set(shapes.values())) > 1:
        texts = " and ".join(f"{path} of {rows} x {width}" for path, (rows, width) in shapes.items())
        return None, f"its tables of positions have different sizes ({texts}), and a plan has one"
    offsets = {path: first_row(model, path, module) for path, module in tables.items()}
    if len(set(offsets.values())) > 1:
        return None, f"its tables of positions count from different rows ({offsets})"
    (offset,) = set(offsets.values())
    rows, width = next(iter(shapes.values()))
    if offset is None:
        return None, f"its table has {rows} rows, and which of them position 0 reads could not be asked from the model"
    return Table(rows, offset, width), None


def read_buckets(model: PreTrainedModel) -> tuple[Buckets | None, str | None]:
    """Count and reach of the buckets, and why they cannot be changed where that is so."""
    found = set()
    for path, module in bucket_modules(model).items():
        name = bucket_function(module)
        if name is None:
            return None, f"{path} sorts distances of more than one kind into buckets"
        bias: Any = next(part for key, part in module._modules.items() if key.endswith("relative_attention_bias"))
        reach = getattr(module, "relative_attention_max_distance", None)
        if reach is None:
            reach = inspect.signature(getattr(type(module), name)).parameters["max_distance"].default
        found.add(Buckets(bias.num_embeddings, reach))
    return (None, "its layers have different buckets") if len(found) > 1 else (next(iter(found)), None)


def has_alibi(model: PreTrainedModel) -> bool:
    """Return whether ALiBi biases attention: always in BLOOM and MPT, by an option in Falcon."""
    config = model.config.get_text_config(decoder=True)
    return config.model_type in ("bloom", "mpt") or bool(getattr(config, "alibi", False))


def alibi_slopes(model: PreTrainedModel) -> tuple[float, ...]:
    """The slope of each head, as the modeling file computes its biases: from position 0 to position 1."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    file = sys.modules[type(model).__module__]
    build: Callable[..., torch.Tensor] | None = getattr(file, "build_mpt_alibi_tensor", None)
    with torch.device("cpu"):
        if build is not None:
            biases = build(heads, 2)
        else:
            biases = file.build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), heads, torch.float32)
    slopes = biases.reshape(heads, 2).float().diff(dim=1).flatten()
    return tuple(slopes.tolist())
