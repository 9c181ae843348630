"""Stretched tables equal loops, and scipy's spline, written from the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline

from hf_posext import detect_scheme, patch_model
from hf_posext.errors import InvalidParameterError, NoEffectError, PlanError
from hf_posext.methods import TableHierarchical, as_method
from hf_posext.patching.tables import stretch
from hf_posext.plan import ExtensionPlan

from ..conftest import TRAINED, logits, tiny_gpt2, tokens
from ..zoo import build

L = TRAINED


def linear(rows: np.ndarray, p: int, s: float) -> np.ndarray:
    x = min(p / s, L - 1)
    i = math.floor(x)
    return rows[i] if i == L - 1 else (1 - (x - i)) * rows[i] + (x - i) * rows[i + 1]


def cubic(rows: np.ndarray, p: int, s: float) -> np.ndarray:
    return CubicSpline(np.arange(L), rows, bc_type="natural")(min(p / s, L - 1))


def hierarchical(rows: np.ndarray, p: int, s: float, alpha: float = 0.4) -> np.ndarray:
    u = (rows - alpha * rows[0]) / (1 - alpha)
    return alpha * u[p // L] + (1 - alpha) * u[p % L]


REFERENCES: dict[str, Callable[[np.ndarray, int, float], np.ndarray]] = {
    "table-linear": linear,
    "table-cubic": cubic,
    "table-repeat": lambda rows, p, s: rows[p % L],
    "table-group": lambda rows, p, s: rows[p // math.ceil(s)],
    "table-hierarchical": hierarchical,
}


@pytest.mark.parametrize("factor", [1.5, 3.0, 8.0])
@pytest.mark.parametrize("name", REFERENCES)
def test_rows_equal_the_formula(name: str, factor: float) -> None:
    rows = torch.randn(L, 5, generator=torch.Generator().manual_seed(0))
    plan = as_method(name).plan(detect_scheme(tiny_gpt2()), factor=factor)
    assert plan.table is not None
    stretched = stretch(rows, plan.table, torch.arange(plan.target_length))
    exact = rows.double().numpy()
    expected = np.stack([REFERENCES[name](exact, p, factor) for p in range(plan.target_length)])
    # positions between rows are float32: 64 * 2**-24, times the steps between rows of some 4
    np.testing.assert_allclose(stretched.numpy(), expected, rtol=0, atol=2e-5)


def test_a_tables_rows_do_not_depend_on_the_dtype_of_the_model() -> None:
    half = tiny_gpt2().to(torch.bfloat16)
    exact = tiny_gpt2()
    exact.transformer.wpe.weight.data = half.transformer.wpe.weight.data.float()
    patch_model(half, "table-cubic", factor=2)
    patch_model(exact, "table-cubic", factor=2)
    assert half.transformer.wpe.weight.dtype == torch.bfloat16
    assert torch.equal(half.transformer.wpe.weight, exact.transformer.wpe.weight.to(torch.bfloat16))


@pytest.mark.parametrize("name", ["table-repeat", "table-hierarchical"])
def test_the_first_rows_stay(name: str) -> None:
    model = tiny_gpt2()
    before = logits(model, tokens(TRAINED))
    with patch_model(model, name, factor=4):
        assert torch.equal(logits(model, tokens(TRAINED)), before)


@pytest.mark.parametrize(("family", "offset"), [("opt", 2), ("roberta", 1), ("gpt2", 0)])
def test_rows_before_the_offset_stay_and_count_for_nothing(family: str, offset: int) -> None:
    model = build(family)
    table = next(
        m
        for p, m in model.named_modules()
        if p.rsplit(".", 1)[-1] in ("embed_positions", "wpe", "position_embeddings")
    )
    before = table.weight.detach().clone()
    trained = len(before) - offset
    patch_model(model, "table-linear", factor=2)
    assert table.num_embeddings == len(table.weight) == offset + 2 * trained
    assert torch.equal(table.weight[:offset], before[:offset])
    assert torch.equal(table.weight[offset::2], before[offset:])
    assert torch.equal(table.weight[offset + 1 : -1 : 2], (before[offset:-1] + before[offset + 1 :]) / 2)


def test_rows_that_were_never_trained_are_replaced() -> None:
    """A table of 256 rows of which 64 were trained: the others are noise, wherever the target is."""
    for target in (128, 256, 512):
        model = tiny_gpt2(n_positions=256)
        trained = model.transformer.wpe.weight[:TRAINED].detach().clone()
        with torch.no_grad():
            model.transformer.wpe.weight[TRAINED:] = float("nan")
        patch_model(model, "table-repeat", target_length=target, trained_length=TRAINED)
        assert model.config.n_positions == target
        assert torch.equal(model.transformer.wpe.weight, trained.repeat(target // TRAINED, 1))
        assert logits(model, tokens(target)).isfinite().all()


def test_what_cannot_be_is_refused() -> None:
    scheme = detect_scheme(tiny_gpt2())
    with pytest.raises(InvalidParameterError, match="reaches 4096 tokens.*Pass a factor up to 64"):
        TableHierarchical().plan(scheme, factor=65)
    for alpha in (0.0, 0.5, 1.0):
        with pytest.raises(InvalidParameterError, match="alpha"):
            TableHierarchical(alpha=alpha).plan(scheme, factor=2)
    with pytest.raises(InvalidParameterError, match="up to 64, the positions in the table"):
        as_method("table-linear").plan(scheme, factor=2, trained_length=128)
    with pytest.raises(InvalidParameterError, match="stretches the table twice"):
        as_method("table-linear+table-cubic").plan(scheme, factor=2)
    with pytest.raises(NoEffectError, match="larger factor"):
        patch_model(tiny_gpt2(), "table-linear", factor=1)


FLAT = {"rate": 1.0, "group": 0, "offset": 0.0, "modulo": None, "limit": None}


@pytest.mark.parametrize("change", [{"interpolation": "sinc"}, {"alpha": 1.0}, {"position": FLAT}])
def test_hostile_plans_are_refused(change: dict[str, object]) -> None:
    data = as_method("table-linear").plan(detect_scheme(tiny_gpt2()), factor=2).to_dict()
    data["table"] |= change
    with pytest.raises(PlanError):
        ExtensionPlan.from_dict(data)
