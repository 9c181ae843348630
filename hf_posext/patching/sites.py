"""Modules with positions other than rotary ones: tables, sinusoids, relative biases, ALiBi.

The row of a learned table that position 0 reads is asked from the model, which runs up to that table. Families count
rows from 0, from 2 (OPT, BART, and Nystromformer by a buffer), or from behind the padding row (RoBERTa), and no
attribute says so in all of them.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModelError
from ..scheme import Buckets, Table
from .modes import evaluation_mode
from .remap.layout import skeleton_of
from .undo import source_file

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
    **dict.fromkeys(
        ("codegen", "gptj", "roformer"), ("rotary", "it rotates by a table of sines instead of by frequencies")
    ),
    "reformer": ("learned", "its table is a sum of two (axial positions), which fixes the length"),
    "cpmant": ("relative", "it sorts distances of segments into buckets of its own"),
    "xlnet": ("relative", "its attention is relative to sinusoids (Transformer-XL)"),
    "inkling_text": ("relative", "its distances are logits of their own, not buckets"),
    "inkling2_text": ("relative", "its distances are logits of their own, not buckets"),
    "fsmt": ("sinusoidal", "its sines are made anew when the input is longer"),
    "ctrl": ("sinusoidal", "its sines are made inside the model"),
    "pegasus_x": ("sinusoidal", "its sines are made anew in every forward"),
}
"""Families that the functions below do not recognize: their kind, and why they cannot be changed."""

_ADAPTER_COPY = re.compile(r"\.(original_module|modules_to_save\.[^.]+)$")
"""End of the path of a module of which an adapter of PEFT trains a copy (`modules_to_save`)."""

_BIAS = "relative_attention_bias"
_BUCKET_FUNCTIONS = ("_relative_position_bucket", "relative_position_bucket")


def text_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules with their paths, except for the image and audio parts of a model."""
    foreign = {id(part) for part in _parts(model)} - {id(config) for config in text_configs(model)}
    outside: list[str] = []
    for path, module in model.named_modules():
        if id(getattr(module, "config", None)) in foreign:
            outside.append(f"{path}.")
        if not f"{path}.".startswith(tuple(outside)):
            yield path, module


def text_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Return the configs that limit a text: of the model, its text part, and the text encoder of an
    `EncoderDecoderModel`."""
    configs = [model.config, model.config.get_text_config(decoder=True)]
    encoder = getattr(model, "encoder", None)
    if isinstance(encoder, PreTrainedModel) and encoder.main_input_name == "input_ids":
        configs += [part for part in _parts(model) if part is encoder.config]
    return list({id(config): config for config in configs}.values())


def _parts(model: PreTrainedModel) -> list[PreTrainedConfig]:
    parts = (getattr(model.config, name, None) for name in model.config.sub_configs or {})
    return [part for part in parts if part is not None]


def position_tables(model: PreTrainedModel) -> dict[str, nn.Embedding]:
    """Return the learned tables of positions by path, of encoder and decoder, and the copies of them that adapters
    train."""
    return {
        path: module
        for path, module in text_modules(model)
        if isinstance(module, nn.Embedding)
        and path_without_adapter(path).rsplit(".", 1)[-1] in TABLE_NAMES
        and "Sinusoidal" not in type(module).__name__
    }


def path_without_adapter(path: str) -> str:
    """Return the path of a module without the copies of an adapter."""
    return _ADAPTER_COPY.sub("", path)


def first_row(model: PreTrainedModel, path: str, table: nn.Embedding) -> int | None:
    """Return the row of position 0 in a table, as the model reads it, otherwise by attribute names.

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
    """Return the modules that keep sines of positions by path: untrained embeddings, or tables that grow."""
    return {path: module for path, module in text_modules(model) if "Sinusoidal" in type(module).__name__}


