"""Pages: what templates, registry and result files give is committed, links resolve, and README's Python runs."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import typer
import yaml
from huggingface_hub import ModelCard

import hf_posext
from hf_posext import list_methods
from hf_posext.cli import app
from hf_posext.decode import MAX_TOKENS
from hf_posext.edits import MAX_TABLE_BYTES
from hf_posext.errors import EvaluationError
from hf_posext.training import PRESETS

from ..conftest import tiny_llama
from ..helpers import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import readme
import results_index

WRITERS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("benchmarks", "tools")
    for path in (ROOT / folder).glob("*.py")
    if path.name != "pages.py"
    and re.search(r'"--check"|Exit\(publish\(|exit\(publish\(', path.read_text(encoding="utf-8"))
)
"""Scripts that write pages from result files."""


@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_committed_is_up_to_date(
    writer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [writer, "--check"])
    monkeypatch.syspath_prepend(ROOT / Path(writer).parent)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / writer), run_name="__main__")
    assert end.value.code in (0, None), capsys.readouterr().err


def test_make_pages_runs_every_writer() -> None:
    writers = re.search(r"^WRITERS := ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert writers and sorted(writers[1].replace("\\\n", " ").split()) == WRITERS


def test_every_method_is_in_the_table() -> None:
    table = readme.methods_table()
    files = dict(re.findall(r"^\| \[`([\w-]+)`\]\(\.\./(\S+)\) \|", table, flags=re.MULTILINE))
    assert files.keys() == {method.name for method in list_methods()}
    assert all(f'name = "{name}"' in (ROOT / file).read_text(encoding="utf-8") for name, file in files.items())


def test_the_commands_of_the_readme_exist() -> None:
    text = readme.README.read_text(encoding="utf-8")
    named = set(re.findall(r"^hf-posext (\w+)", text, flags=re.MULTILINE))
    assert named and named <= {command.name or command.callback.__name__ for command in app.registered_commands}


def test_the_python_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run both blocks of Python on a tiny model in place of the Hub's, without the measurement."""
    patching, comparison = re.findall(r"```python\n(.*?)```", readme.README.read_text("utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    record: dict[str, object] = {}
    shape = {"head_dim": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0}}
    model = tiny_llama(max_position_embeddings=8192, **shape)  # the positions of SmolLM2

    class Tokenizer:
        model_max_length = 8192

        def __call__(self, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
            return {"input_ids": torch.arange(1, 7)[None]}

        def save_pretrained(self, path: Path) -> None:
            (path / "tokenizer.json").write_text(str(self.model_max_length))

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: Tokenizer())
    names: dict[str, Any] = {"print": lambda text: record.update(described=text)}
    exec(patching, names)
    assert str(record["described"]).splitlines() == re.findall(r"^# (.*)$", patching, flags=re.MULTILINE)
    assert names["output"].shape == (1, 6 + 64)
    assert 10 <= len([line for line in patching.splitlines() if line and not line.startswith("#")]) <= 12
    assert (tmp_path / "smollm2-yarn-x4" / "model.safetensors").exists() and not names["patch"].active
    assert (tmp_path / "smollm2-yarn-x4" / "tokenizer.json").read_text() == "32768"

    def measured(*args: Any, **settings: Any) -> Any:
        request = inspect.signature(compare).bind(*args, **settings).arguments
        assert [document.id for document in request["documents"]] == ["Stevenson_Treasure_1883"]
        return SimpleNamespace(describe=lambda: str((request["methods"], request["settings"])))

    compare = hf_posext.compare
    monkeypatch.setattr(hf_posext, "compare", measured)
    exec(comparison, names)
    settings = {"factor": 2, "lengths": [8192, 16384], "start": 2000}
    assert record["described"] == str((["none", "yarn", "rerope", "rerope+fade"], settings))
    (command,) = re.findall(
        r"^hf-posext compare --model Hugging.*?$(?:\n .*$)*",
        readme.README.read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    for words in ("--methods none,yarn,rerope,rerope+fade", "--factor 2", "--lengths 8192,16384", "--start 2000"):
        assert words in command.replace("\\\n", "")


NAV = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]


def pages(nav: list[dict[str, str | list]]) -> list[str]:
    """Paths in a navigation."""
    entries = [entry for item in nav for entry in item.values()]
    return [page for entry in entries for page in ([entry] if isinstance(entry, str) else pages(entry))]


def test_bounds_that_the_page_of_patching_states() -> None:
    text = " ".join((ROOT / "docs/patching.md").read_text(encoding="utf-8").split())
    bounds = f"Lengths are limited to {MAX_TOKENS:,} tokens, and position tables to {MAX_TABLE_BYTES >> 30} GiB."
    assert bounds in text


def test_every_page_is_in_the_navigation_and_there() -> None:
    navigation = set(pages(NAV))
    written = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert written <= navigation
    unwritten = {page for page in navigation - written if not page.startswith("reference/")} - {"index.md"}
    assert all((ROOT / page).is_file() for page in unwritten)


def test_every_room_with_a_reference_page_is_there() -> None:
    rooms = [Path(page).stem for page in pages(NAV) if page.startswith("reference/")]
    assert rooms and all(
        (ROOT / "hf_posext" / room).is_dir() or (ROOT / "hf_posext" / f"{room}.py").is_file() for room in rooms
    )


def test_no_relative_link_is_dead() -> None:
    dead = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "examples" / "README.md"]:
        for link in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not (page.parent / link).exists():
                dead.append(f"{page.name}: {link}")
    assert dead == []


