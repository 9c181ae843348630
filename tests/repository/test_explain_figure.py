"""The committed result files of the figure: what the page says is in them, and they are of the shipped models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = " ".join((ROOT / "docs" / "explain.md").read_text(encoding="utf-8").split())


def results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "results" / "explain" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["tiny-learned", "tiny-rope"])
def test_the_page_says_where_the_loss_departs(name: str) -> None:
    found = results(name)
    low, high = found["departure_interval"]
    assert (
        f"`{name}` {'departs ' if name == 'tiny-learned' else ''}at token {found['departure']} [{low}, {high}]" in PAGE
    )


def test_alibi_does_not_depart() -> None:
    assert results("tiny-alibi")["departure"] is None and "`tiny-alibi` nowhere" in PAGE


@pytest.mark.parametrize("name", ["tiny-learned", "tiny-alibi", "tiny-rope"])
def test_the_files_say_how_they_were_made(name: str) -> None:
    found = results(name)
    told = found["provenance"]
    assert found["model"] == f"examples/tiny/{name}" and told["dataset"] == "examples/data/heldout.jsonl"
    assert len(told["documents"]) == 8 and told["read"] == found["target_length"] == 2048
    assert told["command"] == "python tools/explain_figure.py --measure" and set(told["versions"]) >= {"torch"}
    assert (ROOT / "docs" / "images" / "explain.png").read_bytes().startswith(b"\x89PNG")
