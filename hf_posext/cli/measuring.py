"""`compare` and `evaluate`, which measure; `report` and `card`, which write what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidParameterError
from ..evaluation.config import EvaluationConfig
from ..packages import require
from . import options
from .app import app
from .console import say
from .loading import ADAPTER_FILE, base_of, load_config, load_model, require_unpatched, saved_plan
from .runs import JOURNAL, check_tracker, finish, join_processes, output_directory, report_of, spread

if TYPE_CHECKING:
    from ..evaluation import Results
    from ..methods import Method


@dataclass(frozen=True, kw_only=True)
class Measurement(options.Run):
    """Options that both commands have in addition to the settings of [`EvaluationConfig`]."""

    output: Path = options.option("Directory of the report; new or empty.", ..., file_okay=False)
    log_with: str | None = options.option(
        "Also log curves over the length: tensorboard, wandb, mlflow.", metavar="TRACKER"
    )
    resume: options.Resume = False
    config: options.Config = None

    def report(self, context: typer.Context, settings: EvaluationConfig, measure: Callable[..., Results]) -> None:
        """Load texts and models, measure, and write the report.

        `measure` is a function of a model, its tokenizer, and the texts. Its keyword arguments are `write`, which
        writes the report of results, `load`, which loads a model by name, and those of the package's function.
        """
        if self.log_with is not None:
            from accelerate.tracking import get_available_trackers

            installed = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
            check_tracker("log_with", self.log_with, installed)
        device, accelerator = join_processes(self.device)
        texts = self.load()

        def load(name: str) -> tuple[Any, Any]:
            model, tokenizer = load_model(name, self.dtype, device, self.trust_remote_code)
            return spread(model, accelerator), tokenizer

        model, tokenizer = load(self.model)
        with report_of(self.output, options.command_line(context)) as write:
            results = measure(
                model,
                tokenizer,
                texts,
                write=write,
                load=load,
                journal=self.output / JOURNAL,
                accelerator=accelerator,
                longppl=settings.longppl if _evaluator(settings) is None else load(settings.longppl),
            )
        finish(results, self.output, accelerator, self.log_with)


@app.command()
def compare(
    context: typer.Context,
    run: Measurement,
    methods: Annotated[str, typer.Option(help="Methods separated by commas, such as 'none,yarn(beta_fast=16)'.")],
    settings: EvaluationConfig,
) -> None:
    """Measure perplexity by context length before and after, against truncation, and write a report.

    Writes README.md, results.json, results.csv, perplexity.png and gain_by_position.png into OUTPUT after every
    method, with --retrieval also retrieval.csv and heat maps. journal.jsonl records finished work, so that --resume
    continues an interrupted run. Methods that do not apply to the model are left out and listed with the reason. Under
    accelerate launch or torchrun, the processes share the documents.
    """
    require("eval")
    with output_directory(run.output, run.resume):
        parsed = options.methods_of(methods) or []
        _check_comparison(run, parsed, settings)

        def measure(model: Any, tokenizer: Any, texts: Any, *, write: Any, load: Any, **arguments: Any) -> Results:
            from ..evaluation import compare as measured

            return measured(model, tokenizer, texts, parsed, settings, on_method=write, **arguments)

        run.report(context, settings, measure)


@app.command()
def evaluate(
    context: typer.Context,
    run: Measurement,
    settings: EvaluationConfig,
    control: Annotated[
        str | None,
        typer.Option(help="Unpatched model whose truncated context is the control; for a fine-tuned model its base."),
    ] = None,
    label: Annotated[str | None, typer.Option(help="Name of the model in tables.")] = None,
) -> None:
    """Measure perplexity by context length of one model as it is: unpatched, saved with a patch, or fine-tuned.

    Writes README.md, results.json, results.csv and perplexity.png into OUTPUT. journal.jsonl records finished work, so
    that --resume continues an interrupted run. With --control there is also a gain over truncation. Under accelerate
    launch or torchrun, the processes share the documents.
    """
    require("eval")
    with output_directory(run.output, run.resume):
        _check_evaluation(run, control, label, settings)

        def measure(model: Any, tokenizer: Any, texts: Any, *, write: Any, load: Any, **arguments: Any) -> Results:
            from ..evaluation import evaluate_perplexity

            base = None if control is None else load(control)[0]
            results = evaluate_perplexity(
                model, tokenizer, texts, config=settings, label=label, control=base, **arguments
            )
            write(results)
            return results

        run.report(context, settings, measure)


def _evaluator(settings: EvaluationConfig) -> str | None:
    """Return the model that finds key tokens; `None` if a method does, which is given by its label."""
    return settings.longppl if {"/", "\\"} & set(settings.longppl or "") else None


def _checked(run: Measurement, settings: EvaluationConfig) -> EvaluationConfig:
    """Return the settings for checks without weights, with the config of an evaluator, which must exist."""
    if (name := _evaluator(settings)) is None:
        return settings
    return replace(settings, longppl=load_config(base_of(name) or name, run.trust_remote_code))


def _check_comparison(run: Measurement, methods: list[Method], settings: EvaluationConfig) -> None:
    """Plan each method for the model's config, so that impossible requests are refused before weights are read."""
    from ..evaluation.comparison import check_comparison

    require_unpatched(run.model, "a comparison begins unpatched", "measure it by hf-posext evaluate")
    config = load_config(run.model, run.trust_remote_code)
    check_comparison(_checked(run, settings), methods, config)