PAGE = " ".join((ROOT / "docs" / "explain.md").read_text(encoding="utf-8").split())


def results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "results" / "explain" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["tiny-learned", "tiny-rope"])
def test_the_page_says_where_the_loss_departs(name: str) -> None:
    diagnosis = results(name)
    low, high = diagnosis["departure_interval"]
    assert (
        f"`{name}` {'departs ' if name == 'tiny-learned' else ''}at token {diagnosis['departure']} [{low}, {high}]"
        in PAGE
    )


def test_alibi_does_not_depart() -> None:
    assert results("tiny-alibi")["departure"] is None and "`tiny-alibi` nowhere" in PAGE


@pytest.mark.parametrize("name", ["tiny-learned", "tiny-alibi", "tiny-rope"])
def test_the_files_say_how_they_were_made(name: str) -> None:
    diagnosis = results(name)
    provenance = diagnosis["provenance"]
    assert diagnosis["model"] == f"examples/tiny/{name}" and provenance["dataset"] == "examples/data/heldout.jsonl"
    assert len(provenance["documents"]) == 8 and provenance["read"] == diagnosis["target_length"] == 2048
    assert provenance["command"] == "python tools/explain_figure.py --measure" and set(provenance["versions"]) >= {
        "torch"
    }
    assert (ROOT / "docs" / "images" / "explain.png").read_bytes().startswith(b"\x89PNG")


TEXT = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8")


def test_every_preset_is_there_with_its_rate() -> None:
    rates = re.findall(r"^\| `([a-z-]+)` \|.*\| (\S+) \|$", TEXT, flags=re.MULTILINE)
    assert {name: float(rate) for name, rate in rates} == {
        name: preset.learning_rate for name, preset in PRESETS.items()
    }


def test_every_flag_exists() -> None:
    command: Any = typer.main.get_command(app)
    flags = {
        name
        for command_of_app in command.commands.values()
        for option in command_of_app.params
        for name in option.opts
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", TEXT))
    assert len(named) > 20 and named <= flags


DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "examples" / "README.md"]


