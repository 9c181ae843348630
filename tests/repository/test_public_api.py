"""The front door: public names, an import that does nothing, and a base install that names the extra it lacks."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hf_posext
import hf_posext.frequency_search
from hf_posext.errors import MissingExtraError, PosExtError
from hf_posext.packages import EXTRAS, require, versions_of

from ..conftest import EXAMPLES
from ..helpers import run_python


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
    run_python("-c", code)


def test_methods_need_no_transformers() -> None:
    code = "import sys; sys.modules['transformers'] = None; from hf_posext import YaRN, list_methods; list_methods()"
    run_python("-c", code)


def test_the_methods_are_known_to_a_fresh_process() -> None:
    """Also where nothing but the table of methods was asked for."""
    methods = json.loads(run_python("-m", "hf_posext", "methods", "--json").stdout)
    assert [method["name"] for method in methods] == [method.name for method in hf_posext.list_methods()] != []


ABSENT = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

ABSENT = set(%r)
sys.meta_path.insert(0, Absent())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *given: None if name.partition(".")[0] in ABSENT else real(name, *given)
"""
BASE = """
import tempfile, torch
from transformers import AutoModelForCausalLM
from hf_posext import detect_scheme, load_patched, patch_model
for method in ("yarn", "rerope"):
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    patch = patch_model(model, method, factor=4)
    with tempfile.TemporaryDirectory() as folder:
        patch.save_pretrained(folder)
        again = load_patched(folder)
    ids = torch.arange(3, 700)[None] % 500
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits), method
    patch.undo()
"""

SEPARATOR = "-- next --"
COMMANDS = f"""
from hf_posext.cli import main
for words in %r:
    sys.argv = ["hf-posext", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, words
    print({SEPARATOR!r}, flush=True)
"""


def without_extras(code: str, absent: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run code in a process that finds none of some packages."""
    script = f"{ABSENT % (absent,)}\nMODEL = {str(EXAMPLES / 'tiny' / 'tiny-rope')!r}\n{code}"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def command(*words: str) -> str:
    return f"import sys\nsys.argv = ['hf-posext', *{words!r}]\nfrom hf_posext.cli import main\nmain()"


ALL = tuple(name for names in EXTRAS.values() for name in names)


def test_patching_loading_and_some_commands_need_the_base_install_only(tmp_path: Path) -> None:
    model, out = str(EXAMPLES / "tiny" / "tiny-rope"), tmp_path / "out"
    export = ("export", model, "--to", "vllm", "--output", str(out), "--method", "yarn", "--factor", "4")
    process = without_extras(BASE + COMMANDS % ([("methods",), ("inspect", model), export],), ALL)
    assert process.returncode == 0 and (out / "config.json").is_file(), process.stderr
    assert all("yarn" in printed for printed in process.stdout.split(SEPARATOR)[:2]), process.stdout


@pytest.mark.parametrize(
    ("words", "absent", "extra"),
    [
        (("compare", "--model", "m", "--dataset", "d", "--output", "o", "--methods", "yarn", "--lengths", "8"),)
        + (EXTRAS["eval"], "eval"),
        (("app",), ALL, "app"),
        (("gguf", "plan", "a.gguf", "b.gguf"), EXTRAS["gguf"], "gguf"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_command_names_the_extra_that_it_lacks(words: tuple[str, ...], absent: tuple[str, ...], extra: str) -> None:
    process = without_extras(command(*words), absent)
    assert process.returncode == 2
    assert f"pip install 'hf_posext[{extra}]'" in process.stderr and process.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "extras"),
    [
        ("compare", "eval"),
        ("Results", "eval"),
        ("diagnose", "eval"),
        ("recommend", "eval"),
        ("finetune", "eval,train"),
    ],
)
def test_a_function_names_the_extra_that_it_lacks(name: str, extras: str) -> None:
    process = without_extras(f"from hf_posext import {name}", ALL)
    assert process.returncode == 1
    assert f"Run: pip install 'hf_posext[{extras}]'" in process.stderr.splitlines()[-1]


def test_the_error_is_ours_and_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRAS, "eval", ("numpy", "no_such_package"))
    with pytest.raises(
        MissingExtraError, match=r"^no_such_package not installed\. Run: pip install 'hf_posext\[eval\]'$"
    ):
        require("eval")
    assert issubclass(MissingExtraError, PosExtError) and issubclass(MissingExtraError, ImportError)


def test_versions() -> None:
    versions = versions_of("hf_posext", "torch", "no-such-package")
    assert (
        versions["hf_posext"] == "0.1.0"
        and versions["torch"][0].isdigit()
        and versions["no-such-package"] == "not installed"
    )


@pytest.mark.parametrize("room", ["", ".adapters", ".evaluation", ".export", ".recommendation", ".training"])
def test_models_and_tokenizers_of_public_functions_have_types(room: str) -> None:
    module = importlib.import_module(f"hf_posext{room}")
    functions = [entry for name in module.__all__ if inspect.isfunction(entry := getattr(module, name))]
    parameters = [
        (function.__name__, parameter.name, str(parameter.annotation))
        for function in functions
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name in ("model", "tokenizer")
    ]
    assert parameters and not [entry for entry in parameters if entry[-1] == "Any"]


def test_no_deep_import_where_a_room_has_the_name() -> None:
    """Tests, examples and tools show which names are public."""
    root = Path(hf_posext.__file__).parent
    rooms = {f"hf_posext.{path.parent.name}" for path in root.glob("*/__init__.py")}
    public = {room: set(importlib.import_module(room).__all__) for room in rooms}
    files = [path for folder in ("tests", "examples", "tools") for path in (root.parent / folder).rglob("*.py")]
    deep = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("hf_posext."):
                continue
            module = str(node.module)
            room = ".".join(module.split(".")[:2])
            names = {entry.name for entry in node.names} & public.get(room, set()) if module != room else ()
            module_of_name = importlib.import_module(module) if names else None
            door = importlib.import_module(room) if names else None
            deep += [f"{path.name}: {name}" for name in names if getattr(module_of_name, name) is getattr(door, name)]
    assert deep == []


SHOWN = ["Patch", "ExtensionPlan", "PositionalScheme", "Results", "Diagnosis", "Recommendation", "SearchedFactors"]


@pytest.mark.parametrize("name", SHOWN)
def test_what_a_notebook_shows_has_the_same_verbs(name: str) -> None:
    cls: Any = getattr(hf_posext.frequency_search if name == "SearchedFactors" else hf_posext, name)
    assert {"describe", "_repr_html_"} <= set(dir(cls))
    assert "hf_posext" in Path(cls.__repr__.__code__.co_filename).parts, "not that of dataclasses"
    assert hasattr(cls, "save") or name in ("Patch", "PositionalScheme")  # a patch saves its model: save_pretrained
    assert hasattr(cls, "to_frame") == (name in ("Results", "Recommendation", "SearchedFactors"))
