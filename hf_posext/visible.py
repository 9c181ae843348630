"""Escaping of untrusted text (names, labels, commands in files) for terminals, CSV files, and HTML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from typing import Any

# C0 and C1 except for tab and line feed, line separators, and the controls that reorder text (U+202A and so on).
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_FORMULA = ("=", "+", "-", "@")


def visible(text: str) -> str:
    r"""Return a text with visible control characters: escape becomes `\x1b`. Tabs and line feeds are kept."""
    return _CONTROLS.sub(lambda match: _escape(ord(match[0])), text)


def _escape(point: int) -> str:
    return f"\\x{point:02x}" if point < 256 else f"\\u{point:04x}"


def csv_cell(value: Any) -> Any:
    """Return a value as a cell of a CSV file.

    A text that a spreadsheet would evaluate (`=1+1`) gets a leading apostrophe. Numbers are unchanged.
    """
    if not isinstance(value, str):
        return value
    text = visible(value)
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text


def html_table(facts: Mapping[str, str]) -> str:
    """Return facts as an HTML table with one row per fact, for `_repr_html_` in notebooks."""
    rows = (f"<tr><th>{escape(name)}</th><td>{escape(visible(value))}</td></tr>" for name, value in facts.items())
    return f"<table>{''.join(rows)}</table>"
