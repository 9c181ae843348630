"""Markdown with names, labels and commands from outside: they are shown as they are, and mark up nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .visible import visible


def render(template: str, room: str, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any) -> str:
    """Fill in a template. Values from outside pass through one of the filters `text`, `alt`, `code`, `console`, and
    `literal`, a string of Python.

    Args:
        template (`str`): name of the file.
        room (`str`): package that contains it.
        filters (`Mapping[str, Callable]`, *optional*): more filters.
        values: of the template.
    """
    environment = Environment(loader=PackageLoader(room, "."), undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters.update(text=inline, alt=alt, code=code, console=console, literal=_literal, **(filters or {}))
    return environment.get_template(template).render(**values)


def inline(text: str) -> str:
    """Text on one line that opens no HTML tag, no link and no picture."""
    plain = visible(" ".join(text.split()))
    plain = re.sub(r"&(?=#?\w+;)", "&amp;", plain)
    plain = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", plain)
    return re.sub(r"\](?=[(\[:])", "&#93;", plain)  # not a backslash, which another one before it would undo


def cell(text: str) -> str:
    """Text of a cell of a table: its pipes end no cell."""
    return re.sub(r"\\*\|", lambda match: "&#92;" * (len(match[0]) - 1) + r"\|", inline(text))


def alt(text: str) -> str:
    """Description of a picture: its brackets do not end it."""
    return inline(text).replace("[", "&#91;").replace("]", "&#93;")


def code(text: str) -> str:
    """Text between backticks, more of them than it has."""
    plain = visible(" ".join(text.split()))
    fence = "`" * (_longest_run(plain) + 1)
    pad = " " if plain.startswith("`") or plain.endswith("`") else ""
    return f"{fence}{pad}{plain}{pad}{fence}"


def console(command: str) -> str:
    """A block of commands, between fences that none of its lines ends."""
    fence = "`" * max(3, _longest_run(command) + 1)
    return f"{fence}console\n{visible(command)}\n{fence}"


def _literal(text: str) -> str:
    return json.dumps(visible(text), ensure_ascii=False)


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
