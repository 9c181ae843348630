"""Position tables of a live model, learned or sinusoidal: longer ones, and all dependent sizes.

The weights of a table are replaced, not resized, and put back by undo. Limits in the config follow, and then all that
transformers makes of the config: index buffers, causal masks that a few families keep, lengths in modules. So the
saved model is one that plain transformers opens. Rows are computed in float64 on the CPU, so that they do not depend
on the device or the dtype of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..edits import check_table_size
from ..errors import UnsupportedModelError
from ..plan import ExtensionPlan, PositionMap, TablePlan
from .effect import no_effect
from .kernels.bands import mapped
from .sites import (
    LENGTH_FIELDS,
    path_without_adapter,
    position_tables,
    positions_ahead,
    row_of_position_zero,
    sinusoids,
    text_configs,
    weightless_twin,
)
from .undo import Mixin, UndoLog, mix

BLOCK = 2**14
"""Rows that are made at once: their arithmetic takes several times the memory of the table."""


def apply_table(model: PreTrainedModel, plan: ExtensionPlan, log: UndoLog) -> None:
    """Stretch the learned tables of a model to the target length of a plan."""
    assert plan.table is not None and plan.scheme.table is not None
    tables, offset = position_tables(model), plan.scheme.table.offset
    check_table_size(plan.target_length, plan.scheme.table.width, len(tables))
    masks = [buffer for part in model.modules() for buffer in part._buffers.values() if _is_mask(buffer, tables)]
    check_table_size(plan.target_length, plan.target_length // 4, len(masks))  # a byte for each pair
    rows: dict[str, torch.Tensor] = {}
    count = plan.target_length + positions_ahead(model)
    for path, module in tables.items():
        if module.weight.is_meta:
            raise UnsupportedModelError(
                f"Expected {path} of {plan.scheme.model_type} in memory, got it offloaded or on the meta device. Pass "
                f"device_map={{..., {path!r}: 'cpu'}}, then patch."
            )
        old = module.weight.detach()
        longer = old.new_empty(count, old.shape[1])
        for start in range(0, count, BLOCK):
            positions = torch.arange(start, min(start + BLOCK, count))
            longer[start : start + BLOCK] = stretch(
                old[offset : offset + plan.trained_length], plan.table, positions
            ).to(old)
        rows[path] = torch.cat([old[:offset], longer])
    if all(torch.equal(tables[path].weight, rows[path]) for path in tables):
        raise no_effect(plan, "the table")
    set_rows(model, rows, offset, log)
    for path in tables:
        read = row_of_position_zero(model, path)
        if read not in (offset, None):
            raise UnsupportedModelError(
                f"Expected {plan.scheme.model_type} to read position 0 in row {offset} of its longer table, got row "
                f"{read}."
            )


def _is_mask(buffer: torch.Tensor | None, tables: Mapping[str, nn.Embedding]) -> bool:
    sizes = {(module.num_embeddings, module.num_embeddings) for module in tables.values()}
    return buffer is not None and tuple(buffer.shape[-2:]) in sizes


def tables_of(model: PreTrainedModel) -> dict[str, nn.Embedding]:
    """Return every position table by path that is an embedding with its own weights."""
    fixed = {path: module for path, module in sinusoids(model).items() if isinstance(module, nn.Embedding)}
    return position_tables(model) | fixed


def replaced_tables(model: PreTrainedModel, log: UndoLog) -> dict[str, torch.Tensor]:
    """Return the unpatched weights of replaced tables by path."""
    tables = tables_of(model).items()
    return {path: log.before(module, "weight") for path, module in tables if log.knows(module, "weight")}


def follow_tables(model: PreTrainedModel, replaced: Mapping[str, nn.Embedding], log: UndoLog) -> None:
    """Let undo restore tables at their present place, because merging an adapter moves its copy there.

    Args:
        replaced (`Mapping[str, nn.Embedding]`): modules by path that got other weights when the model was patched.
    """
    paths = {path_without_adapter(path) for path in replaced}
    for path, module in tables_of(model).items():
        if path in replaced and replaced[path] is not module:
            log.transfer(replaced[path], module)
        if path_without_adapter(path) in paths and not log.knows(module, "weight"):
            raise UnsupportedModelError(
                f"Expected the table that was stretched, got a copy that an adapter trains ({path}). Merge or drop "
                "the adapter first: model.merge_and_unload() or model.unload()."
            )


def set_rows(model: PreTrainedModel, rows: Mapping[str, torch.Tensor], offset: int, log: UndoLog) -> None:
    """Replace the weights of tables by path, and all that follows their length. `offset` is the row of position 0.

    Raises:
        UnsupportedModelError: the model cannot be built from its config, or has other weights of that length.
    """
    tables = tables_of(model)
    old, new = next(iter(tables.values())).num_embeddings, len(next(iter(rows.values())))
    before = _twin(model)
    for path, weight in rows.items():
        log.replace(tables[path], "weight", nn.Parameter(weight, requires_grad=tables[path].weight.requires_grad))
    _resize_config(model, old, offset, new, log)
    _follow(model, before, _twin(model), log)


def _twin(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the modules, by path, of a model built from the config, without weights."""
    try:
        return dict(weightless_twin(model).named_modules())
    except Exception as error:
        raise UnsupportedModelError(
            f"Expected to build {type(model).__name__} from its config alone, got {type(error).__name__}: {error}. "
            "Without it, the sizes that follow the length of a table are unknown."
        ) from error


