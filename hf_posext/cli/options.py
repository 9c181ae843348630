"""Options shared by several commands."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer

from ..errors import InvalidParameterError
from .console import say
from .settings import NEVER, use_config

Number = TypeVar("Number", int, float)

Model = Annotated[str, typer.Option(help="Model folder, GGUF file or Hub id.")]
Dataset = Annotated[str, typer.Option(help="Folder of .txt; .jsonl, .json, .csv, .parquet; recipe; Hub id.")]
Output = Annotated[Path, typer.Option(help="Directory of the report; new or empty.")]
Documents = Annotated[int | None, typer.Option(help="Number of documents to read. Default: all.")]
Start = Annotated[int, typer.Option(help="Tokens to skip at the beginning of each document.")]
TextColumn = Annotated[str | None, typer.Option(help="Column of the texts. Default: text, or the recipe's.")]
Split = Annotated[str | None, typer.Option(help="Split of the data set.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub data set.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16", "auto"],
    typer.Option(help="Dtype of the weights; auto: that of the checkpoint (GGUF: float32)."),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that MODEL's folder or repository contains.")
]
Device = Annotated[
    str | None,
    typer.Option(help="Device of torch, such as cuda:0 or mps. Default: cpu, or the launcher's for each process."),
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
LogWith = Annotated[
    str | None, typer.Option(metavar="TRACKER", help="Also log curves over the length: tensorboard, wandb, mlflow.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Resume the run whose journal is in OUTPUT, if any.")]
Config = Annotated[
    Path | None,
    typer.Option(callback=use_config, is_eager=True, help="YAML file of these settings; flags take precedence."),
]

Factor = Annotated[float | None, typer.Option(help="Target length as a multiple of the trained length.")]
TargetLength = Annotated[int | None, typer.Option(help="Target length in tokens, instead of a factor.")]
TrainedLength = Annotated[
    int | None, typer.Option(help="Trained length in tokens, if the config is wrong or lacks it.")
]
OriginalLength = Annotated[int | None, typer.Option(hidden=True, help="Former name of --trained-length.")]


def renamed_length(context: typer.Context, trained_length: int | None, original_length: int | None) -> int | None:
    """Return the trained length, given by its flag or by the former name, which prints a warning."""
    if original_length is None:
        return trained_length
    say("--original-length is now called --trained-length", err=True)
    length = original_length if trained_length is None else trained_length
    context.params |= {"trained_length": length, "original_length": None}
    return length


def numbers(text: str, name: str = "lengths", kind: type[Number] = int) -> list[Number]:
    """Return the numbers of a text, which are separated by commas.

    Raises:
        InvalidParameterError: text between the commas is not a number.
    """
    what, example = ("whole numbers", "512,1024") if kind is int else ("numbers", "0,0.5,1")
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InvalidParameterError(
            f"Expected {what} separated by commas, got {name}={text!r}. Pass --{name} {example}."
        ) from None


def command_line(context: typer.Context) -> str:
    """Return the command that repeats a run: every setting that differs from its default, whatever its source."""
    from ..evaluation.reading import portable

    words = ["hf-posext", str(context.command.name)]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if parameter.name in NEVER or value is None or value == parameter.default:
            continue
        words += [parameter.opts[0]] if value is True else [parameter.opts[0], portable(str(value))]
    return shlex.join(words)
