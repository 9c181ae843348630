"""`evaluate`: one model as it is; a table here and a report in a directory."""

from __future__ import annotations

from typing import Annotated

import typer

from ..evaluation.config import EvaluationConfig
from . import options
from .app import app
from .output import JOURNAL, output_directory, report_of
from .processes import finish, join_processes, spread
from .trackers import accelerate_trackers, check_tracker


@app.command()
@options.measuring
def evaluate(
    context: typer.Context,
    model: options.Model,
    dataset: options.Dataset,
    output: options.Output,
    settings: EvaluationConfig,
    control: Annotated[
        str | None,
        typer.Option(help="Unpatched model to compare with, its context truncated; of a fine-tuned one its base."),
    ] = None,
    label: Annotated[str | None, typer.Option(help="What the tables call the model.")] = None,
    documents: options.Documents = None,
    text_column: options.TextColumn = None,
    split: options.Split = None,
    revision: options.Revision = None,
    dtype: options.Dtype = "float32",
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    log_with: options.LogWith = None,
    resume: options.Resume = False,
    config: options.Config = None,
) -> None:
    """Measure perplexity by context length of one model as it is: plain, saved with a patch, or fine-tuned.

    OUTPUT gets results.json, results.csv, perplexity.png, README.md, and journal.jsonl, from which an interrupted run
    goes on with --resume. With --control there is a gain over truncation, too. Under accelerate launch or torchrun,
    documents are shared out over the processes.
    """
    with output_directory(output, resume):
        _check(model, settings, trust_remote_code)

        # The imports that take seconds come after the checks that need none of them.
        from ..evaluation import evaluate_perplexity, load_documents
        from .loading import load_evaluator, load_model

        if log_with is not None:
            check_tracker("log_with", log_with, accelerate_trackers())
        device, accelerator = join_processes(device)
        texts = load_documents(dataset, text_column=text_column, split=split, revision=revision, limit=documents)
        network, tokenizer = load_model(model, dtype, device, trust_remote_code)
        network = spread(network, accelerator)
        with report_of(output, options.command_line(context)) as write:
            results = evaluate_perplexity(
                network,
                tokenizer,
                texts,
                config=settings,
                label=label,
                control=None
                if control is None
                else spread(load_model(control, dtype, device, trust_remote_code)[0], accelerator),
                journal=output / JOURNAL,
                accelerator=accelerator,
                longppl=load_evaluator(settings.longppl, dtype, device, accelerator, trust_remote_code),
            )
            write(results)
        finish(results, output, accelerator, log_with)


def _check(model: str, settings: EvaluationConfig, trust_remote_code: bool) -> None:
    """Refuse settings that the model's config and its plan do not allow, before weights and documents are read."""
    from ..evaluation.setup import check_reads, check_request
    from ..patching import detect_scheme
    from .loading import base_of, load_config, saved_plan

    if base_of(model):  # an adapter, whose base model has the config
        return
    plan, config = saved_plan(model), load_config(model, trust_remote_code)
    request = check_request(settings, detect_scheme(config) if plan is None else plan.scheme, config)
    check_reads(request, plan)
