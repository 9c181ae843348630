"""`compare` and `evaluate`: measurements of several methods, or of one model, with tables and a report."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer

from ..errors import InvalidParameterError
from ..evaluation.config import EvaluationConfig
from ..packages import require
from . import options
from .app import app
from .output import JOURNAL, output_directory, report_of
from .processes import finish, join_processes, spread
from .trackers import accelerate_trackers, check_tracker

if TYPE_CHECKING:
    from ..evaluation import Results
    from ..methods import Method


@dataclass(frozen=True, kw_only=True)
class Run:
    """Options that both commands have in addition to the settings of [`EvaluationConfig`]."""

    model: options.Model
    dataset: options.Dataset
    output: options.Output
    documents: options.Documents = None
    text_column: options.TextColumn = None
    split: options.Split = None
    revision: options.Revision = None
    dtype: options.Dtype = "float32"
    device: options.Device = None
    trust_remote_code: options.TrustRemoteCode = False
    log_with: options.LogWith = None
    resume: options.Resume = False
    config: options.Config = None

    def report(self, context: typer.Context, settings: EvaluationConfig, measure: Callable[..., Results]) -> None:
        """Load texts and models, measure, and write the report.

        Args:
            context (`typer.Context`): context of the command.
            settings (`EvaluationConfig`): settings of the evaluation.
            measure (`Callable`): function of a model, its tokenizer, and the texts. Its keyword arguments are `write`,
                which writes the report of results, `load`, which loads a model by name, and further arguments of the
                measuring function.
        """
        # The imports that take seconds come after the checks that need none of them.
        from ..evaluation import load_documents
        from .loading import load_evaluator, load_model

        if self.log_with is not None:
            check_tracker("log_with", self.log_with, accelerate_trackers())
        device, accelerator = join_processes(self.device)
        texts = load_documents(
            self.dataset,
            text_column=self.text_column,
            split=self.split,
            revision=self.revision,
            limit=self.documents,
        )

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
                longppl=load_evaluator(settings.longppl, self.dtype, device, accelerator, self.trust_remote_code),
            )
        finish(results, self.output, accelerator, self.log_with)


def measuring(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command an option for each field of [`Run`] and [`EvaluationConfig`], and pass it both objects.

    The metadata of a setting names the command if only one command has it. Sequences are typed as values separated by
    commas.
    """
    hints = get_type_hints(EvaluationConfig)
    settings = [
        _option(entry, hints[entry.name])
        for entry in fields(EvaluationConfig)
        if entry.metadata.get("flag", {}).get("of", command.__name__) == command.__name__
    ]
    settings.append(_keyword("original_length", options.OriginalLength, None))
    annotations = get_type_hints(Run, include_extras=True)
    run = [_keyword(entry.name, annotations[entry.name], _default(entry)) for entry in fields(Run)]
    required = [parameter for parameter in run if parameter.default is inspect.Parameter.empty]
    taken: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        derived = {"run": required, "settings": settings}
        taken += derived.get(parameter.name, [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)])
    taken += run[len(required) :]

    @functools.wraps(command)
    def typed(**given: Any) -> Any:
        require("eval")
        given["trained_length"] = options.renamed_length(
            given["context"], given["trained_length"], given.pop("original_length")
        )
        values = {parameter.name: given.pop(parameter.name) for parameter in settings if parameter.name in given}
        parsed = {name: _parsed(name, hints[name], value) for name, value in values.items()}
        chosen = Run(**{parameter.name: given.pop(parameter.name) for parameter in run})
        return command(**given, run=chosen, settings=EvaluationConfig(**parsed))

    typed.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
    typed.__annotations__ = {parameter.name: parameter.annotation for parameter in taken}
    return typed


def _option(entry: Any, hint: Any) -> inspect.Parameter:
    """Return the option of a setting in the form of typer."""
    flag = {key: value for key, value in entry.metadata.get("flag", {}).items() if key != "of"}
    names = (f"--{entry.name.replace('_', '-')}",) if hint is bool else ()  # without a negative form
    if (kind := _items(hint)) is not None:
        flag = {"metavar": f"<{kind.__name__},...>", **flag}
    if kind is not None or hint is Any:
        hint = str if entry.default is MISSING else str | None
    return _keyword(
        entry.name, Annotated[hint, typer.Option(*names, help=entry.metadata["help"], **flag)], _default(entry)
    )


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _default(entry: Any) -> Any:
    return inspect.Parameter.empty if entry.default is MISSING else entry.default


