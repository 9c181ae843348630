"""The options that measuring commands share, and those that derive from the settings of a measurement."""

from __future__ import annotations

import functools
import inspect
import shlex
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import typer

from ..errors import InvalidParameterError
from ..evaluation.config import EvaluationConfig
from ..packages import require
from .console import say
from .settings import NEVER, use_config

Number = TypeVar("Number", int, float)

Model = Annotated[str, typer.Option(help="Model folder, GGUF file or Hub id.")]
Dataset = Annotated[str, typer.Option(help="Folder of .txt; .jsonl, .json, .csv, .parquet; recipe; Hub id.")]
Output = Annotated[Path, typer.Option(help="Directory for the report; new, or without files in it.")]
Documents = Annotated[int | None, typer.Option(help="How many documents to read; all if not given.")]
Start = Annotated[int, typer.Option(help="Tokens to leave out at the beginning of each document.")]
TextColumn = Annotated[str | None, typer.Option(help="Column that holds the text; `text`, or the recipe's.")]
Split = Annotated[str | None, typer.Option(help="Split of the data set.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub data set.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16", "auto"],
    typer.Option(help="Dtype of the weights; auto: that of the checkpoint (of a GGUF file float32)."),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that MODEL's folder or repository contains.")
]
Device = Annotated[
    str | None,
    typer.Option(help="As torch calls it: cuda:0, mps. If not given: cpu, or the launcher's for each process."),
]
Seed = Annotated[int, typer.Option(help="Seed of passkeys and bootstrap intervals.")]
LogWith = Annotated[
    str | None, typer.Option(metavar="TRACKER", help="Also log curves over the length: tensorboard, wandb, mlflow.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run whose journal is in OUTPUT, if any.")]
Config = Annotated[
    Path | None,
    typer.Option(callback=use_config, is_eager=True, help="YAML file of these settings; flags go before it."),
]

TrainedLength = Annotated[int | None, typer.Option(help="Trained length, if the config is wrong about it.")]
OriginalLength = Annotated[int | None, typer.Option(hidden=True, help="Earlier name of --trained-length.")]


def measuring(command: Callable[..., Any]) -> Callable[..., Any]:
    """
    Give a command an option for each field of [`EvaluationConfig`], and its argument `settings` what they say.

    A setting that is of one command only names it in its metadata. Sequences are text with commas between the values.
    """
    parameters = list(inspect.signature(command, eval_str=True).parameters.values())
    at = next(index for index, parameter in enumerate(parameters) if parameter.name == "settings")
    hints = get_type_hints(EvaluationConfig)
    derived = [
        _option(entry, hints[entry.name])
        for entry in fields(EvaluationConfig)
        if entry.metadata.get("flag", {}).get("of", command.__name__) == command.__name__
    ]
    derived.append(_keyword("original_length", OriginalLength, None))
    own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    taken = [*own[:at], *derived, *own[at + 1 :]]

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        require("eval")
        given["trained_length"] = renamed_length(given["context"], given["trained_length"], given["original_length"])
        values = {parameter.name: given.pop(parameter.name) for parameter in derived}
        del values["original_length"]
        parsed = {name: _parsed(name, hints[name], value) for name, value in values.items()}
        return command(**given, settings=EvaluationConfig(**parsed))

    run.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in taken}
    return run


def renamed_length(context: typer.Context, trained_length: int | None, original_length: int | None) -> int | None:
    """The trained length, given by its flag or by the earlier name of that, which a line on standard error says."""
    if original_length is None:
        return trained_length
    say("--original-length is now called --trained-length", err=True)
    length = original_length if trained_length is None else trained_length
    context.params |= {"trained_length": length, "original_length": None}
    return length


def _option(entry: Any, hint: Any) -> inspect.Parameter:
    """The option of a setting, as typer reads it."""
    flag = {key: value for key, value in entry.metadata.get("flag", {}).items() if key != "of"}
    if hint is bool:  # without the negative of it
        flag["names"] = (f"--{entry.name.replace('_', '-')}",)
    elif _items(hint) or hint is Any:
        hint = str if entry.default is MISSING else str | None
    names = flag.pop("names", ())
    annotation = Annotated[hint, typer.Option(*names, help=entry.metadata["help"], **flag)]
    return _keyword(entry.name, annotation, inspect.Parameter.empty if entry.default is MISSING else entry.default)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _items(hint: Any) -> Any:
    """Type of the items of a sequence, also of an optional one; `None` for other hints."""
    for one in (hint, *get_args(hint)):
        if get_origin(one) is Sequence:
            return get_args(one)[0]
    return None


def _parsed(name: str, hint: Any, value: Any) -> Any:
    """The value of a setting, from what was typed."""
    kind = _items(hint)
    if kind is None or value is None:
        return value
    if kind is str:
        return [part.strip() for part in value.split(",") if part.strip()]
    if kind is int:
        return numbers(value, name)
    return _numbers(name, value, float, "numbers", "0,0.5,1")


def numbers(lengths: str, name: str = "lengths") -> list[int]:
    """The lengths as numbers.

    Raises:
        InvalidParameterError: something between the commas is none.
    """
    return _numbers(name, lengths, int, "whole numbers", "512,1024")


def _numbers(name: str, text: str, kind: type[Number], what: str, example: str) -> list[Number]:
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InvalidParameterError(f"{name} is {text!r}. Pass {what}, as in --{name} {example}.") from None


def command_line(context: typer.Context) -> str:
    """The command that does the same again: every setting that is not the default, wherever it came from."""
    from ..evaluation.reading import portable

    words = ["hf-posext", str(context.command.name)]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if parameter.name in NEVER or value is None or value == parameter.default:
            continue
        words += [parameter.opts[0]] if value is True else [parameter.opts[0], portable(str(value))]
    return shlex.join(words)