def bucket_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the modules by path that hold a learned bias for each bucket of relative distances."""
    return {
        path: module for path, module in text_modules(model) if any(name.endswith(_BIAS) for name in module._modules)
    }


def bucket_function(module: nn.Module) -> str | None:
    """Return the name of the method by which a module sorts distances into buckets."""
    return next((name for name in _BUCKET_FUNCTIONS if hasattr(module, name)), None)


def bias_table(module: nn.Module) -> nn.Embedding:
    """Return the learned bias of each bucket and head."""
    table: Any = next(part for name, part in module._modules.items() if name.endswith(_BIAS))
    embedding: nn.Embedding = table
    return embedding


def read_table(model: PreTrainedModel) -> tuple[Table | None, str | None]:
    """Return the size of the learned tables, or why they cannot be stretched."""
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
    """Return the count and reach of the buckets, or why they cannot be changed."""
    kinds = set()
    for path, module in bucket_modules(model).items():
        name = bucket_function(module)
        if name is None:
            return None, f"{path} sorts distances of more than one kind into buckets"
        reach = getattr(module, "relative_attention_max_distance", None)
        if reach is None:
            reach = inspect.signature(getattr(type(module), name)).parameters["max_distance"].default
        kinds.add(Buckets(bias_table(module).num_embeddings, reach))
    return (None, "its layers have different buckets") if len(kinds) > 1 else (next(iter(kinds)), None)


def makes_windows(module: nn.Module) -> bool:
    """Return whether the file of a module's model makes masks for a window.

    Some layers ask their attention for a window, for kernels that take no mask, and have none in their masks (OLMoE).
    """
    names = vars(source_file(type(module)))
    return any(re.fullmatch("create_.*(sliding_window|chunked).*_mask", name) for name in names)


def has_alibi(model: PreTrainedModel) -> bool:
    """Return whether ALiBi biases attention: always in BLOOM and MPT, by an option in Falcon."""
    config = model.config.get_text_config(decoder=True)
    return config.model_type in ("bloom", "mpt") or bool(getattr(config, "alibi", False))


def alibi_slopes(model: PreTrainedModel) -> tuple[float, ...]:
    """Return the slope of each head, as the modeling file computes its biases from position 0 to position 1."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    file = source_file(type(model))
    build: Callable[..., torch.Tensor] | None = getattr(file, "build_mpt_alibi_tensor", None)
    with torch.device("cpu"):
        if build is not None:
            biases = build(heads, 2)
        else:
            biases = file.build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), heads, torch.float32)
    slopes = biases.reshape(heads, 2).float().diff(dim=1).flatten()
    return tuple(slopes.tolist())


def probe_text(model: PreTrainedModel, count: int = 16) -> torch.Tensor:
    """Return token ids of shape `(1, count)`, none of them the padding token.

    They are on the CPU where the model has no device: accelerate's hooks move them if it is offloaded.
    """
    config = model.config.get_text_config(decoder=True)
    ids = torch.arange(3, 3 + 2 * count, device="cpu") % getattr(config, "vocab_size", 2**15)
    ids = ids[ids != (-1 if getattr(config, "pad_token_id", None) is None else config.pad_token_id)][:count]
    return ids[None] if model.device.type == "meta" else ids[None].to(model.device)


def logits_of_probe(model: PreTrainedModel) -> torch.Tensor:
    """Return the first output for a short text, by the path that users run."""
    with evaluation_mode(model), torch.no_grad():
        out: torch.Tensor = model(input_ids=probe_text(model), use_cache=False)[0]
    return out


class _Reached(Exception):
    """Signal that the table was read and the forward can end."""


class _Lookup(TorchFunctionMode):
    """Recorder of the rows read from a table, which ends the forward there.

    With hooks of accelerate the forward has to go on: they take the weights that they brought away at its end.
    """

    def __init__(self, table: nn.Embedding, goes_on: bool) -> None:
        super().__init__()
        self.table = table
        self.goes_on = goes_on
        self.rows: list[torch.Tensor] = []  # of each lookup

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.embedding:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if weight is self.table.weight:
                self.rows.append(args[0] if args else kwargs["input"])
                if not self.goes_on:
                    raise _Reached
        return func(*args, **kwargs)


class _Weightless(TorchFunctionMode):
    """Context in which models are built with weights on the meta device, and with real masks and index buffers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        floating = getattr(kwargs.get("dtype") or torch.get_default_dtype(), "is_floating_point", False)  # not `bool`
        if func in (torch.empty, torch.rand, torch.randn) and kwargs.get("device") is None and floating:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def weightless_twin(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the same class and config, with real buffers and without weights."""
    with _Weightless():
        return type(model)(copy.deepcopy(model.config))


