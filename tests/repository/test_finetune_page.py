"""docs/finetune.md says what there is: presets, rates, flags."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer

from hf_posext.cli import app
from hf_posext.training import PRESETS

TEXT = (Path(__file__).parents[2] / "docs" / "finetune.md").read_text(encoding="utf-8")


def test_every_preset_is_there_with_its_rate() -> None:
    found = re.findall(r"^\| `([a-z-]+)` \|.*\| (\S+) \|$", TEXT, flags=re.MULTILINE)
    assert {name: float(rate) for name, rate in found} == {name: one.learning_rate for name, one in PRESETS.items()}


def test_every_flag_exists() -> None:
    command: Any = typer.main.get_command(app)
    known = {name for one in command.commands.values() for option in one.params for name in option.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", TEXT))
    assert len(named) > 20 and named <= known
