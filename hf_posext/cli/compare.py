"""`compare`: one model, several methods, the same documents; a table here and a report in a directory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InvalidParameterError
from ..evaluation.config import EvaluationConfig
from . import options
from .app import app
from .output import JOURNAL, output_directory, report_of
from .processes import finish, join_processes, spread
from .trackers import accelerate_trackers, check_tracker

if TYPE_CHECKING:
    from ..methods import Method


@app.command()
@options.measuring
def compare(
    context: typer.Context,
    model: options.Model,
    dataset: options.Dataset,
    output: options.Output,
    methods: Annotated[str, typer.Option(help="Names with commas between them, as 'none,yarn(beta_fast=16)'.")],
    settings: EvaluationConfig,
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
    """Measure perplexity by context length before and after, against truncation, and write a report.

    OUTPUT gets results.json, results.csv, perplexity.png, gain_by_position.png and README.md. They are written after
    every method, and what is finished of one is kept in journal.jsonl, so that an interrupted run goes on with
    --resume. With --retrieval there are retrieval.csv and a heat map of each method, too. Methods that do not apply to
    the model are left out, and listed with the reason. Under accelerate launch or torchrun, documents are shared out
    over the processes.
    """
    with output_directory(output, resume):
        chosen = _check(model, methods, settings, trust_remote_code)

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
                settings,
                journal=output / JOURNAL,
                accelerator=accelerator,
                on_method=write,
                longppl=load_evaluator(settings.longppl, dtype, device, accelerator, trust_remote_code),
            )
        finish(results, output, accelerator, log_with)


def _check(model: str, methods: str, settings: EvaluationConfig, trust_remote_code: bool) -> list[Method]:
    """The methods by name, all of them planned for the model's config with the settings, so that what cannot be is
    refused before weights and documents are read."""
    from ..methods import as_method
    from ..methods.text import split_outside_brackets

    names = [name for name in split_outside_brackets(methods, ",") if name]
    if not names:
        raise InvalidParameterError(f"methods is {methods!r}. Pass at least one name, as in methods=['none', 'yarn'].")
    chosen = [as_method(name) for name in names]

    from ..evaluation.key_search import check_key_search
    from ..evaluation.setup import check_request, plan_comparison
    from ..evaluation.tasks import name_of
    from ..patching import detect_scheme
    from .loading import load_config, require_unpatched

    require_unpatched(model, "a comparison begins unpatched", "measure it by hf-posext evaluate")
    config = load_config(model, trust_remote_code)
    request = check_request(settings, detect_scheme(config), config)
    plans, _ = plan_comparison(request, chosen)
    if "/" not in (settings.longppl or ""):  # a label; models are checked when they are loaded
        check_key_search(request, plans[0].trained_length, [name_of(plan) for plan in plans])
    return chosen