def row_of_position_zero(model: PreTrainedModel, path: str) -> int | None:
    """Return the row that position 0 reads in the table at a path; `None` where the model cannot be asked.

    On the meta device a twin of the model with real index buffers is asked.
    """
    if model.get_submodule(path).weight.is_meta and not is_offloaded(model):
        try:
            model = weightless_twin(model)
        except Exception:
            return None
    for holder in holders(model, path):
        lookups = _rows_read(holder, model.get_submodule(path), goes_on=is_offloaded(model))
        if lookups:
            return lookups[0][0]
    return None


def positions_ahead(model: PreTrainedModel) -> int:
    """Return how many positions past its last token a text reads: 1 in ProphetNet, which predicts two tokens at once.

    A skeleton is asked, which has to run through: a forward reads a table more than once.
    """
    skeleton = skeleton_of(model)
    if skeleton is None:
        return 0
    tables = position_tables(skeleton).values()
    lookups = [rows for rows in (_rows_read(skeleton, table, goes_on=True) for table in tables) if rows]
    return max((rows[-1] - first[-1] for first, *others in lookups for rows in others), default=0)


def is_offloaded(model: nn.Module) -> bool:
    """Return whether hooks of accelerate bring the weights of a model, and take them away."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def holders(model: PreTrainedModel, path: str) -> list[PreTrainedModel]:
    """Return the transformers models around a module, innermost first: the text part of a model needs no picture."""
    around = [
        (outer, module)
        for outer, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and path.startswith(f"{outer}." if outer else "")
    ]
    return [module for _, module in sorted(around, key=lambda pair: -len(pair[0]))]


def _rows_read(model: PreTrainedModel, table: Any, goes_on: bool) -> list[list[int]]:
    """Return the rows that a text reads in each lookup; none where the forward does not get there, or with gaps."""
    ids = probe_text(model, 4)
    taken = inspect.signature(model.forward).parameters
    names = [name for name in ("input_ids", "decoder_input_ids") if name in taken]
    lookup = _Lookup(table, goes_on)
    try:
        with evaluation_mode(model), torch.no_grad(), lookup:
            model(**dict.fromkeys(names, ids))
    except _Reached:
        pass
    except Exception:  # it wants more than text, or an index is on the meta device
        return []
    if any(rows.is_meta for rows in lookup.rows):
        return []
    read: list[list[int]] = [rows.flatten()[:4].tolist() for rows in lookup.rows]
    return read if all(rows == list(range(rows[0], rows[0] + 4)) for rows in read) else []


def attention_projections(model: PreTrainedModel) -> list[str]:
    """Return the paths of all linear maps inside attention modules: query, key, value and output, fused or not.

    Raises:
        UnsupportedModelError: the model has none.
    """
    projections: dict[str, None] = {}
    for path, module in text_modules(model):
        if "attention" in type(module).__name__.lower() and not isinstance(module, PreTrainedModel):
            inside = (name for name, part in module.named_modules() if isinstance(part, (nn.Linear, Conv1D)))
            projections |= dict.fromkeys(f"{path}.{name}" for name in inside)
    if not projections:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no linear map inside an attention module. Pass the targets of the adapter "
            "by name, or targets='all-linear'"
        )
    return list(projections)


def norms(model: PreTrainedModel) -> list[str]:
    """Return the paths of the normalization layers that have weights."""
    return [
        path
        for path, module in text_modules(model)
        if "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))
    ]


def embeddings(model: PreTrainedModel) -> list[str]:
    """Return the paths of the embedding of tokens and of the learned tables of positions."""
    tokens = model.get_input_embeddings()
    return [path for path, module in model.named_modules() if module is tokens] + list(position_tables(model))


def tied_head(model: PreTrainedModel) -> str | None:
    """Return the path of the output layer, if it shares its weights with the embedding of tokens."""
    head = model.get_output_embeddings()
    if head is None or head.weight is not model.get_input_embeddings().weight:
        return None
    paths: dict[int, str] = {id(module): path for path, module in model.named_modules()}
    return paths[id(head)]


def shortest_names(paths: Iterable[str], model: nn.Module) -> list[str]:
    """Return the shortest end of each path that no module outside of `paths` shares, such as `q_proj`."""
    chosen = set(paths)
    others = [path for path, _ in model.named_modules() if path not in chosen]
    names: set[str] = set()
    for path in chosen:
        parts = path.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        names.add(next(end for end in ends if end in names or not any(other.endswith(end) for other in others)))
    return sorted(names)
