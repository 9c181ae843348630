"""The row of a learned table that position 0 reads: asked from the model, which runs up to that table.

Families count rows from 0, from 2 (OPT, BART, and Nystromformer by a buffer), or from behind the padding row
(RoBERTa). No attribute says so in all of them.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from .modes import evaluation_mode
from .probe_text import probe_text

PROBE_TOKENS = 4


class _Reached(Exception):
    """The table was read; the rest of the forward is not needed."""


class _Lookup(TorchFunctionMode):
    """Notes the rows that are read from a table, and ends the forward there.

    With hooks of accelerate the forward has to go on: they take the weights that they brought away at its end.
    """

    def __init__(self, table: nn.Embedding, goes_on: bool) -> None:
        super().__init__()
        self.table = table
        self.goes_on = goes_on
        self.rows: torch.Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.embedding:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if weight is self.table.weight:
                self.rows = args[0] if args else kwargs["input"]
                if not self.goes_on:
                    raise _Reached
        return func(*args, **kwargs)


class _Weightless(TorchFunctionMode):
    """Puts the weights of a model that is built inside on the meta device, and leaves its index buffers real."""

    makers = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        if func in self.makers and kwargs.get("device") is None and dtype.is_floating_point:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def row_of_position_zero(model: PreTrainedModel, path: str) -> int | None:
    """The row that position 0 reads in a table; `None` where the model cannot be asked.

    Args:
        model (`PreTrainedModel`): with weights, or on the meta device, where a twin with real index buffers is asked.
        path (`str`): of the table.
    """
    if model.get_submodule(path).weight.is_meta and not _hooked(model):
        try:
            with _Weightless():
                model = type(model)(copy.deepcopy(model.config))
        except Exception:
            return None
    for holder in _holders(model, path):
        rows = _rows_read(holder, model.get_submodule(path))
        if rows is not None:
            return rows
    return None


def _hooked(model: nn.Module) -> bool:
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def _holders(model: PreTrainedModel, path: str) -> list[PreTrainedModel]:
    """The transformers models around a module, innermost first: the text part of a model needs no picture."""
    around = [
        (outer, module)
        for outer, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and path.startswith(f"{outer}." if outer else "")
    ]
    return [module for _, module in sorted(around, key=lambda pair: -len(pair[0]))]


def _rows_read(model: PreTrainedModel, table: Any) -> int | None:
    """The first row that a text reads; `None` where the forward does not get there, or reads no rows in order."""
    ids = probe_text(model, PROBE_TOKENS)
    taken = inspect.signature(model.forward).parameters
    names = [name for name in ("input_ids", "decoder_input_ids") if name in taken]
    lookup = _Lookup(table, goes_on=_hooked(model))
    try:
        with evaluation_mode(model), torch.no_grad(), lookup:
            model(**dict.fromkeys(names, ids))
    except _Reached:
        pass
    except Exception:  # it wants more than text, or an index is on the meta device
        return None
    if lookup.rows is None or lookup.rows.is_meta:
        return None
    rows: list[int] = lookup.rows.flatten()[:PROBE_TOKENS].tolist()
    return rows[0] if rows == list(range(rows[0], rows[0] + PROBE_TOKENS)) else None