def _items(hint: Any) -> Any:
    """Return the type of the items of a sequence, even if it is optional; `None` for other hints."""
    for candidate in (hint, *get_args(hint)):
        if get_origin(candidate) is Sequence:
            return get_args(candidate)[0]
    return None


def _parsed(name: str, hint: Any, value: Any) -> Any:
    """Return the value of a setting from the typed text."""
    kind = _items(hint)
    if kind is None or value is None:
        return value
    if kind is str:
        return [part.strip() for part in value.split(",") if part.strip()]
    return options.numbers(value, name, kind)


@app.command()
@measuring
def compare(
    context: typer.Context,
    run: Run,
    methods: Annotated[str, typer.Option(help="Methods separated by commas, such as 'none,yarn(beta_fast=16)'.")],
    settings: EvaluationConfig,
) -> None:
    """Measure perplexity by context length before and after, against truncation, and write a report.

    Writes README.md, results.json, results.csv, perplexity.png and gain_by_position.png into OUTPUT after every
    method, with --retrieval also retrieval.csv and heat maps. journal.jsonl records finished work, so that --resume
    continues an interrupted run. Methods that do not apply to the model are left out and listed with the reason. Under
    accelerate launch or torchrun, the processes share the documents.
    """
    with output_directory(run.output, run.resume):
        chosen = _chosen(run, methods, settings)

        def measure(model: Any, tokenizer: Any, texts: Any, *, write: Any, load: Any, **others: Any) -> Results:
            from ..evaluation import compare as measured

            return measured(model, tokenizer, texts, chosen, settings, on_method=write, **others)

        run.report(context, settings, measure)


@app.command()
@measuring
def evaluate(
    context: typer.Context,
    run: Run,
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
    with output_directory(run.output, run.resume):
        _check(run, settings)

        def measure(model: Any, tokenizer: Any, texts: Any, *, write: Any, load: Any, **others: Any) -> Results:
            from ..evaluation import evaluate_perplexity

            base = None if control is None else load(control)[0]
            results = evaluate_perplexity(
                model, tokenizer, texts, config=settings, label=label, control=base, **others
            )
            write(results)
            return results

        run.report(context, settings, measure)


def _chosen(run: Run, methods: str, settings: EvaluationConfig) -> list[Method]:
    """Return the methods of the given names, after planning each for the model's config with the settings.

    Requests that cannot work are then refused before weights and documents are read.
    """
    from ..methods import as_method
    from ..methods.text import split_outside_brackets

    names = [name for name in split_outside_brackets(methods, ",") if name]
    if not names:
        raise InvalidParameterError(
            f"Expected methods, got methods={methods!r}. Pass at least one, as in --methods none,yarn."
        )
    chosen = [as_method(name) for name in names]

    from ..evaluation.key_search import check_key_search
    from ..evaluation.setup import check_request, plan_comparison
    from ..evaluation.tasks import name_of
    from ..patching import detect_scheme
    from .loading import load_config, require_unpatched

    require_unpatched(run.model, "a comparison begins unpatched", "measure it by hf-posext evaluate")
    config = load_config(run.model, run.trust_remote_code)
    request = check_request(settings, detect_scheme(config), config)
    plans, _ = plan_comparison(request, chosen)
    if "/" not in (settings.longppl or ""):  # a label; models are checked when they are loaded
        check_key_search(request, plans[0].trained_length, [name_of(plan) for plan in plans])
    return chosen


def _check(run: Run, settings: EvaluationConfig) -> None:
    """Refuse settings that the model's config and its plan do not allow, before weights and documents are read."""
    from ..evaluation.setup import check_reads, check_request
    from ..patching import detect_scheme
    from .loading import base_of, load_config, saved_plan

    if base_of(run.model):  # an adapter, whose base model has the config
        return
    plan, config = saved_plan(run.model), load_config(run.model, run.trust_remote_code)
    request = check_request(settings, detect_scheme(config) if plan is None else plan.scheme, config)
    check_reads(request, plan)
