"""The frame: what the wheel holds, what the examples hold, and files that must agree with each other."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import hf_posext
from hf_posext.packages import EXTRAS

from ..helpers import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import release_links

DATA = ROOT / "examples" / "data"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

MACHINE_PATH = re.compile(r"(?<![\w./:-])/(?:work|tmp|root|home|Users)/\w")
"""An absolute path of somebody's machine; not the tail of a URL or of a relative path."""


def repository_files() -> list[Path]:
    """Every file that git tracks, or would track if it were added now, relative to the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return [Path(name) for name in names.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, since setuptools leaves its work beside the sources."""
    source = tmp_path_factory.mktemp("source")
    for name in repository_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without network."""
    out = tmp_path_factory.mktemp("wheel")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        out,
        source,
    ]
    process = subprocess.run(build, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"hf_posext-{hf_posext.__version__}.dist-info"
    package = {name.as_posix() for name in repository_files() if name.parts[0] == "hf_posext"}
    assert "hf_posext/py.typed" in package
    assert {name for name in names if not name.startswith(f"{info}/")} == package
    assert f"{info}/licenses/LICENSE" in names


def test_the_wheel_says_what_it_needs_and_installs_the_command(wheel: Path) -> None:
    info = f"hf_posext-{hf_posext.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata: Message = message_from_bytes(archive.read(f"{info}/METADATA"))
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "hf-posext = hf_posext.cli:main" in entry_points


def test_the_sdist_holds_the_package_and_nothing_that_needs_the_repository(source: Path) -> None:
    build = "from setuptools.build_meta import build_sdist; print(build_sdist('dist'))"
    process = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    with tarfile.open(source / "dist" / process.stdout.split()[-1]) as archive:
        names = {Path(*Path(item.name).parts[1:]).as_posix() for item in archive.getmembers() if item.isfile()}
    names = {name for name in names if not name.startswith("hf_posext.egg-info/")}
    package = {name.as_posix() for name in repository_files() if name.parts[0] == "hf_posext"}
    extra = "CHANGELOG.md CITATION.cff LICENSE MANIFEST.in PKG-INFO README.md pyproject.toml setup.cfg"
    assert names == {*package, *extra.split()}


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_extras_are_those_that_the_package_asks_for(extra: str) -> None:
    required = {Requirement(item).name for item in PROJECT["optional-dependencies"][extra]} - {"hf_posext"}
    assert set(EXTRAS[extra]) == required
    assert extra in str(PROJECT["optional-dependencies"]["all"])


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    paths = []
    for name in repository_files():
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and pictures
        paths += [f"{name}: {match.group()}" for match in MACHINE_PATH.finditer(text)]
    assert paths == []


def test_machine_paths_would_be_found() -> None:
    """The check above is only as good as its pattern."""
    somewhere = "/".join(("", "home", "me", "data"))
    assert MACHINE_PATH.search(f'open("{somewhere}")')
    assert not MACHINE_PATH.search(f"https://example.org{somewhere}")


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("name", "count", "characters"), [("heldout", 8, 150_000), ("train", 8, 150_000), ("validation", 3, 40_000)]
)
def test_the_novels_are_long_texts_with_their_source(name: str, count: int, characters: int) -> None:
    novels = rows(name)
    assert len({novel["id"] for novel in novels}) == len(novels) == count
    readme = (DATA / "README.md").read_text(encoding="utf-8").replace("*", "")
    for novel in novels:
        assert set(novel) == {"id", "source", "text"}
        assert f"`{novel['id']}`" in readme
        assert novel["source"] in readme
        # The last word is whole, so the cut is at most one word short.
        assert characters - 100 < len(novel["text"]) <= characters
        assert not novel["text"][-1].isspace()


def test_no_author_is_in_two_of_the_files() -> None:
    names = ("heldout", "train", "validation")
    heldout, train, validation = ({novel["id"].split("_")[0] for novel in rows(name)} for name in names)
    assert len(train) == 8 and len(validation) == 1
    assert not heldout & train and not validation & (heldout | train)


def floor(requirement: Requirement) -> str:
    (bound,) = (item.version for item in requirement.specifier if item.operator == ">=")
    return bound


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {package.lower().replace("_", "-"): version for package, version in pairs}


def test_the_floor_that_ci_runs_is_the_one_that_is_stated() -> None:
    extras = [item for extra in ("eval", "train") for item in PROJECT["optional-dependencies"][extra]]
    required = {item.name.replace("_", "-"): item for item in map(Requirement, [*PROJECT["dependencies"], *extras])}
    del required["hf-posext"]  # an extra that contains another one
    lowest, newest = pins("constraints-floor.txt"), pins("constraints.txt")
    del lowest["torch"]  # pyproject.toml says why
    assert {name: lowest.get(name) for name in required if name != "torch"} == {
        name: floor(item) for name, item in required.items() if name != "torch"
    }
    assert [name for name, item in required.items() if newest[name] not in item.specifier] == []


def test_the_workflow_runs_what_ci_runs() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    (steps,) = re.findall(r"^steps=\((.*)\)$", script, flags=re.M)
    assert set(steps.split()) <= set(re.findall(r"run: make (\S+)", workflow))


def test_a_release_links_to_its_own_files(tmp_path: Path) -> None:
    """PyPI has no files beside README, and nothing but the release workflow knows the repository's address."""
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    repository = "https://github.com/owner/name"
    release_links.main(tmp_path, repository, "v0.1.0")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((?!https?:|mailto:|#)[^)]*\)", text) == []
    paths = re.findall(rf"{repository}/(?:blob|raw)/v0\.1\.0/([^)#]+)", text)
    assert len(paths) > 20 and [path for path in paths if not (ROOT / path).exists()] == []
    assert f"![The page of hf-posext app]({repository}/raw/v0.1.0/docs/images/app.png)" in text
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["urls"]["Repository"] == repository and project["scripts"] == PROJECT["scripts"]
    workflow = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    assert workflow.index("python tools/release_links.py") < workflow.index("python -m build")


@pytest.mark.parametrize("name", ["bug.yml", "method.yml"])
def test_issue_templates_ask_for_the_environment(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / name).read_text(encoding="utf-8"))
    (entry,) = (entry for entry in form["body"] if "hf-posext env" in entry["attributes"]["label"])
    assert entry["validations"]["required"]


@pytest.mark.parametrize("name", ["SECURITY.md", "CODE_OF_CONDUCT.md", "CITATION.cff", "LICENSE", "CHANGELOG.md"])
def test_what_a_project_has_is_there(name: str) -> None:
    assert (ROOT / name).stat().st_size > 300


def test_only_tried_versions_of_python_are_claimed() -> None:
    """The classifiers, CI's matrix, README and the lowest version agree."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    matrix = workflow["jobs"]["newest"]["strategy"]["matrix"]["python"]
    classifiers = [entry.rpartition(" ")[2] for entry in PROJECT["classifiers"] if "Python :: 3." in entry]
    assert matrix == classifiers and PROJECT["requires-python"] == f">={matrix[0]}"
    assert f"Python {matrix[0]} to {matrix[-1]}" in (ROOT / "README.md").read_text(encoding="utf-8")
