"""Gives the positions of a sinusoidal model the sines of other positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..edits import check_table_size
from ..errors import NoEffectError
from ..plan import ExtensionPlan, PositionMap
from .kernels import mapped
from .learned_table import set_rows
from .mixin import Mixin, mix
from .sites import sinusoids
from .stretch import radians, sines
from .undo import UndoLog


class OtherSines(Mixin):
    """Mixed into a module that makes a table of sines, and makes it anew when the input is longer (XGLM, M2M-100)."""

    _posext_positions: PositionMap
    _posext_radians: tuple[float, ...]

    def get_embedding(self, num_embeddings: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        table: torch.Tensor = super().get_embedding(num_embeddings, *args, **kwargs)  # type: ignore[misc]
        first = getattr(self, "offset", 0)  # rows before position 0 are padding
        positions = mapped(torch.arange(num_embeddings - first), self._posext_positions)
        frequencies = torch.tensor(self._posext_radians, dtype=torch.float64)
        other = sines(first + positions.double(), frequencies)
        return torch.cat([table[:first], other.to(table)])


def _differ(sines: torch.Tensor, before: torch.Tensor) -> bool:
    """Return whether sines differ by more than the rounding of angles of a few thousand radians."""
    common = min(len(sines), len(before))
    return not torch.allclose(sines[:common].float(), before[:common].float(), atol=1e-3, rtol=0)


def apply_sinusoids(model: PreTrainedModel, plan: ExtensionPlan, log: UndoLog) -> str | None:
    """Put the positions of a plan into a model.

    Returns:
        `str`, *optional*: `None` where the sines are saved with the weights, else why a saved checkpoint needs this
        package.

    Raises:
        NoEffectError: positions stay as they are.
        UnsupportedModelError: the sines of the model follow no formula that is known here.
    """
    assert plan.sinusoids is not None
    found = sinusoids(model)
    rows: dict[str, torch.Tensor] = {}
    changed = False
    for path, module in found.items():
        table: Any = module.weight if isinstance(module, nn.Embedding) else module.weights
        frequencies = radians(table, f"{path} of {plan.scheme.model_type}")
        if isinstance(module, nn.Embedding):
            check_table_size(plan.target_length, table.shape[1], len(found))
            at = mapped(torch.arange(plan.target_length), plan.sinusoids)
            rows[path] = sines(at, frequencies).to(table)
            changed |= _differ(rows[path], table)
            continue
        log.set(module, "_posext_positions", plan.sinusoids)
        log.set(module, "_posext_radians", tuple(frequencies.tolist()))
        log.set(module, "__class__", mix(OtherSines, type(module)))
        make: Any = module
        # Sines are made on the CPU; the model's table may be elsewhere.
        longer = make.get_embedding(len(table), table.shape[1], getattr(module, "padding_idx", None)).to(table)
        changed |= _differ(longer, table)
        log.set(module, "weights", longer)
    if not changed:
        raise NoEffectError(f"{plan.describe()} leaves positions as they are; pass a factor above 1, or method 'none'")
    if rows:
        obstacle = set_rows(model, rows, 0, log)
        if obstacle:
            return obstacle
    ignored = model._keys_to_ignore_on_save or ()
    if rows.keys() == found.keys() and not any(f"{path}.weight" in ignored for path in rows):
        return None
    return "transformers makes the sines anew when it opens a checkpoint"
