"""The application, and what becomes of an error: one line on standard error, exit code 2."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from ..errors import PosExtError


class _Group(TyperGroup):
    """Commands whose foreseen errors are one line; an unforeseen one keeps its traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except typer.TyperException as error:
            code = fail(error.format_message())
        except (PosExtError, OSError) as error:
            code = fail(str(error))
        sys.exit(code)


app = typer.Typer(
    name="hf-posext",
    cls=_Group,
    help="Read longer than trained: change how a transformers model encodes position, and measure what that did.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def fail(message: str) -> int:
    """Says what is wrong, on one line, and gives the exit code of wrong input."""
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return 2


def main() -> None:
    """The entry point `hf-posext`."""
    app(prog_name="hf-posext")