def blocks(path: Path, *languages: str) -> list[str]:
    """Fenced blocks of a page in some languages."""
    fences = re.findall(r"^```(\w+)\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [block for language, block in fences if language in languages]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_of_a_page_has_its_flags(path: Path) -> None:
    group: Any = typer.main.get_command(app)
    for block in blocks(path, "bash", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.partition(" #")[0].split()
            if words[:1] != ["hf-posext"] or len(words) == 1 or words[1].startswith("-"):
                continue
            command = group.commands[words[1]]
            flags = {name for option in command.params for name in option.opts}
            unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in flags]
            assert not unknown or command.name == "serve", f"{line}: {unknown}"  # serve passes flags on


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_what_the_python_of_a_page_imports_exists(path: Path) -> None:
    for block in blocks(path, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and str(node.module).startswith("hf_posext"):
                module = importlib.import_module(str(node.module))
                assert [entry.name for entry in node.names if not hasattr(module, entry.name)] == [], block


FILES = sorted(path for folder in results_index.FOLDERS for path in (ROOT / folder).rglob("*.json"))


def test_the_page_lists_every_file() -> None:
    lines = [line for line in results_index.render(results_index.origins()).splitlines() if line.startswith("| [")]
    assert len(lines) == len([path for path in FILES if ".partial." not in path.name])


@pytest.mark.parametrize("path", FILES, ids=[path.relative_to(ROOT).as_posix() for path in FILES])
def test_every_file_says_what_made_it(path: Path) -> None:
    """A command, and the versions that it ran with."""
    origin = results_index.origin(path)
    assert origin.command is not None
    assert origin.versions is not None


@pytest.mark.parametrize("file", ["results/tiny-rope.json", "benchmarks/results/public_model.json"])
def test_an_older_schema_is_refused(file: str, tmp_path: Path) -> None:
    content = json.loads((ROOT / file).read_text(encoding="utf-8"))
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    assert results_index.origin(path, tmp_path).file == file
    path.write_text(json.dumps({**content, "schema": content["schema"] - 1}), encoding="utf-8")
    with pytest.raises(EvaluationError, match=rf"(schema|got) {content['schema'] - 1}"):
        results_index.origin(path, tmp_path)


def test_a_file_without_a_schema_where_one_is_due_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks/results/public_model.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(EvaluationError, match="Expected schema 1"):
        results_index.origin(path, tmp_path)


MODELS = ("tiny-rope", "tiny-learned", "tiny-alibi")


def check(results: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "model_card.py"), "--check", "--results", str(results)]
    return subprocess.run(command, capture_output=True, text=True)


def rows(model: str) -> list[dict[str, float]]:
    return json.loads((ROOT / "results" / f"{model}.json").read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize("model", MODELS)
def test_a_changed_figure_is_noticed(model: str, tmp_path: Path) -> None:
    results = tmp_path / "results"
    shutil.copytree(ROOT / "results", results)
    path = results / f"{model}.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["rows"][-1]["perplexity"] += 0.01
    path.write_text(json.dumps(content), encoding="utf-8")
    process = check(results)
    assert process.returncode == 1
    assert "make card" in process.stderr


def test_the_hub_library_reads_every_figure_of_every_model() -> None:
    data = ModelCard.load(ROOT / "MODEL_CARD.md").data
    assert (data.license, data.pipeline_tag, data.library_name) == ("apache-2.0", "text-generation", "transformers")
    read = [(entry.dataset_args["length"], entry.metric_value) for entry in data.eval_results]
    assert read == [
        (row["length"], round(row[key], 2))
        for model in MODELS
        for row in rows(model)
        for key in ("perplexity", "perplexity_tail", "passkey")
    ]


def test_the_index_has_an_entry_for_each_shipped_model() -> None:
    """`ModelCard` joins the entries into one model; the Hub reads the metadata block itself."""
    block = (ROOT / "MODEL_CARD.md").read_text(encoding="utf-8").split("---\n")[1]
    assert [entry["name"] for entry in yaml.safe_load(block)["model-index"]] == list(MODELS)
    assert all((ROOT / "examples" / "tiny" / model).is_dir() for model in MODELS)
