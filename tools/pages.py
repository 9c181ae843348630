"""Generated pages: templates, tables, and a command line that writes pages or checks the committed ones."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

ROOT = Path(__file__).resolve().parent.parent


def fill(template: Path, **values: Any) -> str:
    """Return a template filled with values. A name without a value is an error."""
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    return environment.from_string(template.read_text(encoding="utf-8")).render(values)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table. Columns after the first `left` are aligned to the right."""
    rule = ["---"] * left + ["---:"] * (len(heads) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows))


def between_marks(page: Path, begin: str, end: str, text: str) -> str:
    """Return a page with the text between its marks replaced."""
    before, _, after_begin = page.read_text(encoding="utf-8").partition(begin)
    return f"{before}{begin}{text}{end}{after_begin.partition(end)[2]}"


def publish(
    description: str | None,
    render: Callable[[], Mapping[Path, str]],
    *,
    collect: Callable[[], object] | None = None,
    written: Callable[[], object] | None = None,
) -> int:
    """
    Write pages, or with `--check` compare the committed pages with the rendered ones.

    Args:
        description (`str`, *optional*): docstring of the script.
        render (`Callable`): returns the text of each page.
        collect (`Callable`, *optional*): takes result files from the last run, with `--collect`.
        written (`Callable`, *optional*): draws pictures after the pages are written.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 if a committed page is out of date")
    if collect is not None:
        parser.add_argument("--collect", action="store_true", help="take the result files of the last run first")
    arguments = parser.parse_args()
    if collect is not None and arguments.collect:
        collect()
    pages = render()
    stale = [page.name for page, text in pages.items() if not page.is_file() or page.read_text("utf-8") != text]
    if arguments.check:
        if stale:
            print(f"out of date: {', '.join(stale)}. Run python {Path(sys.argv[0]).name}.", file=sys.stderr)
        return int(bool(stale))
    for page, text in pages.items():
        page.write_text(text, encoding="utf-8")
    if written is not None:
        written()
    return 0
