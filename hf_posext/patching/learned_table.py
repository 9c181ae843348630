"""Puts a longer table of positions into a live model, and the sizes that go with it.

The weights of the table are replaced, not resized, and put back by undo. All else that is as long as the table
follows: index buffers, causal masks that a few families keep, limits in the config, so that the saved model is one
that plain transformers opens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import NoEffectError, UnsupportedModelError
from ..plan import ExtensionPlan
from .journal import Journal
from .limits import length_fields, set_limit
from .sites import path_without_adapter, position_tables, sinusoids, table_offset, text_modules
from .stretch import stretch

_MODULE_LENGTHS = ("max_length", "max_seqlen", "max_source_positions", "max_target_positions", "n_positions")
"""Attributes of modules that repeat the length of the table (ProphetNet, BigBird, BART, GPT)."""


def apply_table(model: PreTrainedModel, plan: ExtensionPlan, journal: Journal) -> None:
    """Stretch the learned tables of a model to the target length of a plan.

    Raises:
        NoEffectError: every row stays as it is.
        UnsupportedModelError: the model has no weights yet.
    """
    assert plan.table is not None
    tables = position_tables(model)
    rows: dict[str, torch.Tensor] = {}
    for path, module in tables.items():
        if module.weight.is_meta:
            raise UnsupportedModelError(
                f"{plan.scheme.model_type} is on the meta device; load its weights, then patch"
            )
        offset, old = table_offset(module), module.weight.detach()
        trained = old[offset : offset + plan.original_length]
        longer = stretch(trained, plan.table, torch.arange(plan.target_length)).to(old)
        rows[path] = torch.cat([old[:offset], longer])
    refuse_no_effect(plan, {path: module.weight for path, module in tables.items()}, rows)
    set_rows(model, rows, journal)


def refuse_no_effect(
    plan: ExtensionPlan, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
) -> None:
    """
    Raises:
        NoEffectError: every table stays as it is.
    """
    if all(torch.equal(before[path], after[path]) for path in before):
        raise NoEffectError(
            f"{plan.describe()} leaves the table of {plan.scheme.model_type} as it is; give a factor above 1, or "
            "method 'none' to compare with the model as it is"
        )


def tables_of(model: PreTrainedModel) -> dict[str, nn.Embedding]:
    """Every table of positions by path, learned or of sines, that is an embedding with weights of its own."""
    fixed = {path: module for path, module in sinusoids(model).items() if isinstance(module, nn.Embedding)}
    return position_tables(model) | fixed


def replaced_tables(model: PreTrainedModel, journal: Journal) -> dict[str, torch.Tensor]:
    """The weights by path that tables had before a patch, of those that it replaced."""
    tables = tables_of(model).items()
    return {path: journal.before(module, "weight") for path, module in tables if journal.knows(module, "weight")}


def follow_tables(model: PreTrainedModel, replaced: Mapping[str, nn.Embedding], journal: Journal) -> None:
    """Take the tables that are in the model now for those that were replaced: merging an adapter that trained one puts
    its copy there.

    Args:
        model (`PreTrainedModel`): as it is now.
        replaced (`Mapping[str, nn.Embedding]`): the modules by path that got other weights when it was patched.
        journal (`Journal`): of that patch.

    Raises:
        UnsupportedModelError: an adapter still trains a copy of one.
    """
    paths = {path_without_adapter(path) for path in replaced}
    for path, module in tables_of(model).items():
        if path in replaced and replaced[path] is not module:
            journal.transfer(replaced[path], module)
        if path_without_adapter(path) in paths and not journal.knows(module, "weight"):
            raise UnsupportedModelError(
                f"an adapter trains a copy of the table that was stretched ({path}); merge or drop the adapter first: "
                "model.merge_and_unload() or model.unload()"
            )


def set_rows(model: PreTrainedModel, rows: Mapping[str, torch.Tensor], journal: Journal) -> None:
    """Replace the weights of tables, and make all that is as long as they are follow.

    Args:
        model (`PreTrainedModel`): with its tables, all of the same size.
        rows (`Mapping[str, torch.Tensor]`): new weights by path, all of the same size.
        journal (`Journal`): remembers what was there.
    """
    tables = tables_of(model)
    first: nn.Embedding = next(iter(tables.values()))
    old, offset, new = first.num_embeddings, table_offset(first), len(next(iter(rows.values())))
    for path, weight in rows.items():
        module = tables[path]
        journal.set(module, "weight", nn.Parameter(weight, requires_grad=module.weight.requires_grad))
        journal.set(module, "num_embeddings", new)
    for _, part in text_modules(model):
        for name in _MODULE_LENGTHS:
            held = vars(part).get(name)
            if held in (old, old - offset):
                journal.set(part, name, held + new - old)
        for name, buffer in part._buffers.items():
            longer = _resized(name, buffer, part, old, new)
            if longer is not None:
                journal.set(part, name, longer)
    _resize_config(model, old, offset, new, journal)


def _resized(name: str, buffer: torch.Tensor | None, module: nn.Module, old: int, new: int) -> torch.Tensor | None:
    """A buffer of the new length; `None` where it does not depend on the length of the table."""
    if buffer is None or not buffer.ndim or buffer.shape[-1] != old:
        return None
    if name == "position_ids":
        return torch.arange(new, dtype=buffer.dtype, device=buffer.device).expand(*buffer.shape[:-1], -1)
    if name == "token_type_ids":
        return buffer.new_zeros(*buffer.shape[:-1], new)
    if name == "bias" and buffer.shape[-2:] == (old, old):
        mask = torch.ones(new, new, dtype=torch.bool, device=buffer.device).tril()
        if getattr(module, "attention_type", None) == "local":  # GPT-Neo's layers that see a window
            config: Any = getattr(module, "config")  # noqa: B009  nn.Module types its attributes as tensors
            mask ^= mask.tril(-config.window_size)
        return mask.to(buffer.dtype).expand(*buffer.shape[:-2], -1, -1)
    return None


def _resize_config(model: PreTrainedModel, old: int, offset: int, new: int, journal: Journal) -> None:
    """Limits in the config, which count the rows before position 0 in some families and not in others."""
    for config, name, held in length_fields(model):
        if held not in (old, old - offset):
            continue
        set_limit(model, config, name, held + new - old, journal)
        if getattr(config, "relative_attention", False) and getattr(config, "max_relative_positions", old) < 1:
            # DeBERTa has twice as many relative positions as rows here, unless it is told how many
            journal.set(config, "max_relative_positions", held)
