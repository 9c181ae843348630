"""The parts of a model that fine-tuning asks for, found by what they are and not by one family's names."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModelError
from .sites import position_tables, text_modules


def attention_projections(model: PreTrainedModel) -> list[str]:
    """Paths of the linear maps in the attention of every layer: query, key, value and output, fused or not.

    Raises:
        UnsupportedModelError: there are none.
    """
    found: dict[str, None] = {}
    for path, module in text_modules(model):
        if "attention" in type(module).__name__.lower() and not isinstance(module, PreTrainedModel):
            inside = (name for name, part in module.named_modules() if isinstance(part, (nn.Linear, Conv1D)))
            found |= dict.fromkeys(f"{path}.{name}" for name in inside)
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no linear map inside an attention module; give the targets of the adapter "
            "by name, or targets='all-linear'"
        )
    return list(found)


def norms(model: PreTrainedModel) -> list[str]:
    """Paths of the normalization layers that have weights."""
    return [
        path
        for path, module in text_modules(model)
        if "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))
    ]


def embeddings(model: PreTrainedModel) -> list[str]:
    """Paths of the embedding of tokens, and of the learned tables of positions where there are such."""
    tokens = model.get_input_embeddings()
    return [path for path, module in model.named_modules() if module is tokens] + list(position_tables(model))


def tied_head(model: PreTrainedModel) -> str | None:
    """Path of the output layer whose weights are those of the embedding of tokens; `None` where they are its own."""
    head = model.get_output_embeddings()
    if head is None or head.weight is not model.get_input_embeddings().weight:
        return None
    paths: dict[int, str] = {id(module): path for path, module in model.named_modules()}
    return paths[id(head)]


def shortest_names(paths: Iterable[str], model: nn.Module) -> list[str]:
    """For each path the shortest end of it that no module outside of `paths` shares: `q_proj` rather than
    `model.layers.0.self_attn.q_proj`, and `attention.dense` where `dense` is in the MLP, too."""
    wanted = set(paths)
    others = [path for path, _ in model.named_modules() if path not in wanted]
    names: set[str] = set()
    for path in wanted:
        parts = path.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        names.add(next(end for end in ends if end in names or not any(other.endswith(end) for other in others)))
    return sorted(names)
