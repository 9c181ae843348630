"""Former names of public things: they work, warn at the line that used them, and are not in signatures."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest

import hf_posext
from hf_posext.errors import InvalidParameterError, RenamedAttribute, renamed_arguments
from hf_posext.methods import Composition
from hf_posext.plan import Band


@renamed_arguments(size="length", colour="color")
def draw(*, length: int | None = None, color: str = "black") -> tuple[int | None, str]:
    return length, color


class Thing:
    length = 8
    size = RenamedAttribute("length")


def test_a_former_argument_is_passed_under_the_new_name_with_a_warning() -> None:
    former: Any = draw
    with pytest.warns(DeprecationWarning, match="size is now called length; pass length=8") as caught:
        assert former(size=8) == (8, "black")
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning) as warned:
        assert former(size=0, colour="red") == (0, "red")
    assert len(warned) == 2
    with pytest.raises(InvalidParameterError, match="length and size are the same"):
        former(size=8, length=9)
    assert list(inspect.signature(draw).parameters) == ["length", "color"]


def test_new_names_and_a_former_one_without_a_value_do_not_warn() -> None:
    former: Any = draw
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw(length=8) == former(size=None, length=8) == (8, "black")
    with pytest.raises(TypeError, match="sise"):
        former(sise=8)


def test_a_former_attribute_is_read_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="size is now called length; read length") as caught:
        assert Thing().size == 8
    assert caught[0].filename == __file__


def test_a_former_name_of_a_module_is_imported_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="Part is now called Band; import Band") as caught:
        from hf_posext.plan import Part
    assert Part is Band and caught[0].filename == __file__
    with pytest.raises(ImportError, match="Porte"):
        from hf_posext.plan import Porte  # noqa: F401


PUBLIC = {name: getattr(hf_posext, name) for name in hf_posext.__all__}
TAKE_LENGTHS = {
    name: function
    for name, function in PUBLIC.items()
    if inspect.isfunction(function) and {"trained_length", "settings"} & set(inspect.signature(function).parameters)
} | {"plan": hf_posext.Method.plan, "plan of a composition": Composition.plan}


@pytest.mark.parametrize("name", TAKE_LENGTHS)
def test_every_public_function_knows_the_former_name_of_the_trained_length(name: str) -> None:
    with pytest.raises(InvalidParameterError, match="trained_length and original_length are the same"):
        TAKE_LENGTHS[name](original_length=8, trained_length=9)


def test_the_functions_that_take_a_trained_length() -> None:
    assert {"patch_model", "compare", "evaluate_perplexity", "diagnose", "recommend", "search"} < set(TAKE_LENGTHS)
