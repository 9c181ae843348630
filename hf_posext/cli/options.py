"""The options that measuring commands share, and what becomes of them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from ..errors import InvalidParameterError
from .settings import NEVER, use_config

Number = TypeVar("Number", int, float)

Model = Annotated[str, typer.Option(help="Model folder or Hub id.")]
Dataset = Annotated[str, typer.Option(help="Folder of .txt; .jsonl, .json, .csv, .parquet; recipe; Hub id.")]
Output = Annotated[Path, typer.Option(help="Directory for the report; new, or without files in it.")]
Lengths = Annotated[str, typer.Option(help="Context lengths in tokens, with commas between them.")]
OriginalLength = Annotated[int | None, typer.Option(help="Trained length, if the config is wrong about it.")]
Documents = Annotated[int | None, typer.Option(help="How many documents to read; all if not given.")]
Passkey = Annotated[int, typer.Option(min=0, help="Pass-key trials at each length; 0 for none.")]
Retrieval = Annotated[int, typer.Option(min=0, help="Trials of each task at each length and depth; 0 for none.")]
Tasks = Annotated[
    str | None,
    typer.Option(
        help="Of --retrieval: passkey, multi-key, multi-value, variable-tracking, common-words; all if not given."
    ),
]
Depths = Annotated[
    str | None, typer.Option(help="Of --retrieval: places in the text from 0 to 1; 0,0.25,0.5,0.75,1 if not given.")
]
LongPPL = Annotated[
    str | None,
    typer.Option(
        "--longppl",
        metavar="EVALUATOR",
        help="Perplexity of key tokens, found by one of the methods (its label), or by a model (a folder or Hub id, "
        "with a slash in it).",
    ),
]
Alpha = Annotated[
    float | None,
    typer.Option(help="Of --longppl: nats that the long context gains on a key token; the paper's 2 if not given."),
]
Beta = Annotated[
    float | None,
    typer.Option(help="Of --longppl: log-probability of a key token at the least, nats; the paper's -2 if not given."),
]
ShortLength = Annotated[
    int | None,
    typer.Option(help="Of --longppl: tokens of the short context; by default half the trained length, at most 4096."),
]
Protocol = Annotated[
    str | None,
    typer.Option(
        help="prefix, sliding, rolling, tail, legacy-yarn, legacy-longlora (decoders), pseudo (encoders), seq2seq; "
        "by the model if not given."
    ),
]
Stride = Annotated[int | None, typer.Option(help="Tokens that windows move by, where they overlap.")]
Tail = Annotated[int | None, typer.Option(help="Tokens that protocol tail counts.")]
Start = Annotated[int, typer.Option(help="Tokens to leave out at the beginning of each document.")]
PrefillChunk = Annotated[int | None, typer.Option(help="Tokens read at a time, to save memory; all if not given.")]
OffloadCache = Annotated[bool, typer.Option("--offload-cache", help="With --prefill-chunk: KV cache on the CPU.")]
TextColumn = Annotated[str | None, typer.Option(help="Column that holds the text; `text`, or the recipe's.")]
Split = Annotated[str | None, typer.Option(help="Split of the data set.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub data set.")]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the weights.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that MODEL's folder or repository contains.")
]
Device = Annotated[
    str | None,
    typer.Option(help="As torch calls it: cuda:0, mps. If not given: cpu, or the launcher's for each process."),
]
Seed = Annotated[int, typer.Option(help="Of pass keys and bootstrap intervals.")]
LogWith = Annotated[
    str | None, typer.Option(metavar="TRACKER", help="Also log curves over the length: tensorboard, wandb, mlflow.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run whose journal is in OUTPUT, if any.")]
Config = Annotated[
    Path | None,
    typer.Option(callback=use_config, is_eager=True, help="YAML file of these settings; flags go before it."),
]

READING = (
    *("original_length", "protocol", "stride", "tail", "start", "passkey", "retrieval"),
    *("alpha", "beta", "short_length", "prefill_chunk", "offload_cache", "seed"),
)
"""Options that `compare` and `evaluate_perplexity` take under the same names."""


def reading_options(context: typer.Context) -> dict[str, Any]:
    """What was asked for of `READING`, and of retrieval's tasks and depths.

    Raises:
        InvalidParameterError: a depth that is no number.
    """
    tasks, depths = context.params["tasks"], context.params["depths"]
    return {
        **{name: context.params[name] for name in READING},
        "tasks": None if tasks is None else [task.strip() for task in tasks.split(",") if task.strip()],
        "depths": None if depths is None else _numbers("depths", depths, float, "numbers", "0,0.5,1"),
    }


def numbers(lengths: str) -> list[int]:
    """The lengths as numbers.

    Raises:
        InvalidParameterError: something between the commas is none.
    """
    return _numbers("lengths", lengths, int, "whole numbers", "512,1024")


def _numbers(name: str, text: str, kind: type[Number], what: str, example: str) -> list[Number]:
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InvalidParameterError(f"{name} is {text!r}; give {what}, as in --{name} {example}") from None


def command_line(context: typer.Context) -> str:
    """The command that does the same again: every setting that is not the default, wherever it came from."""
    from ..evaluation.texts.files import portable

    words = ["hf-posext", str(context.command.name)]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if parameter.name in NEVER or value is None or value == parameter.default:
            continue
        words += [parameter.opts[0]] if value is True else [parameter.opts[0], portable(str(value))]
    return shlex.join(words)
