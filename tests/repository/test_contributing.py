"""`CONTRIBUTING.md`: its tables are the package, and its worked example runs as a package of its own."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

from ..helpers import ROOT, run_python

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

USE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_posext import list_methods, patch_model

assert "power" in [method.name for method in list_methods()]
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=2, max_position_embeddings=16)
).eval()
ids = torch.arange(1, 33)[None]
with torch.no_grad():
    before = model(ids).logits
    with patch_model(model, "power") as patch:
        share = torch.arange(0, 16, 2) / 16
        expected = 10_000.0**-share * (1 - share) ** 0.5
        # float32, rounded through longrope's factors: two roundings of 6e-8 each and those of the formula
        torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected, rtol=1e-6, atol=0)
        assert not torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, before)
print(patch.plan.describe())
"""


def test_the_worked_example_runs_as_a_package_of_its_own(tmp_path: Path) -> None:
    (source,) = re.findall(r"```python\n(\"\"\"Power scaling.*?)```", TEXT, flags=re.S)
    (entry_point,) = re.findall(r"```toml\n\[project.entry-points.\"(.*?)\"\]\n(.*?)\n```", TEXT, flags=re.S)
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    absolute = source.replace("from ..", "from hf_posext.").replace("from .", "from hf_posext.methods.")
    (package / "power.py").write_text(absolute, encoding="utf-8")
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n", encoding="utf-8")
    group, line = entry_point
    name, target = line.replace('"', "").split(" = ")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n", encoding="utf-8")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    assert run_python("-c", USE, PYTHONPATH=paths).stdout.startswith("power: 16 -> 16 tokens")


HOUSE = TEXT.split("## The house")[1].split("\n## ")[0]


def rows_of_rooms() -> list[tuple[str, str, str]]:
    """Room, contents and prohibition of each row of the table of rooms, a row for each room that it names."""
    rows = re.findall(r"^\| (`[^|]*`) \|([^|]*)\|([^|]*)\|$", HOUSE, flags=re.M)
    return [(room, *row) for names, *row in rows for room in re.findall(r"`([\w/.]+)`", names)]


def test_the_table_of_rooms_is_the_package() -> None:
    """Every package and top-level module has a row, and everything that a row names exists."""
    rows = rows_of_rooms()
    package = ROOT / "hf_posext"
    paths = [path for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    expected = {f"{path.name}/" if path.is_dir() else path.name for path in paths} - {"__init__.py", "__main__.py"}
    named = {room for room, _, _ in rows}
    assert expected <= named and all((package / room).exists() for room in named)
    for room, contents, _ in rows:
        for name in re.findall(r"`([\w/]+(?:/|\.py))`", contents):
            assert (package / room / name).exists() or (package / name).exists(), f"{room}: {name}"


def test_what_a_room_must_not_import_is_a_contract() -> None:
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    forbidden = [
        (f"hf_posext.{room.removesuffix('/').removesuffix('.py').replace('/', '.')}", name)
        for room, _, prohibition in rows_of_rooms()
        for name in re.findall(r"import (\w+)", prohibition)
    ]
    contracts = {
        (module, name)
        for contract in linter["contracts"]
        if contract["type"] == "forbidden"
        for module in contract["source_modules"]
        for name in contract["forbidden_modules"]
    }
    assert len(forbidden) >= 8 and set(forbidden) <= contracts


def test_the_commands_of_the_table_are_targets_of_make() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    named = set(re.findall(r"^\| `make ([\w-]+)`", TEXT, flags=re.M))
    assert len(named) > 10 and named <= targets
