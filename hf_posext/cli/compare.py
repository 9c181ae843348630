"""`compare`: one model, several methods, the same documents; a table here and a report in a directory."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import InvalidParameterError, PosExtError
from .app import app
from .output import output_directory
from .settings import use_config

if TYPE_CHECKING:
    from ..evaluation import Results
    from ..methods import Method

Text = str | None


@app.command()
def compare(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Model folder or Hub id.")],
    dataset: Annotated[str, typer.Option(help="Folder of .txt; .jsonl, .json, .csv, .parquet; recipe; Hub id.")],
    output: Annotated[Path, typer.Option(help="Directory for the report; new, or without files in it.")],
    methods: Annotated[str, typer.Option(help="Names with commas between them, as 'none,yarn(beta_fast=16)'.")],
    lengths: Annotated[str, typer.Option(help="Context lengths in tokens, with commas between them.")],
    factor: Annotated[float | None, typer.Option(help="How many times the trained length to read.")] = None,
    target_length: Annotated[int | None, typer.Option(help="Tokens to read, instead of a factor.")] = None,
    original_length: Annotated[
        int | None, typer.Option(help="Trained length, if the config is wrong about it.")
    ] = None,
    documents: Annotated[int | None, typer.Option(help="How many documents to read; all if not given.")] = None,
    passkey: Annotated[int, typer.Option(min=0, help="Pass-key trials at each length; 0 for none.")] = 0,
    protocol: Annotated[
        Text, typer.Option(help="prefix or sliding (decoders), pseudo (encoders), seq2seq; by the model if not given.")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens a sliding window moves by.")] = None,
    start: Annotated[int, typer.Option(help="Tokens to leave out at the beginning of each document.")] = 0,
    text_column: Annotated[Text, typer.Option(help="Column that holds the text; `text`, or the recipe's.")] = None,
    split: Annotated[Text, typer.Option(help="Split of the data set.")] = None,
    revision: Annotated[Text, typer.Option(help="Branch, tag or commit of a Hub data set.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the weights.")] = "float32",
    device: Annotated[str, typer.Option(help="As torch calls it: cpu, cuda:0, mps.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of pass keys and bootstrap intervals.")] = 0,
    config: Annotated[
        Path | None,
        typer.Option(callback=use_config, is_eager=True, help="YAML file of these settings; flags go before it."),
    ] = None,
) -> None:
    """Measure perplexity by context length before and after, against truncation, and write a report.

    OUTPUT gets results.json, results.csv, perplexity.png, gain_by_position.png and README.md. They are written after
    every method, so that an interrupted run keeps what it has finished. Methods that do not apply to the model are
    left out, and listed with the reason.
    """
    with output_directory(output):
        chosen = _check_methods(model, methods, factor, target_length, original_length)
        sizes = _numbers(lengths)

        # The imports that take seconds come after the checks that need none of them.
        from ..evaluation import compare as measure
        from ..evaluation import load_documents
        from ..reporting import print_tables, write_report
        from .loading import load_model

        texts = load_documents(dataset, text_column=text_column, split=split, revision=revision, limit=documents)
        network, tokenizer = load_model(model, dtype, device)
        command = _command(context)
        finished: list[str] = []

        def keep(results: Results) -> None:
            results.provenance["command"] = command
            write_report(results, output)
            finished[:] = dict.fromkeys(row["method"] for row in results.rows)

        try:
            results = measure(
                network,
                tokenizer,
                texts,
                chosen,
                lengths=sizes,
                factor=factor,
                target_length=target_length,
                original_length=original_length,
                protocol=protocol,
                stride=stride,
                start=start,
                passkey=passkey,
                seed=seed,
                on_method=keep,
            )
        except KeyboardInterrupt:
            typer.echo(f"interrupted; {_kept(finished, output)}", err=True)
            raise typer.Exit(130) from None
        except PosExtError as error:
            if finished:
                raise InvalidParameterError(f"{error}; {_kept(finished, output)}") from error
            raise
        print_tables(results)
        typer.echo(f"report: {output / 'README.md'}")


def _check_methods(
    model: str, methods: str, factor: float | None, target_length: int | None, original_length: int | None
) -> list[Method]:
    """The methods by name, each planned once for the model's config, so that what cannot be is told before weights
    are read."""
    from ..methods import as_method
    from ..methods.base import split_outside_brackets

    names = [name for name in split_outside_brackets(methods, ",") if name]
    if not names:
        raise InvalidParameterError(f"methods is {methods!r}; give at least one name, as in --methods none,yarn")
    chosen = [as_method(name) for name in names]

    from ..evaluation.selection import plan_methods
    from ..patching import detect_scheme
    from .loading import load_config

    scheme = detect_scheme(load_config(model))
    plan_methods(scheme, chosen, factor=factor, target_length=target_length, original_length=original_length)
    return chosen


def _numbers(lengths: str) -> list[int]:
    try:
        return [int(length) for length in lengths.split(",") if length.strip()]
    except ValueError:
        raise InvalidParameterError(f"lengths is {lengths!r}; give whole numbers, as in --lengths 512,1024") from None


def _command(context: typer.Context) -> str:
    """The command that does the same again: every setting that is not the default, wherever it came from."""
    from ..evaluation.files import portable

    words = ["hf-posext", "compare"]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if parameter.name != "config" and value is not None and value != parameter.default:
            words += [parameter.opts[0], portable(str(value))]
    return shlex.join(words)


def _kept(finished: list[str], output: Path) -> str:
    if not finished:
        return "no method was finished, nothing was written"
    return f"finished and kept in {output}: {', '.join(finished)}"
