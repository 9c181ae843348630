"""The application, and what becomes of an error: one line on standard error, exit code 2."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer
from typer.models import CommandFunctionType

from ..errors import PosExtError
from ..version import __version__
from .console import say
from .help import GREETING, Command, Commands
from .processes import rank

# typer used click up to 0.2x and has carried its own copy since; this is the class of whichever it raises.
ClickException: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


class _Group(Commands):
    """Commands whose foreseen errors are one line; an unforeseen one keeps its traceback."""

    def main(self, args: Sequence[str] | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        command = next((self.commands[word] for word in words if word in self.commands), None)
        options = [parameter for parameter in command.params if parameter.name] if command else []
        try:
            code = super().main(words, **{**kwargs, "standalone_mode": False})
        except ClickException as error:
            code = fail(error.format_message() + _typed(error, words))
        except typer.Abort:
            code = 130
        except (PosExtError, OSError) as error:
            flags = {str(option.name): option.opts[0] for option in options if option.opts[0].startswith("--")}
            code = fail(in_flags(str(error), flags))
        sys.exit(code)


class _Typer(typer.Typer):
    """Commands whose help lists options under headings."""

    def command(
        self, name: str | None = None, **settings: Any
    ) -> Callable[[CommandFunctionType], CommandFunctionType]:
        return super().command(name, **{"cls": Command, **settings})


app = _Typer(
    name="hf-posext",
    cls=_Group,
    help="Read longer than trained: change how a transformers model encodes position, and measure what that did.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """
    A message of the package, which names keyword arguments, in the flags of a command.

    `factor=8` becomes `--factor 8`, `lengths=[512, 1024]` becomes `--lengths 512,1024`, `longppl=` becomes
    `--longppl`, and so does a name at the beginning, as in "stride is 0". Parameters of methods, as in
    `yarn(beta_fast=16)`, and names that the command does not have stay as they are.

    Args:
        message (`str`): what went wrong.
        flags (`Mapping[str, str]`): of the command, by the name of the argument.
    """
    if "trained_length" in flags:
        message = message.replace("original_length", "trained_length")
    names = {**flags, **({"limit": flags["documents"]} if "documents" in flags else {})}
    if not names:
        return message
    either = "|".join(sorted(names, key=len, reverse=True))
    value = r"""\[[^\]]*\]|'[^']*'|"[^"]*"|[\w./-]*[\w/-]|(?=\W|$)"""

    def flag(match: re.Match[str]) -> str:
        if match["method"]:
            return match["method"]
        text = (match["value"] or "").strip("[]").replace("'", "").replace('"', "").replace(", ", ",")
        text = "" if text == "True" else text.removeprefix("torch.")
        return f"{names[match['name']]} {text}".strip()

    keyword = rf"(?P<method>\w+\([^()]*\))|(?<![\w.-])(?P<name>{either})=(?P<value>{value})"
    message = re.sub(keyword, flag, message)
    message = re.sub(rf"^({either}) (?=is |needs )", lambda match: f"{names[match[1]]} ", message)
    compound = "|".join(name for name in names if "_" in name)
    if compound:
        message = re.sub(rf"(?<![\w/.-])({compound})(?![\w./])", lambda match: names[match[1]], message)
    return message


def _typed(error: Any, words: Sequence[str]) -> str:
    """Return the text typed for an option if the message does not contain it."""
    option = getattr(error, "param", None)
    given = [
        value
        for word, value in itertools.pairwise(words)
        if option is not None and word in option.opts and repr(value) not in error.format_message()
    ]
    return f" (got {given[-1]!r})" if given else ""


def _print_version(asked: bool) -> None:
    if asked:
        say(f"hf-posext {__version__}")
        raise typer.Exit


@app.callback()
def begin(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Print how to begin, where no command is given."""
    if context.invoked_subcommand is None:
        say(GREETING)


def fail(message: str) -> int:
    """Says what is wrong, on one line, and gives the exit code of wrong input."""
    who = f"process {rank()}: " if rank() else ""
    say(f"error: {who}{' '.join(message.split())}", err=True)
    return 2


def main() -> None:
    """The entry point `hf-posext`."""
    app(prog_name="hf-posext")
