"""The application: help in order of use, options under headings, and errors as one line with exit code 2."""

from __future__ import annotations

import difflib
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .. import __version__
from ..decode import MAX_NUMBER
from ..errors import PosExtError
from .console import fail, in_flags, name_of, naming_flag, refusal, say
from .options import FORMER, derived

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
    "Positions": "methods method factor target_length trained_length",
    "Training": "preset learning_rate rank finetune.alpha lora_ratio targets length steps batch_size accumulation "
    "warmup pack pose shifted longce gradient_checkpointing load_in_4bit save_every",
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


# typer used click up to 0.2x and carries its own copy since then. This is the class that it raises in either case.
ClickException: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


@contextmanager
def in_house(command: Any, ctx: Any, args: Sequence[str]) -> Iterator[None]:
    """Put errors of typer inside the block into the form of this package."""
    args = list(args)  # typer empties it
    try:
        yield
    except ClickException as error:
        param = getattr(error, "param", None)
        value = typed = None
        if param is not None:  # read again, as the error does not contain the value, which may be one of --config
            options, _, _ = command.make_parser(ctx).parse_args(args=[*args])
            value, _ = param.consume_value(ctx, options)
        elif option := getattr(error, "option_name", None):
            typed = next((word for word in args if word.startswith(f"{option}=")), None)
            value = typed and typed.partition("=")[2]
        raise ClickException(refusal(error, command, value)) from error


class Command(TyperCommand):
    """A command that refuses empty texts and endless numbers, and lists many options under headings."""

    ENOUGH = 12
    """Fewest options that get headings."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        flags = {flag for param in self.params for flag in param.opts}
        for former, present in FORMER.items():
            if present in flags and any(word.partition("=")[0] == former for word in args):
                say(f"{former} is now called {present}", err=True)
                args = [word.replace(former, present, 1) if word.startswith(former) else word for word in args]
        for before, word in itertools.pairwise(["", *args]):
            if not word or word.startswith("--") and word.endswith("="):
                arguments = ", ".join(name_of(param) for param in self.params if param.param_type_name == "argument")
                name = word.rstrip("=") or (before if before.startswith("-") else arguments)
                raise ClickException(f"Expected text for {name}, got an empty one. Pass some, or leave it out.")
        takes_more, ctx.allow_extra_args = ctx.allow_extra_args, True  # others are refused below
        with self.naming_flags(ctx), in_house(self, ctx, args):
            remaining = super().parse_args(ctx, args)
        if remaining and not takes_more:
            path = ctx.command_path
            raise ClickException(f"Expected only what {path} takes, got {' '.join(remaining)!r}. See {path} --help.")
        params: list[Any] = self.params
        for param in params:
            number = ctx.params.get(param.name)
            if isinstance(number, int | float) and not abs(number) <= MAX_NUMBER:  # NaN is not, either
                name = name_of(param)
                most = f"{MAX_NUMBER:,}"
                raise ClickException(f"Expected {name} to be a number up to {most}, got {number}. Pass a smaller one.")
        return remaining

    def invoke(self, ctx: Any) -> Any:
        with self.naming_flags(ctx):
            return super().invoke(ctx)

    @contextmanager
    def naming_flags(self, ctx: Any) -> Iterator[None]:
        """Put the flags of this command in place of keyword arguments in errors of the package."""
        try:
            yield
        except (PosExtError, OSError) as error:
            flags = {param.name: name_of(param) for param in self.params if param.param_type_name == "option"}
            message = in_flags(str(error), flags)
            raise ClickException(naming_flag(message, self.params, ctx.params)) from error

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.strip("{}").replace("}...", "...") for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        params: list[Any] = self.get_params(ctx)
        is_long = sum(param.param_type_name == "option" for param in params) >= self.ENOUGH
        order = {name: place for place, name in enumerate(_HEADINGS)}
        sections: dict[str, list[tuple[str, str]]] = {heading: [] for heading in ("Arguments", *GROUPS, "Options")}

        def place_of(param: Any) -> int:
            return order.get(f"{self.name}.{param.name}", order.get(param.name, 0)) if is_long else 0

        for param in sorted(params, key=place_of):
            if (record := param.get_help_record(ctx)) is not None:
                heading = heading_of(str(self.name), param.name) if is_long else "Options"
                name, text = record
                sections[heading if param.param_type_name == "option" else "Arguments"].append(
                    (re.sub(r"<list\[(\w+)\]>", r"<\1>...", name), text)
                )
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


class _Group(TyperGroup):
    """The commands in the order of use. Foreseen errors are one line; unforeseen ones keep their traceback."""

    def list_commands(self, ctx: Any) -> list[str]:
        names = super().list_commands(ctx)
        return [*(name for name in COMMANDS if name in names), *(name for name in names if name not in COMMANDS)]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS.get(name, "")) for name in self.list_commands(ctx)])

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with in_house(self, ctx, args):
            return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if self.get_command(ctx, args[0]) is None:
            near = difflib.get_close_matches(args[0], COMMANDS) or COMMANDS
            raise ClickException(f"Expected a command, got {args[0]!r}. Pass {', '.join(near)}.")
        return super().resolve_command(ctx, args)

    def main(self, args: Sequence[str] | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        try:
            code = super().main(words, **{**kwargs, "standalone_mode": False})
        except ClickException as error:
            code = fail(error.format_message())
        except typer.Abort:
            code = 130
        except (PosExtError, OSError) as error:
            code = fail(str(error))
        sys.exit(code)


class _Typer(typer.Typer):
    """Application whose commands are of class [`Command`], with an option for each field of their dataclasses."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[..., Any]:
        register = super().command(name, **{"cls": Command, **settings})
        return lambda function: register(derived(function))


app = _Typer(
    name="hf-posext",
    cls=_Group,
    help="Extend the context of a transformers model, and measure the effect.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


def main() -> None:
    """Run `hf-posext`."""
    app(prog_name="hf-posext")