def _follow(model: PreTrainedModel, before: dict[str, nn.Module], after: dict[str, nn.Module], log: UndoLog) -> None:
    """Give a model what the changed config makes of its modules: their numbers, index buffers, and masks."""
    for path, module in model.named_modules():
        bare = path_without_adapter(path)
        if bare not in before or bare not in after:  # a module of an adapter
            continue
        was, twin = before[bare], after[bare]
        for name, number in vars(twin).items():
            ours = vars(module).get(name)
            if type(number) is type(ours) is int and ours == vars(was).get(name) != number:
                log.set(module, name, number)
        for name, buffer in twin._buffers.items():
            ours, former = module._buffers.get(name), was._buffers.get(name)
            if buffer is None or ours is None or former is None:
                continue
            if buffer.shape != ours.shape == former.shape:
                log.replace(module, name, buffer.to(ours))
        for name, weight in twin._parameters.items():
            ours, former = module._parameters.get(name), was._parameters.get(name)
            if weight is None or ours is None or former is None or weight.shape in (ours.shape, former.shape):
                continue
            if not isinstance(module, nn.Embedding) or row_of_position_zero(model, path) is not None:
                raise UnsupportedModelError(
                    f"Expected {path}.{name} of {type(model).__name__} to keep its shape {tuple(ours.shape)} in a "
                    f"model built from the changed config, got {tuple(weight.shape)}."
                )
            # VisualBERT's table of positions in a picture: no text reads it, and its rows keep their places
            more = ours.detach()[-1:].expand(max(len(weight) - len(ours), 0), -1)
            resized = torch.cat([ours.detach(), more])[: len(weight)]
            log.replace(module, name, nn.Parameter(resized, requires_grad=ours.requires_grad))


def length_fields(model: PreTrainedModel) -> Iterator[tuple[PreTrainedConfig, str, int]]:
    """Return every config field of the text parts that contains the longest input: config, name, tokens."""
    for config in text_configs(model):
        for name in dict.fromkeys(config.attribute_map.get(name, name) for name in LENGTH_FIELDS):
            length = getattr(config, name, None)
            if isinstance(length, int):
                yield config, name, length


