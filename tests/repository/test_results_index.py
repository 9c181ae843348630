"""Committed result files are of the schema that the code reads, and a page lists them all."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import results_index  # noqa: E402

from hf_posext.errors import EvaluationError  # noqa: E402

FILES = sorted(path for folder in results_index.FOLDERS for path in (ROOT / folder).rglob("*.json"))


def test_the_page_lists_every_file() -> None:
    text = results_index.render(results_index.origins())
    assert results_index.PAGE.read_text(encoding="utf-8") == text, "run: python tools/results_index.py"
    lines = [line for line in text.splitlines() if line.startswith("| [")]
    assert len(lines) == len([path for path in FILES if ".partial." not in path.name])


@pytest.mark.parametrize("path", FILES, ids=[path.relative_to(ROOT).as_posix() for path in FILES])
def test_every_file_says_what_made_it(path: Path) -> None:
    """A command, and the versions that it ran with; the sweeps of `recommend` and `search` contain none so far."""
    found = results_index.origin(path)
    assert found.command is not None
    assert found.versions is not None or path.parent.name in ("recommend", "search")


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
