"""Longer tables of positions from shorter ones: tensors in, tensors out.

In float64 on the CPU, so that the rows do not depend on the device or the dtype of the model.
"""

from __future__ import annotations

import torch

from ..errors import UnsupportedModelError
from ..plan import TablePlan
from .kernels import mapped


def stretch(table: torch.Tensor, plan: TablePlan, positions: torch.Tensor) -> torch.Tensor:
    """The rows that a plan gives to positions.

    Args:
        table (`torch.Tensor` of shape `(trained positions, width)`): any dtype.
        plan (`TablePlan`): which rows.
        positions (`torch.LongTensor` of shape `(positions,)`): of the new table.

    Returns:
        `torch.Tensor` of shape `(positions, width)`: float64, on the CPU.
    """
    rows = table.detach().to("cpu", torch.float64)
    curves = _second_derivatives(rows) if plan.interpolation == "cubic" else None
    out = _between(rows, mapped(positions, plan.position), curves)
    if plan.coarse is not None:
        coarse = _between(rows, mapped(positions, plan.coarse), curves)
        out = out + plan.alpha / (1 - plan.alpha) * (coarse - rows[0])
    return out


def _between(rows: torch.Tensor, at: torch.Tensor, curves: torch.Tensor | None) -> torch.Tensor:
    """Rows at fractional positions: linear, or along the spline that has the given second derivatives in each row."""
    at = at.double().clamp(0, len(rows) - 1)
    low = at.floor().long()
    high = (low + 1).clamp(max=len(rows) - 1)
    right = (at - low)[:, None]
    left = 1 - right
    out = left * rows[low] + right * rows[high]
    if curves is not None:
        out = out + ((left**3 - left) * curves[low] + (right**3 - right) * curves[high]) / 6
    return out


def _second_derivatives(rows: torch.Tensor) -> torch.Tensor:
    """Second derivatives of the natural cubic spline through rows at 0, 1, 2, ...: zero at both ends.

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
    """Sines of all frequencies, then cosines, float64 of shape `(positions, 2 * frequencies)`."""
    phases = angles.double()[:, None] * frequencies[None]
    return torch.cat([phases.sin(), phases.cos()], dim=-1)


def radians(table: torch.Tensor, name: str) -> torch.Tensor:
    """Radians per position, float64 of shape `(width / 2,)`: the formula whose row 3 is that of the table.

    Raises:
        UnsupportedModelError: neither formula is.
    """
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
        f"{name} does not hold sines of 10000 ** (-i / n); hf_posext cannot move its positions"
    )
