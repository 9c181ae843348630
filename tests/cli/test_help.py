"""The face of the command line: version, completion, greeting, order, groups and `env`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import typer

import hf_posext
from hf_posext.cli import app
from hf_posext.cli.app import COMMANDS, GREETING, GROUPS, Command, heading_of

from .helpers import MODEL, error_of, run

GROUP = typer.main.get_command(app)


def test_version() -> None:
    assert run("--version").stdout == f"hf-posext {hf_posext.__version__}\n"


def test_without_a_command_there_are_three_to_begin_with() -> None:
    result = run()
    assert result.exit_code == 0 and result.stdout == f"{GREETING}\n"
    begun = [line.split()[1] for line in GREETING.splitlines() if line.startswith("  hf-posext ")]
    assert len(begun) == 3 and set(begun) <= set(COMMANDS)
    assert max(map(len, GREETING.splitlines())) <= 80


def test_commands_stand_in_the_order_of_use_and_summaries_are_whole() -> None:
    shown = run("--help").stdout
    listed = [line.split()[0] for line in shown.split("Commands:")[1].splitlines() if line.strip()]
    assert listed == list(COMMANDS) and set(listed) == set(GROUP.commands)
    assert "..." not in shown.split("Commands:")[1] and max(map(len, shown.splitlines())) <= 80


def test_every_option_of_a_long_command_has_a_heading() -> None:
    names = set()
    for name, command in GROUP.commands.items():
        assert isinstance(command, Command)
        options = [option.name for option in command.params if option.param_type_name == "option"]
        names |= {*options, *(f"{name}.{option}" for option in options)}
        if len(options) >= Command.ENOUGH:
            assert [option for option in options if heading_of(name, option) == "Options"] == []
    assert {name for listed in GROUPS.values() for name in listed.split()} <= names


def test_headings_are_shown_and_no_option_is_lost() -> None:
    shown = run("compare", "--help").stdout
    assert all(f"\n{heading}:\n" in shown for heading in GROUPS if heading != "Training")
    for option in GROUP.commands["compare"].params:
        assert option.hidden or f"\n  {option.opts[0]} " in shown


def test_completion() -> None:
    asked = {"_HF_POSEXT_COMPLETE": "complete_bash", "COMP_WORDS": "hf-posext in", "COMP_CWORD": "1"}
    code = "from hf_posext.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True)
    assert done.stdout.split() == ["inspect"]


def test_env(patched: Path) -> None:
    lines = run("env").stdout.splitlines()
    assert lines[0].split() == ["hf_posext", hf_posext.__version__] and lines[-1].startswith("device")
    found = json.loads(run("env", patched, "--json").stdout)
    assert found["plan"]["method"] == "rerope(window=32)" and found["versions"]["torch"][0].isdigit()
    assert run("env", MODEL).stdout.splitlines()[-1].split() == ["plan", "none"]
    assert "no such folder" in error_of(run("env", "./no/such/model"))
