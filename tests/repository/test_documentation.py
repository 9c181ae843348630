"""Pages and their links. `make docs` builds the site strictly; this needs no environment of its own."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
NAV = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]


def pages(nav: list[dict[str, str | list]]) -> list[str]:
    """Paths in a navigation."""
    entries = [entry for item in nav for entry in item.values()]
    return [page for entry in entries for page in ([entry] if isinstance(entry, str) else pages(entry))]


def test_every_page_is_in_the_navigation_and_there() -> None:
    listed = set(pages(NAV))
    written = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert written <= listed
    rest = {page for page in listed - written if not page.startswith("reference/")} - {"index.md"}
    assert all((ROOT / page).is_file() for page in rest)


def test_every_room_with_a_reference_page_is_there() -> None:
    rooms = [Path(page).stem for page in pages(NAV) if page.startswith("reference/")]
    assert all((ROOT / "hf_posext" / room).is_dir() or (ROOT / "hf_posext" / f"{room}.py").is_file() for room in rooms)


def test_no_relative_link_is_dead() -> None:
    dead = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "examples" / "README.md"]:
        for link in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not (page.parent / link).exists():
                dead.append(f"{page.name}: {link}")
    assert dead == []
