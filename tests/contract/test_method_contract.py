"""The contract of every registered method. A new method is covered as soon as it exists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
from transformers import PreTrainedModel

from hf_posext import detect_scheme
from hf_posext.methods import Linear, Method, methods
from hf_posext.plan import ExtensionPlan, RotaryPlan
from hf_posext.scheme import Rotary
from hf_posext.testing import CHECKS, MODELS, cases, check_method, check_saved, read_again, save_case

CASES = [
    pytest.param(name, kind, id=f"{name}-{kind}")
    for name, cls in methods().items()
    for kind in cls.kinds
    if name != "none" and kind in MODELS
]


def build(name: str, kind: str) -> tuple[PreTrainedModel, Method]:
    """A tiny model and the method, with example values where its parameters have no defaults."""
    model = MODELS[kind]()
    return model, methods()[name].example(detect_scheme(model))


def test_every_method_has_a_model_to_run_on() -> None:
    assert {kind for cls in methods().values() if cls.name != "none" for kind in cls.kinds} <= set(MODELS)


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[[Method, str], None], name: str, kind: str) -> None:
    check(build(name, kind)[1], kind)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method's patched model on disk, with the logits that it gave, and the same read again by new processes."""
    root = tmp_path_factory.mktemp("saved")
    for case in CASES:
        name, kind = map(str, case.values)
        save_case(build(name, kind)[1], kind, root / f"{name}-{kind}")
    read_again(root)
    return root


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_saved_model_is_equal_in_a_new_process(name: str, kind: str, saved: Path) -> None:
    check_saved(saved / f"{name}-{kind}", kind)


def test_a_name_stands_for_a_method_with_example_values() -> None:
    """The whole call runs in examples/07_custom_method.py."""
    ((method, kind),) = cases("longrope")
    assert (method.name, kind) == ("longrope", "rotary") and method.long_factor


def test_a_broken_promise_is_found() -> None:
    @dataclass(frozen=True)
    class Forgetful(Linear):
        """A plan that differs from call to call."""

        name: ClassVar[str] = "forgetful"

        def rescale(self, rotary: Rotary, current: RotaryPlan, plan: ExtensionPlan) -> RotaryPlan:
            calls.append(plan)
            return super().rescale(rotary, current, replace(plan, factor=8.0 + len(calls)))

    calls: list[ExtensionPlan] = []
    with pytest.raises(AssertionError, match="two plans of one method differ"):
        check_method(Forgetful())
