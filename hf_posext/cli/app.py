"""The application: help in order of use, options under headings, and errors as one line with exit code 2."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import CommandFunctionType

from ..errors import PosExtError
from ..version import __version__
from .console import say
from .processes import rank

COMMANDS = {
    "inspect": "Show how a model encodes position, and which methods apply.",
    "methods": "List the methods, with the paper of each.",
    "explain": "Draw what a model does past its trained length, and why.",
    "compare": "Measure a model under several methods, and write a report.",
    "evaluate": "Measure one model as it is, and write a report.",
    "recommend": "Find the method that reads a length best.",
    "search": "Search a factor for every rotary pair, as LongRoPE does.",
    "finetune": "Train a patched model on long texts.",
    "export": "Write a patched model for transformers or a server.",
    "serve": "Serve a patched model, remapped ones too.",
    "gguf": "Give a GGUF file the positions of a plan.",
    "report": "Merge the results of several runs into one report.",
    "card": "Write the model card of an extended model.",
    "app": "Open a page to play with, on this machine alone.",
    "env": "Print versions, devices, and the plan of a model.",
}
"""Summary of each command, in the order of use."""

GROUPS = {
    "Input and output": "model dataset output text_column split revision documents start control label plot "
    "as_json log_with report_to resume config trust_remote_code",
    "Positions": "methods method factor target_length trained_length original_length",
    "Training": "preset learning_rate rank lora_ratio targets length steps batch_size accumulation warmup pack pose "
    "shifted longce finetune.alpha gradient_checkpointing load_in_4bit save_every",
    "Measuring": "lengths protocol stride tail bos passkey retrieval tasks depths chat longppl alpha beta "
    "short_length budget short_limit objective population generations evaluate evaluate_split every patience",
    "Machine and memory": "dtype bf16 device prefill_chunk offload_cache seed",
}
"""Parameters under each heading. A name with a dot is a parameter of that command only."""

_HEADINGS = {name: heading for heading, names in GROUPS.items() for name in names.split()}

GREETING = """\
hf-posext extends the context of a transformers model, and measures the effect.

Three commands to begin with; a model is a folder or a Hub id:

  hf-posext inspect HuggingFaceTB/SmolLM2-135M
  hf-posext explain HuggingFaceTB/SmolLM2-135M
  hf-posext compare --model HuggingFaceTB/SmolLM2-135M --dataset TEXTS \\
      --methods none,yarn --factor 4 --lengths 2048,8192 --output report

All commands: hf-posext --help"""


def heading_of(command: str, parameter: str) -> str:
    """Return the heading under which the help of a command lists a parameter."""
    return _HEADINGS.get(f"{command}.{parameter}", _HEADINGS.get(parameter, "Options"))


class Command(TyperCommand):
    """A command whose help lists its options under headings if they fill more than a screen."""

    ENOUGH = 12
    """Fewest options that get headings."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for before, word in itertools.pairwise(["", *args]):
            if not word or word.startswith("--") and word.endswith("="):
                name = word.rstrip("=") or (before if before.startswith("-") else "each argument")
                raise typer.BadParameter(f"Expected text for {name}, got an empty one. Pass some, or leave it out.")
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        options = [param for param in self.get_params(ctx) if param.param_type_name == "option"]
        if len(options) < self.ENOUGH:
            super().format_options(ctx, formatter)
            return
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], **{heading: [] for heading in GROUPS}}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                is_option = param.param_type_name == "option"
                heading = heading_of(str(self.name), str(param.name)) if is_option else "Arguments"
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


# typer used click up to 0.2x and carries its own copy since then. This is the class that it raises in either case.
ClickException: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


class _Group(TyperGroup):
    """The commands in the order of use. Foreseen errors are one line; unforeseen ones keep their traceback."""

    def list_commands(self, ctx: Any) -> list[str]:
        names = super().list_commands(ctx)
        return [*(name for name in COMMANDS if name in names), *(name for name in names if name not in COMMANDS)]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS.get(name, "")) for name in self.list_commands(ctx)])

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
    """Application whose commands are of class [`Command`]."""

    def command(
        self, name: str | None = None, **settings: Any
    ) -> Callable[[CommandFunctionType], CommandFunctionType]:
        return super().command(name, **{"cls": Command, **settings})


app = _Typer(
    name="hf-posext",
    cls=_Group,
    help="Extend the context of a transformers model, and measure the effect.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    message = re.sub(rf"^(Expected |)({either}) (?=is |needs |to be )", lambda m: f"{m[1]}{names[m[2]]} ", message)
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


def _print_version(requested: bool) -> None:
    if requested:
        say(f"hf-posext {__version__}")
        raise typer.Exit


@app.callback()
def begin(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Print three commands to begin with if no command is given."""
    if context.invoked_subcommand is None:
        say(GREETING)


def fail(message: str) -> int:
    """Print an error on one line, and return the exit code of wrong input."""
    who = f"process {rank()}: " if rank() else ""
    say(f"error: {who}{' '.join(message.split())}", err=True)
    return 2


def main() -> None:
    """Run `hf-posext`."""
    app(prog_name="hf-posext")
