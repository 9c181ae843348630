"""The front door: exactly these names, and importing it does nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import hf_posext


def test_every_public_name_resolves_and_is_documented() -> None:
    assert list(hf_posext.__all__) == sorted(hf_posext.__all__)
    for name in hf_posext.__all__:
        assert getattr(hf_posext, name).__doc__, name
    assert set(dir(hf_posext)) == {*hf_posext.__all__, "__version__"}


def test_the_fixed_names_are_there() -> None:
    fixed = "patch_model unpatch_model detect_scheme list_methods compare evaluate_perplexity load_patched YaRN"
    assert set(fixed.split()) <= set(hf_posext.__all__)


def test_importing_loads_nothing_heavy_and_patches_nothing() -> None:
    code = (
        "import sys; import hf_posext; "
        "heavy = {'torch', 'transformers', 'datasets', 'pandas', 'matplotlib', 'scipy', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_methods_need_no_transformers() -> None:
    code = "import sys; sys.modules['transformers'] = None; from hf_posext import YaRN, list_methods; list_methods()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_methods_are_known_to_a_fresh_process() -> None:
    """Also where nothing but the table of methods was asked for."""
    command = [sys.executable, "-m", "hf_posext", "methods", "--json"]
    listed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert [method["name"] for method in listed] == [method.name for method in hf_posext.list_methods()] != []
