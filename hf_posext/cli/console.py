"""Standard output and standard error, with control characters made visible instead of sent to the terminal."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from ..escaping import visible


class PlainConsole(Console):
    """A console of 80 columns that prints tables without adding colors."""

    def __init__(self) -> None:
        super().__init__(width=80, highlight=False)

    def render_str(self, text: str, **settings: Any) -> Text:  # called for every string, including cells of tables
        return super().render_str(visible(text), **settings)


def say(message: str, err: bool = False) -> None:
    """Print a line to standard output, or to standard error."""
    typer.echo(visible(message), err=err)
