"""README.md and docs/results.md are what templates, registry and result files give; README's Python runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import readme  # noqa: E402

import hf_posext  # noqa: E402
from hf_posext import list_methods  # noqa: E402
from hf_posext.cli import app  # noqa: E402

from ..conftest import tiny_llama  # noqa: E402


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_what_is_committed_is_up_to_date(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == readme.render(page), "run: python tools/readme.py"


def test_every_method_is_in_the_table() -> None:
    table = readme.methods_table()
    assert all(f"| `{method.name}` |" in table for method in list_methods())


@pytest.mark.parametrize("page", [readme.README, *(ROOT / "docs").glob("*.md")], ids=lambda page: page.name)
def test_every_link_and_picture_is_there(page: Path) -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


def test_the_commands_of_the_readme_exist() -> None:
    text = readme.README.read_text(encoding="utf-8")
    named = set(re.findall(r"^hf-posext (\w+)", text, flags=re.MULTILINE))
    assert named and named <= {command.name or command.callback.__name__ for command in app.registered_commands}


def test_the_python_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run the first block of Python on a tiny model in place of the Hub's, without the measurement."""
    code = re.search(r"```python\n(.*?)```", readme.README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "novels.jsonl").write_text('{"text": "Once upon a time."}\n', encoding="utf-8")
    seen: dict[str, object] = {}
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: tiny_llama())
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: None)
    monkeypatch.setattr(hf_posext, "compare", lambda *args, **kwargs: seen.update(methods=args[3]))
    names: dict[str, object] = {"print": lambda text: seen.update(described=text)}
    exec(code[1], names)
    assert seen["methods"] == ["none", "yarn", "rerope"] and "yarn" in str(seen["described"])
    assert (tmp_path / "smollm2-yarn-x4" / "model.safetensors").exists() and not names["patch"].active  # type: ignore[attr-defined]
