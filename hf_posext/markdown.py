"""Markdown with untrusted names, labels, and commands, which are shown literally and add no markup."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .visible import visible


def render(template: str, room: str, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any) -> str:
    """Return a filled-in template.

    In the template, untrusted values go through one of the filters `text`, `alt`, `code`, `console`, or `literal` (a
    quoted string for Python code).

    Args:
        template (`str`): file name of the template.
        room (`str`): package that contains the template.
        filters (`Mapping[str, Callable]`, *optional*): additional filters.
        values: values of the template's variables.
    """
    environment = Environment(loader=PackageLoader(room, "."), undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters.update(text=inline, alt=alt, code=code, console=console, literal=_literal, **(filters or {}))
    return environment.get_template(template).render(**values)


def inline(text: str) -> str:
    """Return a text on one line, escaped to open no HTML tag, link, or image."""
    plain = visible(" ".join(text.split()))
    plain = re.sub(r"&(?=#?\w+;)", "&amp;", plain)
    plain = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", plain)
    return re.sub(r"\](?=[(\[:])", "&#93;", plain)  # not a backslash, because a preceding backslash would cancel it


def cell(text: str) -> str:
    """Return a text for a table cell, with its pipes escaped."""
    return re.sub(r"\\*\|", lambda match: "&#92;" * (len(match[0]) - 1) + r"\|", inline(text))


def alt(text: str) -> str:
    """Return the alternative text of an image, with its brackets escaped."""
    return inline(text).replace("[", "&#91;").replace("]", "&#93;")


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
