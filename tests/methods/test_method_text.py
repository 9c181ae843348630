"""Methods from text: names, hyper-parameters in brackets, compositions; and back."""

from __future__ import annotations

import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from transformers import LlamaForCausalLM

from hf_posext import LogN, LongRoPE, Method, ReRoPE, SelfExtend, YaRN, patch_model, register
from hf_posext.errors import InvalidParameterError, UnknownMethodError
from hf_posext.methods import Composition, as_method, methods
from hf_posext.methods.text import split_outside_brackets


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("yarn", YaRN()),
        ("yarn()", YaRN()),
        (" rerope( window = 384 ) ", ReRoPE(window=384)),
        ("self-extend(group=8, window=64)", SelfExtend(group=8, window=64)),
        ("yarn(variant='paper',beta_fast=1.6e+1)", YaRN(variant="paper", beta_fast=16)),
        ("yarn(factor=16, truncate=False)", YaRN(factor=16, truncate=False)),
        ("yarn(attention_factor=None)", YaRN()),
        ("longrope(long_factor=[1, 2.5])", LongRoPE(long_factor=[1, 2.5])),
        ("yarn(beta_fast=16)+log-n", Composition(components=(YaRN(beta_fast=16), LogN()))),
    ],
)
def test_text_is_read(text: str, method: Method) -> None:
    assert as_method(text) == method


@pytest.mark.parametrize("name", methods())
def test_the_label_of_a_method_is_text_that_gives_it_back(name: str) -> None:
    method = methods()[name]()
    assert method.label == name and as_method(method.label) == method


@pytest.mark.parametrize(
    ("method", "label"),
    [
        (ReRoPE(window=384), "rerope(window=384)"),
        (YaRN(beta_fast=16, variant="paper") + LogN(), "yarn(variant='paper', beta_fast=16)+log-n"),
        (YaRN(truncate=False), "yarn(truncate=False)"),
    ],
)
def test_a_label_tells_what_is_not_as_by_default(method: Method, label: str) -> None:
    assert method.label == label and as_method(label) == method


def test_a_part_of_a_composition_tells_a_factor_of_its_own() -> None:
    assert as_method("ntk(factor=2)+rerope(factor=8, window=48)").label == "ntk(factor=2)+rerope(window=48)"


def test_a_label_leaves_out_the_factor_and_lists() -> None:
    assert YaRN(factor=8).label == "yarn" and LongRoPE(long_factor=(1.0,) * 64).label == "longrope"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "yarn(beta_fats=16)",
            "yarn has no parameter 'beta_fats'; did you mean 'beta_fast'? there are: factor, variant",
        ),
        ("linear(x=1)", "linear has no parameter 'x'; there are: factor"),
        (
            "yarn(16)",
            "cannot read the parameters of 'yarn(16)'. Pass names and plain values, as in \"yarn(variant='code')\"",
        ),
        ("linear(8)", "as in 'linear(factor=8)'"),
        ("yarn(beta_fast=__import__('os').getpid())", "cannot read the parameters"),
        ("yarn(beta_fast=1, beta_fast=2)", "cannot read the parameters"),
        ("yarn(**{'beta_fast': 16})", "cannot read the parameters"),
        ("yarn(beta_fast=16", "cannot read the parameters"),
        ("yarn(beta_fast=16)(truncate=True)", "cannot read the parameters"),
        ("yarn(beta_fast=16)x", "cannot read the parameters"),
        ("yarn(beta_fast=" + "(" * 1000, "cannot read the parameters"),
        ("yarn(beta_fast='16')", "Expected yarn beta_fast to be a number, got '16'."),
        ("yarn(beta_fast=True)", "Expected yarn beta_fast to be a number, got True."),
        ("yarn(truncate=1)", "Expected yarn truncate to be True or False or None, got 1."),
        ("rerope(window=3.5)", "Expected rerope window to be a whole number or None, got 3.5."),
        ("longrope(long_factor='12')", "longrope long_factor to be a list of numbers or None, got '12'"),
        ("yarn(beta_slow=40)", "Expected 0 < beta_slow < beta_fast"),
    ],
)
def test_parameters_that_cannot_be_are_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidParameterError) as refused:
        as_method(text)
    assert message in str(refused.value)


@pytest.mark.parametrize("text", ["yran(beta_fast=16)", "yarn++log-n", "", "(window=3)", "yarn)"])
def test_names_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UnknownMethodError):
        as_method(text)


def test_pieces_are_split_outside_brackets_only() -> None:
    text = "none, longrope(long_factor=[1,2], short_factor=(1,2)),yarn"
    assert split_outside_brackets(text, ",") == ["none", "longrope(long_factor=[1,2], short_factor=(1,2))", "yarn"]


def test_a_patch_is_labelled_with_what_was_asked_for(llama: LlamaForCausalLM) -> None:
    with patch_model(llama, "rerope(window=48)", factor=2) as patch:
        assert patch.plan.method == "rerope(window=48)" and patch.plan.bands[0].high == 48


@pytest.mark.parametrize("name", ["a+b", "a,b", "a(b", ""])
def test_a_name_that_could_not_be_read_back_cannot_be_registered(name: str) -> None:
    with pytest.raises(InvalidParameterError, match="Choose another name"):
        register(type("Bad", (YaRN,), {"name": name}))


SOURCE = """
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_posext.methods import Method


@dataclass(frozen=True)
class Elsewhere(Method):
    name: ClassVar[str] = "elsewhere"
    kinds: ClassVar[tuple[str, ...]] = ("rotary",)
    depth: int | None = None

    def extend(self, plan):
        return plan
"""


@pytest.mark.parametrize("run_name", ["<run_path>", "__main__"])  # a script that is run, and a notebook's cells
def test_a_method_whose_module_is_gone_checks_its_parameters(run_name: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SOURCE)
    cls = runpy.run_path(str(tmp_path / "script.py"), run_name=run_name)["Elsewhere"]
    assert cls(depth=3).depth == 3 and cls(factor=2).label == "elsewhere"
    with pytest.raises(InvalidParameterError, match="elsewhere depth to be a whole number or None, got 'deep'"):
        cls(depth="deep")
    with pytest.raises(InvalidParameterError, match="elsewhere factor to be a number above 0 or None, got nan"):
        cls(factor=float("nan"))


def test_a_method_inside_a_function_checks_the_parameters_whose_types_are_known() -> None:
    from decimal import Decimal

    @dataclass(frozen=True)
    class Local(Method):
        name: ClassVar[str] = "local"
        kinds: ClassVar[tuple[str, ...]] = ("rotary",)
        exact: Decimal = Decimal(1)
        depth: int = 1

    assert Local(exact=Decimal(2), depth=3).depth == 3
    with pytest.raises(InvalidParameterError, match="Expected local depth to be a whole number, got 'deep'"):
        Local(depth="deep")  # type: ignore[arg-type]
