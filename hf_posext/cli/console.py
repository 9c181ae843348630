"""Text that a command prints: lines without control characters, plain tables, and errors as one line."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..decode import in_words
from ..escaping import visible
from ..evaluation.config import bounds_in_words
from ..processes import rank

KEYWORDS = {"limit": "documents", "ratio": "lora_ratio"}
"""Keyword arguments of the package whose options have other names."""


class PlainConsole(Console):
    """A console of 80 columns that prints tables without adding colors."""

    def __init__(self) -> None:
        super().__init__(width=80, highlight=False)

    def render_str(self, text: str, **settings: Any) -> Text:  # called for every string, including cells of tables
        return super().render_str(visible(text), **settings)


def plain_table(**settings: Any) -> Table:
    """Return a table without edges, whose only line is below its head."""
    return Table(**{"box": box.SIMPLE_HEAD, "show_edge": False, "pad_edge": False, **settings})


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Print names and their values in two columns."""
    table = plain_table(box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in facts:
        table.add_row(name, escape(value))
    PlainConsole().print(table)


def say(message: str, err: bool = False) -> None:
    """Print a line to standard output, or to standard error."""
    typer.echo(visible(message), err=err)


def fail(message: str) -> int:
    """Print an error on one line, and return the exit code of wrong input."""
    who = f"process {rank()}: " if rank() else ""
    say(f"error: {who}{' '.join(message.split())}", err=True)
    return 2


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """Return a message of the package with the flags of a command in place of keyword arguments.

    `factor=8` becomes `--factor 8`, `lengths=[512, 1024]` becomes `--lengths 512,1024`, `longppl=` becomes
    `--longppl`, and so does a name at the beginning, as in "stride is 0" and "Expected factor to be". Parameters of
    methods, as in `yarn(beta_fast=16)`, and names that the command does not have stay as they are.

    Args:
        message (`str`): text of an error.
        flags (`Mapping[str, str]`): flags of the command by the name of the argument.
    """
    if "trained_length" in flags:
        message = message.replace("original_length", "trained_length")
    names = {**flags, **{name: flags[option] for name, option in KEYWORDS.items() if option in flags}}
    if not names:
        return message
    pattern = "|".join(sorted(names, key=len, reverse=True))
    value = r"""\[[^\]]*\]|'[^']*'|"[^"]*"|[\w./-]*[\w/-]|(?=\W|$)"""

    def flag(match: re.Match[str]) -> str:
        if match["method"]:
            return match["method"]
        text = (match["value"] or "").strip("[]").replace("'", "").replace('"', "").replace(", ", ",")
        text = "" if text == "True" else text.removeprefix("torch.")
        return f"{names[match['name']]} {text}".strip()

    keyword = rf"(?P<method>\w+\([^()]*\))|(?<![\w.-])(?P<name>{pattern})=(?P<value>{value})"
    message = re.sub(keyword, flag, message)
    message = re.sub(rf"^(Expected |)({pattern}) (?=is |needs |to be )", lambda m: f"{m[1]}{names[m[2]]} ", message)
    compound = "|".join(name for name in names if "_" in name)
    if compound:
        message = re.sub(rf"(?<![\w/.-])({compound})(?![\w./])", lambda match: names[match[1]], message)
    return message


def name_of(parameter: Any) -> str:
    """Return the flag of an option, or the name of an argument in the help."""
    return str(parameter.opts[0] if parameter.param_type_name == "option" else parameter.metavar)


def naming_flag(message: str, parameters: Sequence[Any], values: Mapping[str, Any]) -> str:
    """Return a message that names a flag or argument: if it names none, that whose value it quotes comes first.

    Args:
        message (`str`): text of an error.
        parameters (`Sequence`): parameters of the command, of typer.
        values (`Mapping[str, Any]`): their values by name.
    """
    if any(name_of(parameter) in message for parameter in parameters):
        return message
    for parameter in parameters:
        value = values.get(parameter.name)
        if value != parameter.default and not isinstance(value, int | float):
            texts = list(map(str, value)) if isinstance(value, list) else [str(value), *str(value).split(",")]
            # A word may stand in any sentence, so that it has to be in quotes.
            if any((repr(text) if text.isalnum() else text) in message for text in texts):
                return f"{name_of(parameter)}: {message}"
    return message


def refusal(error: Any, command: Any, value: object) -> str:
    """Return an error of typer in the form of this package, "Expected X, got Y. Pass Z."

    Args:
        error: error that typer raised while it read the words of a command.
        command: the command.
        value (`object`): the text that is wrong, if it is that of an option or argument.
    """
    name = getattr(error, "option_name", None)
    param = getattr(error, "param", None) or next((param for param in command.params if name in param.opts), None)
    if param is None and name is not None:
        path, near = error.ctx.command_path, " or ".join(getattr(error, "possibilities", None) or ())
        return f"Expected an option of {path}, got {name}. {f'Pass {near}, or see' if near else 'See'} {path} --help."
    if param is None:
        return str(error.format_message())
    flag, (kind, declared) = name_of(param), _declaration(command, param)
    if hasattr(error, "param_type"):  # the parameter is missing
        return f"Expected {flag}, got none. Pass {flag}: {declared.help}"
    if getattr(param, "is_flag", False):
        return f"Expected {flag} without a value, got {value!r}. Pass {flag} alone."
    example = EXAMPLE if param.default is None and kind.startswith("a whole number") else param.default
    advice = f"{flag} {example}"
    if example is None:
        advice = kind if param.required else f"{kind}, or leave {flag} out"
    typed = "none" if value is None else repr(" ".join(value) if isinstance(value, tuple) else value)
    return f"Expected {flag} to be {kind}, got {typed}. Pass {advice}."


EXAMPLE = 8
"""Whole number within the bounds of every option without a default."""


def _declaration(command: Any, param: Any) -> tuple[str, Any]:
    """Return the type and bounds of a parameter in words, and what `typer.Option` or `typer.Argument` declares."""
    hint, declared = get_args(inspect.signature(command.callback, eval_str=True).parameters[param.name].annotation)
    if isinstance(hint, types.UnionType):
        (hint,) = (option for option in get_args(hint) if option is not type(None))
    if get_origin(hint) is list:
        (hint,) = get_args(hint)
    if hint is Path:
        places = {"file": declared.file_okay, "folder": declared.dir_okay}
        return f"a {' or '.join(place for place, is_okay in places.items() if is_okay)}", declared
    return f"{in_words(hint)}{bounds_in_words(declared.min, declared.max)}", declared
