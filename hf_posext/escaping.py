"""Untrusted text (names, labels, commands in files) shown literally in terminals, CSV files, HTML, and Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

# C0 and C1 except for tab and line feed, line separators, and the controls that reorder text (U+202A and so on).
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
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


def render(template: str, room: str, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any) -> str:
    """Return a filled-in template.

    In the template, untrusted values go through one of the filters `text`, `prose`, `alt`, `code`, `console`, or
    `literal` (a quoted string for Python code).

    Args:
        template (`str`): file name of the template.
        room (`str`): package that contains the template.
        filters (`Mapping[str, Callable]`, *optional*): additional filters.
        values: values of the template's variables.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined  # the others need the standard library only

    environment = Environment(loader=PackageLoader(room, "."), undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters.update(text=inline, prose=prose, alt=alt, code=code, console=console, literal=_literal)
    environment.filters.update(filters or {})
    return environment.get_template(template).render(**values)


# Characters where Markdown or GitHub gives them a meaning: escapes, emphasis, code, formulas, links, HTML, entities.
# Underscores inside a word have none.
_MARKUP = re.compile(
    r"\\(?=[!-/:-@\[-`{-~]|$)|[`*~$]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])|<(?=[A-Za-z/!?])|&(?=#?\w+;)|(?<= )#(?=#*$)"
)
_OPENING = re.compile(r"^([#>+=-])|^(\d+)([.)])(?=\s|$)")


def _unmarked(text: str) -> str:
    """Return a text on one line in which Markdown finds no markup, by entities where it would find some."""
    return _MARKUP.sub(_entity, visible(" ".join(text.split())))


def _entity(match: re.Match[str]) -> str:
    return {"<": "&lt;", "&": "&amp;"}.get(match[0]) or f"&#{ord(match[0])};"


def prose(text: str) -> str:
    """Return a sentence of this package on one line, in which only its code spans are markup."""
    parts = re.split("(`[^`]+`)", visible(" ".join(text.split())))
    return "".join(part if index % 2 else _MARKUP.sub(_entity, part) for index, part in enumerate(parts))


def inline(text: str) -> str:
    """Return a text on one line that renders as it is, even at the beginning of a paragraph."""
    plain = _unmarked(text)
    return _OPENING.sub(lambda match: f"{match[2] or ''}&#{ord(match[1] or match[3])};", plain)


def cell(text: str) -> str:
    """Return a text for a table cell, with its pipes escaped."""
    return _unmarked(text).replace("|", r"\|")


def alt(text: str) -> str:
    """Return the alternative text of an image, with its brackets escaped."""
    return _unmarked(text).replace("[", "&#91;").replace("]", "&#93;")


def code(text: str) -> str:
    """Return a text as inline code, fenced by more backticks than any run of them in the text."""
    plain = visible(" ".join(text.split()))
    fence = "`" * (_longest_run(plain) + 1)
    pad = " " if plain.startswith("`") or plain.endswith("`") else ""
    return f"{fence}{pad}{plain}{pad}{fence}"


def console(command: str) -> str:
    """Return commands as a console block, with a fence longer than any run of backticks in them."""
    fence = "`" * max(3, _longest_run(command) + 1)
    return f"{fence}console\n{visible(command)}\n{fence}"


def _literal(text: str) -> str:
    return json.dumps(visible(text), ensure_ascii=False)


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
