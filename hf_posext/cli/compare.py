"""`compare`: one model, several methods, the same documents; a table here and a report in a directory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InvalidParameterError
from . import options
from .app import app
from .output import JOURNAL, output_directory, report_of
from .processes import finish, join_processes, spread
from .trackers import accelerate_trackers, check_tracker

if TYPE_CHECKING:
    from ..methods import Method


@app.command()
def compare(
    context: typer.Context,
    model: options.Model,
    dataset: options.Dataset,
    output: options.Output,
    methods: Annotated[str, typer.Option(help="Names with commas between them, as 'none,yarn(beta_fast=16)'.")],
    lengths: options.Lengths,
    factor: Annotated[float | None, typer.Option(help="How many times the trained length to read.")] = None,
    target_length: Annotated[int | None, typer.Option(help="Tokens to read, instead of a factor.")] = None,
    original_length: options.OriginalLength = None,
    documents: options.Documents = None,
    passkey: options.Passkey = 0,
    retrieval: options.Retrieval = 0,
    tasks: options.Tasks = None,
    depths: options.Depths = None,
    longppl: options.LongPPL = None,
    alpha: options.Alpha = None,
    beta: options.Beta = None,
    short_length: options.ShortLength = None,
    protocol: options.Protocol = None,
    stride: options.Stride = None,
    tail: options.Tail = None,
    start: options.Start = 0,
    prefill_chunk: options.PrefillChunk = None,
    offload_cache: options.OffloadCache = False,
    text_column: options.TextColumn = None,
    split: options.Split = None,
    revision: options.Revision = None,
    dtype: options.Dtype = "float32",
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
    log_with: options.LogWith = None,
    resume: options.Resume = False,
    config: options.Config = None,
) -> None:
    """Measure perplexity by context length before and after, against truncation, and write a report.

    OUTPUT gets results.json, results.csv, perplexity.png, gain_by_position.png and README.md. They are written after
    every method, and what is finished of one is kept in journal.jsonl, so that an interrupted run goes on with
    --resume. With --retrieval there are retrieval.csv and a heat map of each method, too. Methods that do not apply to
    the model are left out, and listed with the reason. Under accelerate launch or torchrun, documents are shared out
    over the processes.
    """
    with output_directory(output, resume):
        chosen = _check_methods(model, methods, factor, target_length, original_length, trust_remote_code)
        sizes, reading = options.numbers(lengths), options.reading_options(context)

        # The imports that take seconds come after the checks that need none of them.
        from ..evaluation import compare as measure
        from ..evaluation import load_documents
        from .loading import load_evaluator, load_model

        if log_with is not None:
            check_tracker("log_with", log_with, accelerate_trackers())
        device, accelerator = join_processes(device)
        texts = load_documents(dataset, text_column=text_column, split=split, revision=revision, limit=documents)
        network, tokenizer = load_model(model, dtype, device, trust_remote_code)
        network = spread(network, accelerator)
        with report_of(output, options.command_line(context)) as write:
            results = measure(
                network,
                tokenizer,
                texts,
                chosen,
                lengths=sizes,
                factor=factor,
                target_length=target_length,
                journal=output / JOURNAL,
                accelerator=accelerator,
                on_method=write,
                longppl=load_evaluator(longppl, dtype, device, accelerator, trust_remote_code),
                **reading,
            )
        finish(results, output, accelerator, log_with)


def _check_methods(
    model: str,
    methods: str,
    factor: float | None,
    target_length: int | None,
    original_length: int | None,
    trust_remote_code: bool,
) -> list[Method]:
    """The methods by name, each planned once for the model's config, so that what cannot be is told before weights
    are read."""
    from ..methods import as_method
    from ..methods.base import split_outside_brackets

    names = [name for name in split_outside_brackets(methods, ",") if name]
    if not names:
        raise InvalidParameterError(f"methods is {methods!r}; give at least one name, as in --methods none,yarn")
    chosen = [as_method(name) for name in names]

    from ..evaluation.running.selection import plan_methods
    from ..patching import detect_scheme
    from .loading import load_config, require_unpatched

    require_unpatched(model, "a comparison begins unpatched", "measure it by hf-posext evaluate")
    scheme = detect_scheme(load_config(model, trust_remote_code))
    plan_methods(scheme, chosen, factor=factor, target_length=target_length, trained_length=original_length)
    return chosen