def set_limit(model: PreTrainedModel, config: PreTrainedConfig, name: str, length: int, log: UndoLog) -> None:
    """Set one field of a config, and the generation limit if it is the same."""
    old = getattr(config, name)
    log.set(config, name, length)
    generation = getattr(model, "generation_config", None)
    if generation is not None and generation.max_length == old:
        log.set(generation, "max_length", length)


def raise_limits(
    model: PreTrainedModel, plan: ExtensionPlan, tokenizer: PreTrainedTokenizerBase | None, log: UndoLog
) -> None:
    """Raise `max_position_embeddings` and similar fields, the generation limit, and the tokenizer's limit.

    A limit that is already higher stays, and so does one from which transformers computes frequencies in each forward.
    """
    length, planned = plan.target_length, {entry.name for entry in plan.rotaries}
    dynamic = {rotary.name for rotary in plan.scheme.rotaries if rotary.shipped_type == "dynamic"}
    for config, name, limit in length_fields(model):
        if limit < length and dynamic <= planned:
            set_limit(model, config, name, length, log)
    if tokenizer is not None and tokenizer.model_max_length < length:
        log.set(tokenizer, "model_max_length", length)


def _resize_config(model: PreTrainedModel, old: int, offset: int, new: int, log: UndoLog) -> None:
    """Resize the limits of a config. Some families include the rows before position 0, others do not."""
    for config, name, length in length_fields(model):
        if length not in (old, old - offset):
            continue
        set_limit(model, config, name, length + new - old, log)
        if getattr(config, "relative_attention", False) and getattr(config, "max_relative_positions", old) < 1:
            # DeBERTa has twice as many relative positions as rows here, unless it is told how many
            log.set(config, "max_relative_positions", length)


