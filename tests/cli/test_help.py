"""The face of the command line: version, completion, greeting, order and groups; `inspect`, `methods` and `env`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import typer
from transformers import AutoModelForCausalLM

import hf_posext
from hf_posext import patch_model
from hf_posext.cli import app
from hf_posext.cli.app import COMMANDS, GREETING, GROUPS, Command, heading_of

from ..conftest import EXAMPLES
from ..helpers import run_python
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
    text = run("--help").stdout
    names = [line.split()[0] for line in text.split("Commands:")[1].splitlines() if line.strip()]
    assert names == list(COMMANDS) and set(names) == set(GROUP.commands)
    assert "..." not in text.split("Commands:")[1] and max(map(len, text.splitlines())) <= 80


def test_every_option_of_a_long_command_has_a_heading() -> None:
    names = set()
    for name, command in GROUP.commands.items():
        assert isinstance(command, Command)
        options = [option.name for option in command.params if option.param_type_name == "option"]
        names |= {*options, *(f"{name}.{option}" for option in options)}
        if len(options) >= Command.ENOUGH:
            assert [option for option in options if heading_of(name, option) == "Options"] == []
    assert {name for flags in GROUPS.values() for name in flags.split()} <= names


def test_headings_are_shown_and_no_option_is_lost() -> None:
    text = run("compare", "--help").stdout
    assert all(f"\n{heading}:\n" in text for heading in GROUPS if heading != "Training")
    for option in GROUP.commands["compare"].params:
        assert option.hidden or f"\n  {option.opts[0]} " in text


def test_arguments_are_named_as_in_a_manual_and_options_stand_with_their_group() -> None:
    """Typer puts required arguments in braces, and prints `list[str]` as their type."""
    explain, report, training = (run(name, "--help").stdout for name in ("explain", "report", "finetune"))
    assert "[OPTIONS] MODEL..." in explain and "  MODEL <str>..." in explain
    assert "[OPTIONS] RESULTS..." in report and "  RESULTS <Path>..." in report
    flags = re.findall(r"^  (--[\w-]+)", training, flags=re.MULTILINE)
    assert flags.index("--rank") + 1 == flags.index("--alpha")


def test_completion() -> None:
    completion = {"_HF_POSEXT_COMPLETE": "complete_bash", "COMP_WORDS": "hf-posext in", "COMP_CWORD": "1"}
    code = "from hf_posext.cli import main; main()"
    assert run_python("-c", code, **completion).stdout.split() == ["inspect"]


def test_env(patched: Path) -> None:
    lines = run("env").stdout.splitlines()
    assert lines[0].split() == ["hf_posext", hf_posext.__version__] and lines[-1].startswith("device")
    environment = json.loads(run("env", patched, "--json").stdout)
    assert environment["plan"]["method"] == "rerope(window=32)" and environment["versions"]["torch"][0].isdigit()
    assert run("env", MODEL).stdout.splitlines()[-1].split() == ["plan", "none"]
    assert "no such folder" in error_of(run("env", "./no/such/model"))


def test_inspect_needs_the_config_alone(tmp_path: Path) -> None:
    shutil.copy(MODEL / "config.json", tmp_path)
    result = run("inspect", tmp_path)
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    assert "positions rotary (generalization: interpolation)" in words
    assert "trained length 512 tokens (max_position_embeddings of the config)" in words
    assert "theta 10000, 32 pairs, rope type default" in words and "yarn" in words
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_inspect_says_which_methods_do_not_apply_and_why() -> None:
    result = run("inspect", EXAMPLES / "tiny" / "tiny-alibi")
    assert "yarn: extends rotary positions; bloom has alibi" in " ".join(result.stdout.split())
    inspection = json.loads(run("inspect", EXAMPLES / "tiny" / "tiny-alibi", "--json").stdout)
    assert inspection["scheme"]["kind"] == "alibi" and inspection["scheme"]["generalization"] == "extrapolation"
    assert inspection["methods"]["none"] is None and "bloom has alibi" in inspection["methods"]["yarn"]


def test_inspect_tells_a_model_with_a_patch_as_it_is_without_and_the_plan(tmp_path: Path, adapter: Path) -> None:
    """The config beside the plan says 2048 tokens, which the model was not trained on."""
    with patch_model(AutoModelForCausalLM.from_pretrained(MODEL), "rerope", factor=4) as patch:
        patch.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["max_position_embeddings"] == 2048
    for folder, method, lengths in ((tmp_path, "rerope", "512 -> 2048"), (adapter, "yarn", "64 -> 128")):
        words = " ".join(run("inspect", folder).stdout.split())
        assert f"in force {method}: {lengths} tokens" in words
        assert "trained length 512 tokens (max_position_embeddings of the config)" in words
        inspection = json.loads(run("inspect", folder, "--json").stdout)
        assert inspection["plan"]["method"] == method and inspection["scheme"]["trained_length"] == 512
        assert inspection["base"] == (str(MODEL) if folder == adapter else None)
    assert json.loads(run("inspect", MODEL, "--json").stdout)["plan"] is None


def test_methods_are_listed_with_their_papers() -> None:
    entries = json.loads(run("methods", "--json").stdout)
    table = run("methods").stdout
    assert {"none", "linear", "ntk", "yarn", "longrope", "llama3"} <= {method["name"] for method in entries}
    for method in entries:
        assert f"\n{method['name']} " in table and method["url"] in table, "the whole link must be there to be copied"
    assert max(map(len, table.splitlines())) <= 80


def test_the_module_runs_and_its_help_loads_no_torch() -> None:
    assert "--trained-length" in run_python("-m", "hf_posext", "compare", "--help").stdout
    heavy = "{'torch', 'transformers', 'datasets', 'matplotlib'}"
    code = f"import sys; import hf_posext.cli; sys.exit(bool({heavy} & set(sys.modules)))"
    run_python("-c", code)


def test_the_module_refuses_wrong_input_with_exit_code_2() -> None:
    refused = subprocess.run([sys.executable, "-m", "hf_posext", "compar"], capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr == "error: Expected a command, got 'compar'. Pass compare, card.\n"
