"""The options that several commands share."""

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


def renamed_length(context: typer.Context, trained_length: int | None, original_length: int | None) -> int | None:
    """The trained length, given by its flag or by the earlier name of that, which a line on standard error says."""
    if original_length is None:
        return trained_length
    say("--original-length is now called --trained-length", err=True)
    length = original_length if trained_length is None else trained_length
    context.params |= {"trained_length": length, "original_length": None}
    return length


def numbers(text: str, name: str = "lengths", kind: type[Number] = int) -> list[Number]:
    """Numbers with commas between them.

    Raises:
        InvalidParameterError: something between the commas is none.
    """
    what, example = ("whole numbers", "512,1024") if kind is int else ("numbers", "0,0.5,1")
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