class OtherSines(Mixin):
    """Mixin for a module that computes a table of sines, again for longer inputs (XGLM, M2M-100)."""

    _posext_positions: PositionMap
    _posext_radians: tuple[float, ...]

    def get_embedding(self, num_embeddings: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        table: torch.Tensor = super().get_embedding(num_embeddings, *args, **kwargs)  # type: ignore[misc]
        first = getattr(self, "offset", 0)  # rows before position 0 are padding
        positions = mapped(torch.arange(num_embeddings - first), self._posext_positions)
        frequencies = torch.tensor(self._posext_radians, dtype=torch.float64)
        other = sines(first + positions.double(), frequencies)
        return torch.cat([table[:first].to(other), other])  # float64, whatever the default dtype


def _differ(sines: torch.Tensor, before: torch.Tensor) -> bool:
    """Return whether sines differ by more than the rounding of angles of a few thousand radians."""
    common = min(len(sines), len(before))
    return not torch.allclose(sines[:common].float(), before[:common].float(), atol=1e-3, rtol=0)


def apply_sinusoids(model: PreTrainedModel, plan: ExtensionPlan, log: UndoLog) -> str | None:
    """Apply the sines of a plan's positions to a sinusoidal model.

    Returns:
        `str`, *optional*: why a saved checkpoint needs this package; `None` where sines are saved with the weights.
    """
    assert plan.sinusoids is not None
    modules = sinusoids(model)
    rows: dict[str, torch.Tensor] = {}
    changed = False
    for path, module in modules.items():
        table: Any = module.weight if isinstance(module, nn.Embedding) else module.weights
        frequencies = radians(table, f"{path} of {plan.scheme.model_type}")
        if isinstance(module, nn.Embedding):
            check_table_size(plan.target_length, table.shape[1], len(modules))
            positions = mapped(torch.arange(plan.target_length), plan.sinusoids)
            rows[path] = sines(positions, frequencies).to(table)
            changed |= _differ(rows[path], table)
            continue
        log.set(module, "_posext_positions", plan.sinusoids)
        log.set(module, "_posext_radians", tuple(frequencies.tolist()))
        log.set(module, "__class__", mix(OtherSines, type(module)))
        make: Any = module
        # Sines are made on the CPU; the model's table may be elsewhere.
        longer = make.get_embedding(len(table), table.shape[1], getattr(module, "padding_idx", None)).to(table)
        changed |= _differ(longer, table)
        log.replace(module, "weights", longer)
    if not changed:
        raise no_effect(plan, "the positions")
    if rows:
        set_rows(model, rows, 0, log)
    ignored = model._keys_to_ignore_on_save or ()
    if rows.keys() == modules.keys() and not any(f"{path}.weight" in ignored for path in rows):
        return None
    return "transformers makes the sines anew when it opens a checkpoint"


def stretch(table: torch.Tensor, plan: TablePlan, positions: torch.Tensor) -> torch.Tensor:
    """Return the rows of a plan at positions (n,) of the new table, float64 on the CPU, of shape (n, width)."""
    rows = table.detach().to("cpu", torch.float64)
    curves = _second_derivatives(rows) if plan.interpolation == "cubic" else None
    out = _between(rows, mapped(positions, plan.position), curves)
    if plan.coarse is not None:
        coarse = _between(rows, mapped(positions, plan.coarse), curves)
        out = out + plan.alpha / (1 - plan.alpha) * (coarse - rows[0])
    return out


def _between(rows: torch.Tensor, positions: torch.Tensor, curves: torch.Tensor | None) -> torch.Tensor:
    """Return rows at fractional positions, linear or along a spline with the given second derivatives."""
    positions = positions.double().clamp(0, len(rows) - 1)
    low = positions.floor().long()
    high = (low + 1).clamp(max=len(rows) - 1)
    right = (positions - low)[:, None]
    left = 1 - right
    out = left * rows[low] + right * rows[high]
    if curves is not None:
        out = out + ((left**3 - left) * curves[low] + (right**3 - right) * curves[high]) / 6
    return out


def _second_derivatives(rows: torch.Tensor) -> torch.Tensor:
    """Return the second derivatives of the natural cubic spline through rows at 0, 1, 2, ...: zero at both ends.

    Inside, `m_(i-1) + 4 m_i + m_(i+1) = 6 (e_(i-1) - 2 e_i + e_(i+1))`, solved by elimination (Thomas).
    """
    bends = 6 * (rows[2:] - 2 * rows[1:-1] + rows[:-2])
    pivots: list[float] = []
    solved: list[torch.Tensor] = []
    for bend in bends:
        pivots.append(1 / (4 - (pivots[-1] if pivots else 0)))
        solved.append(pivots[-1] * (bend - solved[-1] if solved else bend))
    for i in reversed(range(len(solved) - 1)):
        solved[i] = solved[i] - pivots[i] * solved[i + 1]
    out = torch.zeros_like(rows)
    if solved:
        out[1:-1] = torch.stack(solved)
    return out


def sines(angles: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Return sines of all frequencies, then cosines, float64 of shape `(positions, 2 * frequencies)`."""
    phases = angles.double()[:, None] * frequencies[None]
    return torch.cat([phases.sin(), phases.cos()], dim=-1)


def radians(table: torch.Tensor, name: str) -> torch.Tensor:
    """Return the radians per position, float64 (width / 2,), of the formula that gives row 3 of a table of sines."""
    half = table.shape[1] // 2
    steps = torch.arange(half, dtype=torch.float64)
    candidates = [10_000 ** (-steps / half), 10_000 ** (-steps / max(half - 1, 1))]
    row = table[3].detach().to("cpu", torch.float64)
    if table.shape[1] == 2 * half:
        three = torch.tensor([3])
        errors = [float((sines(three, candidate)[0] - row).abs().max()) for candidate in candidates]
        # half a unit in the last place of sines near 1, and a float32 angle
        if min(errors) <= 1e-6 + torch.finfo(table.dtype).eps:
            return candidates[errors.index(min(errors))]
    raise UnsupportedModelError(
        f"Expected sines of 10000 ** (-i / n) in {name}, got others, whose positions cannot be moved."
    )