def _check_evaluation(run: Measurement, control: str | None, label: str | None, settings: EvaluationConfig) -> None:
    """Refuse settings that the model's config and its plan do not allow, before weights and documents are read."""
    from ..evaluation.comparison import check_evaluation
    from ..patching import detect_scheme

    length = None
    if control is not None:
        base = load_config(base_of(control) or control, run.trust_remote_code)
        length = settings.trained_length or detect_scheme(base).trained_length or 0
    settings = _checked(run, settings)
    if not base_of(run.model):  # of an adapter, the base model has the config
        config = load_config(run.model, run.trust_remote_code)
        check_evaluation(settings, label, config, saved_plan(run.model), length)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(dir_okay=False, metavar="RESULTS", help="results.json of each run.")],
    output: Annotated[Path, typer.Option(file_okay=False, help="Directory of the report; new or empty.")],
) -> None:
    """Merge the results of several runs into one table, one picture and one report.

    Runs of one model that were measured in the same way become one run. Runs that were measured otherwise (another
    protocol, other documents) stay apart, and the report says so. OUTPUT contains README.md, perplexity.png and
    results.csv of all, and of each model results.json, the gain by position and heat maps. With one model, README.md
    begins with its model-index.
    """
    with output_directory(output):
        from ..evaluation import Results
        from ..evaluation.reading import portable
        from ..reporting import differences, merge_runs, merged_grids, notes, print_grids, run_titles
        from ..reporting import write_merged_report as write

        loaded = {portable(str(path)): Results.load_json(path) for path in runs}
        merged = merge_runs(loaded)
        titles = run_titles(merged)
        readme = write(loaded, output)
        remarks = [f"{title}: {note}" for title, run in zip(titles, merged, strict=True) for note in notes(run)]
        print_grids(merged_grids(merged, titles), [*differences(merged), *remarks])
        say(f"report: {readme}")


@app.command()
def card(
    directory: Annotated[
        Path, typer.Argument(metavar="DIRECTORY", help="Saved adapter or model, or the OUTPUT of finetune.")
    ],
    before: Annotated[
        Path, typer.Option(dir_okay=False, help="results.json of compare on the base, with the method none.")
    ],
    after: Annotated[
        Path, typer.Option(dir_okay=False, help="results.json of evaluate on this model, measured in the same way.")
    ],
    push: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the adapter and its card to the Hub: user/name.")
    ] = None,
) -> None:
    """Write the model card of a fine-tuned or extended model: what it is, before and after, training, limits.

    Writes README.md, with the model-index, and before_after.png into DIRECTORY. The card contains the record of
    finetune, if there is one.
    """
    paths = (directory, directory / "adapter", directory / "model")
    saved = next((path for path in paths if saved_plan(str(path)) is not None), None)
    if saved is None:
        raise InvalidParameterError(
            f"Expected DIRECTORY to contain an adapter or a model saved with a patch, got {directory}. Pass what "
            "finetune or patch.save_pretrained wrote."
        )
    if push is not None and not (saved / ADAPTER_FILE).is_file():
        raise InvalidParameterError(
            f"Expected an adapter to push, got the whole model {saved}. Leave --push out, and then: hf upload {push} "
            f"{saved}"
        )

    # The imports that take seconds come after the checks that need none of them.
    from ..adapters import push_to_hub
    from ..evaluation import Results
    from ..reporting import write_model_card
    from ..training.finetune import provenance_of

    figures = Results.load_json(before), Results.load_json(after)
    say(f"card: {write_model_card(saved, *figures, training=provenance_of(saved))}")
    if push is not None:
        say(f"pushed: {push_to_hub(saved, push)}")
