"""One colour and one marker for a method in all pictures."""

from __future__ import annotations

import itertools

from matplotlib.colors import to_rgb

from hf_posext.methods import list_methods
from hf_posext.reporting.drawing import BEFORE, COLOURS, MARKERS, STYLED, method_styles
from hf_posext.reporting.signals import NEW, SHOWN


def look(name: str, *names_before: str) -> tuple[object, ...]:
    style = method_styles([*names_before, name])[name]
    return style["color"], style["marker"], style.get("linestyle"), style["fillstyle"]


def test_a_method_looks_the_same_in_every_picture() -> None:
    for name in ("yarn x8", "rerope(window=384)", "rerope+fade", "leaky-rerope(stride=3)+decay x2", "mine x4"):
        assert look(name) == look(name, "linear x8", "ntk x2", "self-extend") == look(name, "none"), name
    assert look("yarn") == look("yarn x8") == look("yarn(beta_fast=16) x2.5")
    assert look("none")[:2] == (BEFORE, "X")


def test_no_two_methods_look_alike() -> None:
    names = [info.name for info in list_methods() if info.name not in ("none", "power")]
    looks = [look(name) for name in [*names, "none"]]
    assert len(set(looks)) == len(looks)
    assert not set(COLOURS) & {SHOWN, NEW}, "which mean something else in the pictures of a diagnosis"


def test_a_composition_looks_like_its_first_component_in_a_broken_line() -> None:
    for base, component in itertools.product(("rerope", "self-extend"), ("fade", "decay", "log-n")):
        alone, composed = look(base), look(f"{base}+{component}")
        assert composed[:2] == alone[:2] and composed[2] != alone[2]
    assert look("rerope+fade") != look("rerope+decay") != look("rerope")


def test_variants_in_one_picture_are_told_apart() -> None:
    names = ["rerope(window=128)", "rerope(window=256)", "rerope(window=384)", "yarn x2", "yarn x8"]
    looks = method_styles(names)
    styles = [(looks[name]["color"], looks[name]["marker"], looks[name]["fillstyle"]) for name in names]
    assert len(set(styles)) == 5 and len({look_of_variant[:2] for look_of_variant in styles}) == 2


def test_pictures_are_legible_in_grey() -> None:
    assert len({look(name)[1] for name in STYLED[: len(MARKERS)]}) == len(MARKERS)
    for first, second in itertools.combinations(STYLED, 2):
        (color, marker, *_), (second_color, second_marker, *_) = look(first), look(second)
        if marker == second_marker:  # told apart by their lightness
            assert abs(grey(str(color)) - grey(str(second_color))) > 0.05, (first, second)


def grey(colour: str) -> float:
    """Luminance of a colour (ITU-R BT.709)."""
    red, green, blue = to_rgb(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
