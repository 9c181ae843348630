"""`recommend` and `search`: a plan for a model from measurements, printed with its reasons and saved to a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from . import options
from .app import app
from .console import PlainConsole, say
from .output import plan_file
from .processes import join_processes, rank

if TYPE_CHECKING:
    from ..recommendation import Recommendation

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a causal language model.")]
TargetLength = Annotated[int, typer.Option(help="Target length in tokens, above the trained length.")]
PlanOutput = Annotated[
    Path, typer.Option(help="JSON file of the plan; must not exist. The journal is written beside it.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Resume the run whose journal is beside OUTPUT, if any.")]


@app.command()
def recommend(
    context: typer.Context,
    model: Model,
    dataset: options.Dataset,
    target_length: TargetLength,
    output: PlanOutput,
    budget: Annotated[
        int | None,
        typer.Option(help="Tokens that may go through the model. Default: a quarter of the exhaustive sweep."),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Methods to choose from, separated by commas. Default: all that apply.")
    ] = None,
    short_limit: Annotated[
        float, typer.Option(help="Largest increase of perplexity allowed inside the trained length; 0.01 is 1 %.")
    ] = 0.01,
    trained_length: options.TrainedLength = None,
    original_length: options.OriginalLength = None,
    documents: options.Documents = None,
    passkey: Annotated[int, typer.Option(min=0, help="Passkey trials of contenders that are level; 0 for none.")] = 5,
    start: options.Start = 0,
    text_column: options.TextColumn = None,
    split: options.Split = None,
    revision: options.Revision = None,
    dtype: options.Dtype = "float32",
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
    resume: Resume = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find the method that reads a length best, or say that truncation is better, and write the plan to use.

    Methods that apply are measured on the documents by successive halving, within the budget. OUTPUT is the plan:
    patch_model(model, ExtensionPlan.load(OUTPUT)). --resume continues an interrupted run, also with more budget.
    """
    with plan_file(output, resume) as journal:
        from ..methods import as_method
        from ..methods.text import split_outside_brackets

        names = None if methods is None else [name for name in split_outside_brackets(methods, ",") if name]
        chosen = None if names is None else [as_method(name) for name in names]
        trained_length = options.renamed_length(context, trained_length, original_length)

        # The imports that take seconds come after the checks that need none of them.
        from ..evaluation import load_documents
        from ..recommendation import recommend as measure
        from ..recommendation.recommend import check_options
        from .loading import load_model, require_unpatched

        require_unpatched(model, "a recommendation begins unpatched", "measure it by hf-posext evaluate")
        check_options(target_length, trained_length, short_limit, passkey)
        device, accelerator = join_processes(device)
        texts = load_documents(dataset, text_column=text_column, split=split, revision=revision, limit=documents)
        network, tokenizer = load_model(model, dtype, device, trust_remote_code)
        recommendation = measure(
            network,
            tokenizer,
            texts,
            target_length,
            budget,
            methods=chosen,
            short_limit=short_limit,
            trained_length=trained_length,
            passkey=passkey,
            start=start,
            seed=seed,
            journal=journal,
            accelerator=accelerator,
        )
        if rank():
            return
        recommendation.save(output)
        if as_json:
            say(json.dumps(recommendation.to_dict(), indent=1))
        else:
            _print(recommendation)
        say(f"plan: {output}", err=as_json)


@app.command()
def search(
    context: typer.Context,
    model: Model,
    dataset: options.Dataset,
    target_length: TargetLength,
    output: PlanOutput,
    objective: Annotated[
        Literal["tail", "key-tokens"],
        typer.Option(help="Perplexity of the second half of texts, or of the tokens that need the long context."),
    ] = "tail",
    population: Annotated[int, typer.Option(help="Sets of factors in a generation, 4 or more.")] = 32,
    generations: Annotated[int, typer.Option(help="Number of generations; each replaces the worse half.")] = 20,
    trained_length: options.TrainedLength = None,
    original_length: options.OriginalLength = None,
    documents: options.Documents = None,
    start: options.Start = 0,
    text_column: options.TextColumn = None,
    split: options.Split = None,
    revision: options.Revision = None,
    dtype: options.Dtype = "float32",
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    seed: Annotated[int, typer.Option(help="Seed of the search.")] = 0,
    resume: Resume = False,
) -> None:
    """Search a factor for every rotary pair, as LongRoPE does, and write the plan.

    The plan consists of native longrope parameters: a checkpoint with it opens in plain transformers. Measure it on
    documents that the search has not read. --resume continues an interrupted search, to the same result, and a
    finished one for more --generations.
    """
    with plan_file(output, resume) as journal:
        trained_length = options.renamed_length(context, trained_length, original_length)

        # The imports that take seconds come after the checks that need none of them.
        from ..evaluation import load_documents
        from ..frequency_search import check_search
        from ..frequency_search import search as evolve
        from ..patching import detect_scheme
        from .loading import load_config, load_model, require_unpatched

        require_unpatched(model, "a search begins unpatched", "measure it by hf-posext evaluate")
        check_search(
            detect_scheme(load_config(model, trust_remote_code)), target_length, trained_length=trained_length,
            objective=objective, population=population, generations=generations,
        )  # fmt: skip
        device, accelerator = join_processes(device)
        texts = load_documents(dataset, text_column=text_column, split=split, revision=revision, limit=documents)
        network, tokenizer = load_model(model, dtype, device, trust_remote_code)
        result = evolve(
            network,
            tokenizer,
            texts,
            target_length,
            trained_length=trained_length,
            objective=objective,
            population=population,
            generations=generations,
            start=start,
            seed=seed,
            journal=journal,
            accelerator=accelerator,
        )
        if rank():
            return
        result.save(output)
        say(result.describe())
        say(f"plan: {output}")


def _print(found: Recommendation) -> None:
    from ..recommendation.recommendation import title

    console = PlainConsole()
    console.print(escape(found.describe()))
    console.print()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("contender", overflow="fold")
    for head in ("documents", "tail ppl", "x best", "short", "passkeys"):
        table.add_column(head, justify="right")
    for line in found.contenders:
        keys = "" if line["passkey"] is None else f"{line['passkey']:.2f}"
        numbers = (f"{line['perplexity_tail']:.2f}", f"{line['ratio']:.3f}", f"{100 * line['short_change']:+.1f} %")
        table.add_row(title(line["method"], line["factor"]), str(line["documents"]), *numbers, keys)
    console.print(table)
    cost = found.cost
    console.print(
        f"read {cost['tokens']} tokens of a budget of {cost['budget']}; all contenders on all documents would be "
        f"{cost['exhaustive_tokens']}"
    )
