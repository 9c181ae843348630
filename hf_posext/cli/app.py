"""The application, and what becomes of an error: one line on standard error, exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from ..errors import PosExtError
from .processes import rank

# typer used click up to 0.2x and has carried its own copy since; this is the class of whichever it raises.
ClickException: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


class _Group(TyperGroup):
    """Commands whose foreseen errors are one line; an unforeseen one keeps its traceback."""

    def main(self, args: Sequence[str] | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        try:
            code = super().main(words or ["--help"], **{**kwargs, "standalone_mode": False})
        except ClickException as error:
            code = fail(error.format_message())
        except typer.Abort:
            code = 130
        except (PosExtError, OSError) as error:
            code = fail(str(error))
        sys.exit(code)


app = typer.Typer(
    name="hf-posext",
    cls=_Group,
    help="Read longer than trained: change how a transformers model encodes position, and measure what that did.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def fail(message: str) -> int:
    """Says what is wrong, on one line, and gives the exit code of wrong input."""
    who = f"process {rank()}: " if rank() else ""
    typer.echo(f"error: {who}{' '.join(message.split())}", err=True)
    return 2


def main() -> None:
    """The entry point `hf-posext`."""
    app(prog_name="hf-posext")
