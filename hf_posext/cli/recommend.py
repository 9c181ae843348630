"""`recommend` and `search`: a plan for a model from measurements, printed with its reasons and saved to a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from rich.markup import escape

from ..processes import rank
from . import options
from .app import app
from .console import PlainConsole, plain_table, say
from .runs import join_processes, plan_file

if TYPE_CHECKING:
    from ..recommendation import Recommendation

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Choice(options.Run):
    """Options of both commands: a model, a target length, and the file of the plan."""

    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a causal language model.")]
    target_length: int = options.option("Target length in tokens, above the trained length.", ..., min=2)
    output: Path = options.option(
        "JSON file of the plan; must not exist. The journal is written beside it.", ..., dir_okay=False
    )
    trained_length: options.TrainedLength = None
    start: options.Start = 0
    seed: options.Seed = 0
    resume: bool = options.option("Resume the run whose journal is beside OUTPUT, if any.", False)

    def measure(self, function: Callable[..., Result], journal: Path, **settings: Any) -> Result:
        """Return the result of a function of the model, its tokenizer and the texts, which measures them."""
        from .loading import load_model

        device, accelerator = join_processes(self.device)
        texts = self.load()
        return function(
            *load_model(self.model, self.dtype, device, self.trust_remote_code),
            texts,
            self.target_length,
            trained_length=self.trained_length,
            start=self.start,
            seed=self.seed,
            journal=journal,
            accelerator=accelerator,
            **settings,
        )


@app.command()
def recommend(
    run: Choice,
    budget: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that may go through the model. Default: a quarter of the exhaustive sweep."),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Methods to choose from, separated by commas. Default: all that apply.")
    ] = None,
    short_limit: Annotated[
        float,
        typer.Option(min=0, help="Largest increase of perplexity allowed inside the trained length; 0.01 is 1 %."),
    ] = 0.01,
    passkey: Annotated[int, typer.Option(min=0, help="Passkey trials of contenders that are level; 0 for none.")] = 5,
    as_json: options.AsJson = False,
) -> None:
    """Find the method that reads a length best, or say that truncation is better, and write the plan to use.

    Methods that apply are measured on the documents by successive halving, within the budget. OUTPUT is the plan:
    patch_model(model, ExtensionPlan.load(OUTPUT)). --resume continues an interrupted run, also with more budget.
    """
    with plan_file(run.output, run.resume) as journal:
        parsed = options.methods_of(methods)

        # The imports that take seconds come after the checks that need none of them.
        from ..recommendation import recommend as measured
        from ..recommendation.sweep import check_target
        from .loading import require_unpatched

        require_unpatched(run.model, "a recommendation begins unpatched", "measure it by hf-posext evaluate")
        if run.trained_length is not None:
            check_target(run.target_length, run.trained_length, "trained_length=")
        settings = {"budget": budget, "methods": parsed, "short_limit": short_limit, "passkey": passkey}
        recommendation = run.measure(measured, journal, **settings)
        if rank():
            return
        recommendation.save(run.output)
        if as_json:
            say(json.dumps(recommendation.to_dict(), indent=1))
        else:
            _print(recommendation)
        say(f"plan: {run.output}", err=as_json)


@app.command()
def search(
    run: Choice,
    objective: Annotated[
        Literal["tail", "key-tokens"],
        typer.Option(help="Perplexity of the second half of texts, or of the tokens that need the long context."),
    ] = "tail",
    population: Annotated[int, typer.Option(min=4, help="Sets of factors in a generation.")] = 32,
    generations: Annotated[int, typer.Option(min=1, help="Number of generations; each replaces the worse half.")] = 20,
) -> None:
    """Search a factor for every rotary pair, as LongRoPE does, and write the plan.

    The plan consists of native longrope parameters: a checkpoint with it opens in plain transformers. Measure it on
    documents that the search has not read. --resume continues an interrupted search, to the same result, and a
    finished one for more --generations.
    """
    with plan_file(run.output, run.resume) as journal:
        # The imports that take seconds come after the checks that need none of them.
        from ..frequency_search import check_search
        from ..frequency_search import search as evolve
        from ..patching import detect_scheme
        from .loading import load_config, require_unpatched

        require_unpatched(run.model, "a search begins unpatched", "measure it by hf-posext evaluate")
        scheme = detect_scheme(load_config(run.model, run.trust_remote_code))
        check_search(scheme, run.target_length, run.trained_length)
        result = run.measure(evolve, journal, objective=objective, population=population, generations=generations)
        if rank():
            return
        result.save(run.output)
        say(result.describe())
        say(f"plan: {run.output}")


def _print(recommendation: Recommendation) -> None:
    from ..recommendation.sweep import title

    console = PlainConsole()
    console.print(escape(recommendation.describe()))
    console.print()
    table = plain_table()
    table.add_column("contender", overflow="fold")
    for head in ("documents", "tail ppl", "x best", "short", "passkeys"):
        table.add_column(head, justify="right")
    for row in recommendation.contenders:
        keys = "" if row["passkey"] is None else f"{row['passkey']:.2f}"
        numbers = (f"{row['perplexity_tail']:.2f}", f"{row['ratio']:.3f}", f"{100 * row['short_change']:+.1f} %")
        table.add_row(title(row["method"], row["factor"]), str(row["documents"]), *numbers, keys)
    console.print(table)
    cost = recommendation.cost
    console.print(
        f"read {cost['tokens']} tokens of a budget of {cost['budget']}; all contenders on all documents would be "
        f"{cost['exhaustive_tokens']}"
    )
