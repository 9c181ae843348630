"""Commands that show, explain and choose: `inspect`, `methods`, `env`, `explain`, `app`, `recommend` and `search`."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from rich.markup import escape

import hf_posext  # whose names load torch and transformers when they are first used

from ..errors import InvalidParameterError
from ..packages import require, versions_of
from ..processes import rank
from . import options
from .app import app
from .console import PlainConsole, plain_table, print_facts, say
from .loading import base_of, load_body, load_config, load_model, require_unpatched, saved_plan
from .runs import join_processes, plan_file

Result = TypeVar("Result")

PACKAGES = (
    *("hf_posext", "transformers", "torch", "tokenizers", "safetensors", "huggingface_hub", "numpy", "triton"),
    *("accelerate", "datasets", "evaluate", "matplotlib", "pandas", "scipy", "peft", "gradio", "gguf"),
)

Facts = list[tuple[str, str]]
"""Names and values, a line each."""


@app.command()
def methods(as_json: options.AsJson = False) -> None:
    """List the methods, with the paper of each."""
    infos = hf_posext.list_methods()
    if as_json:
        say(json.dumps([asdict(method) for method in infos], indent=2))
        return
    table = plain_table()
    table.add_column("method", no_wrap=True)
    table.add_column("extends")
    table.add_column("what it is, and its paper")
    for method in infos:
        paper = f"\n{method.url}" if method.url else ""
        extends = "any" if len(method.kinds) > 4 else ", ".join(method.kinds)
        table.add_row(method.name, extends, escape(f"{method.title}: {method.summary}") + paper)
    PlainConsole().print(table)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id. Only its config is read.")],
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Show how a model encodes position, the length it was trained on, and which methods apply.

    For a model that was saved with a patch, or with an adapter trained under one, also show the plan. Everything else
    describes the model without its patch.
    """
    from ..methods import as_method
    from ..methods.text import by_reason

    plan, base = saved_plan(model), base_of(model)
    scheme = hf_posext.detect_scheme(load_config(model, trust_remote_code)) if plan is None else plan.scheme
    refusals = {method.name: as_method(method.name).applies_to(scheme) for method in hf_posext.list_methods()}
    if as_json:
        content = {"model": model, "base": base, "plan": plan and plan.to_dict()}
        say(json.dumps({**content, "scheme": scheme.to_dict(), "methods": refusals}, indent=2))
        return
    facts = _facts(model, base, plan, scheme)
    for reason, names in by_reason(refusals).items():
        facts.append(("refused", f"{', '.join(names)}: {reason}") if reason else ("methods", ", ".join(names)))
    print_facts(facts)


def _facts(
    model: str, base: str | None, plan: hf_posext.ExtensionPlan | None, scheme: hf_posext.PositionalScheme
) -> Facts:
    facts = [
        ("model", f"{model} ({scheme.model_type})"),
        *([("adapter of", base)] if base else []),
        *([("in force", plan.describe())] if plan else []),
        ("positions", f"{scheme.kind} (generalization: {scheme.generalization})"),
        ("trained length", f"{_tokens(scheme.trained_length)} ({scheme.trained_length_source})"),
        ("shipped length", _tokens(scheme.shipped_length)),
    ]
    for rotary in scheme.rotaries:
        window = f", window {rotary.window}" if rotary.window else ""
        frequencies = f"theta {rotary.theta:g}, {rotary.pairs} pairs, rope type {rotary.shipped_type}{window}"
        facts.append((f"rotary {rotary.name}".rstrip(), frequencies))
    return facts


def _tokens(length: int | None) -> str:
    return "unknown" if length is None else f"{length} tokens"


@app.command()
def env(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Folder or Hub id whose plan to print.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Print versions and devices for a bug report, and the plan of a model that was saved with a patch."""
    import torch

    plan = None if model is None else saved_plan(model)
    if model is not None and plan is None:
        load_config(model)  # refuses a model that does not exist
    versions = {**versions_of(*PACKAGES), "python": platform.python_version(), "platform": platform.platform()}
    devices = [f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"]
    devices += [f"cuda:{i}: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    if as_json:
        content = {"versions": versions, "devices": devices, "model": model, "plan": plan and plan.to_dict()}
        say(json.dumps(content, indent=2))
        return
    for name, value in [*versions.items(), *(("device", device) for device in devices)]:
        say(f"{name:<16} {value}")
    if model is not None:
        say(f"{'plan':<16} {plan.describe() if plan else 'none'}")
        if plan:
            say(json.dumps(plan.to_dict(), indent=2))


@dataclass(frozen=True, kw_only=True)
class Reading(options.Texts):
    """Texts of `explain`, which it can do without."""

    dataset: str | None = options.option("Texts to read, in the forms of compare. Default: none.")  # type: ignore[assignment]


@app.command()
def explain(
    models: Annotated[list[str], typer.Argument(help="Folders or Hub ids; their weights are read.", metavar="MODEL")],
    texts: Reading,
    methods: Annotated[
        str | None, typer.Option(help="Methods to draw and to measure. Default: draw all that apply.")
    ] = None,
    target_length: Annotated[
        int | None, typer.Option(min=2, help="Target length in tokens. Default: 4 times the trained length.")
    ] = None,
    trained_length: options.TrainedLength = None,
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="PNG to write; several models become columns.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, tables included.")] = False,
    start: options.Start = 0,
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
) -> None:
    """Explain how a model encodes position, up to what length it was trained, and what longer input does.

    With a data set, also find the token where its loss departs. With several models, each takes the methods that apply
    to it.
    """
    parsed = options.methods_of(methods)
    if plot is not None and plot.suffix.lower() != ".png":
        raise InvalidParameterError(f"Expected the name of a PNG, got {plot}. Pass --plot {plot.with_suffix('.png')}.")

    for model in models:
        require_unpatched(model, "explain describes a model without one", "show its plan with hf-posext inspect")
        load_config(model, trust_remote_code)
    documents = None if texts.dataset is None else texts.load()
    diagnoses: list[hf_posext.Diagnosis] = []
    for model in models:
        place = (model, dtype, device, trust_remote_code)
        # Without documents only positions count, which do not depend on the head.
        network, tokenizer = (load_body(*place), None) if documents is None else load_model(*place)
        fitting = parsed
        if parsed is not None and len(models) > 1:
            scheme = hf_posext.detect_scheme(network)
            fitting = [method for method in parsed if method.applies_to(scheme) is None]
        settings: dict[str, Any] = {"target_length": target_length, "trained_length": trained_length}
        settings |= {"methods": fitting, "start": start, "seed": seed}
        diagnoses.append(hf_posext.diagnose(network, tokenizer, documents, **settings))
    if as_json:
        content = [diagnosis.to_dict() for diagnosis in diagnoses]
        say(json.dumps(content if len(content) > 1 else content[0], indent=1))
    else:
        console = PlainConsole()
        for index, diagnosis in enumerate(diagnoses):
            if index:
                console.print()
            print_facts(_diagnosed(diagnosis))
            console.print()
            console.print(escape(diagnosis.verdict))
    if plot is not None:
        _draw(diagnoses, plot)
        say(f"picture: {plot}", err=as_json)


def _draw(diagnoses: list[hf_posext.Diagnosis], path: Path) -> None:
    from ..reporting.signals import plot_classes

    if not any(diagnosis.signals for diagnosis in diagnoses):
        raise InvalidParameterError("None of the models has positions that can be drawn. Leave out --plot.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(diagnoses) > 1:
        plot_classes(diagnoses, path)
    else:
        diagnoses[0].plot(path)


def _diagnosed(diagnosis: hf_posext.Diagnosis) -> Facts:
    from ..methods.rotary import first_rotary

    tables, scheme = diagnosis.tables, diagnosis.scheme
    positions = f"{scheme.kind} (generalization: {diagnosis.generalization}): {diagnosis.reason}"
    facts = [
        ("model", f"{diagnosis.model} ({scheme.model_type})"),
        ("positions", positions),
        ("trained length", f"{_tokens(diagnosis.trained_length)} ({diagnosis.trained_length_source})"),
        ("target length", _tokens(diagnosis.target_length)),
    ]
    if diagnosis.untrained:
        facts.append(("untrained rows", f"{diagnosis.untrained[0]} to {diagnosis.untrained[1]}"))
    if diagnosis.critical_dimension is not None:
        rotary = 2 * first_rotary(scheme).pairs
        facts.append(("full rotations", f"{diagnosis.critical_dimension} of {rotary} rotary channels of a head"))
    if "phases" in tables:
        unseen = tables["phases"].groupby("method", sort=False).new.sum()
        counts = (f"{'as it is' if name == 'none' else name} {count}" for name, count in unseen.items())
        facts.append(("unseen phases", ", ".join(counts)))
    if "reach" in tables:
        reach = tables["reach"].reach
        facts.append(
            ("reach of heads", f"{reach.min():.0f} to {reach.max():.0f} tokens (1 % of the nearest's weight)")
        )
    if "buckets" in tables:
        facts.append(("last bucket", f"distances from {tables['buckets']['first'].iloc[-1]} on"))
    if "losses" in tables:
        interval, departure = diagnosis.departure_interval, diagnosis.departure
        span = f" [{interval[0]}, {interval[1]}]" if interval else ""
        place = f"nowhere in the first {diagnosis.provenance['kept']} tokens"
        if departure:
            place = f"token {departure}{span}, by {diagnosis.rise:.2f} nats per token"
        facts.append(("loss departs", place))
    return [*facts, *(("note", note) for note in diagnosis.notes)]


@app.command("app")
def page(
    model: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of a model in addition to the shipped ones; may be repeated.", metavar="FOLDER"),
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="Texts on this machine, in the forms of compare. Default: the shipped novels.")
    ] = None,
    start: Annotated[
        int | None, typer.Option(min=0, help="Tokens to skip in each text. Default: 2000 in the shipped novels.")
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port of 127.0.0.1, which no other machine reaches.")
    ] = 7860,
) -> None:
    """Open an interactive page: the positions and the loss of a model, as it is and under a method.

    Needs the extra: pip install 'hf_posext[app]'. Nothing is fetched, and nothing leaves this machine.
    """
    require("app")
    # Read when huggingface_hub and gradio are imported.
    os.environ |= {"HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    from ..app import make_shelf

    shelf = make_shelf(
        model or [], dataset, start, lambda folder: load_model(folder, "float32", "cpu", trust_remote_code)
    )
    from ..app.page import serve  # after the checks: gradio takes seconds to import

    serve(shelf, port, lambda address: say(f"the page is at {address} (Ctrl+C ends it)"))


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

        from ..recommendation.sweep import check_target

        require_unpatched(run.model, "a recommendation begins unpatched", "measure it by hf-posext evaluate")
        if run.trained_length is not None:
            check_target(run.target_length, run.trained_length, "trained_length=")
        settings = {"budget": budget, "methods": parsed, "short_limit": short_limit, "passkey": passkey}
        recommendation = run.measure(hf_posext.recommend, journal, **settings)
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
        from ..frequency_search import check_search

        require_unpatched(run.model, "a search begins unpatched", "measure it by hf-posext evaluate")
        scheme = hf_posext.detect_scheme(load_config(run.model, run.trust_remote_code))
        check_search(scheme, run.target_length, run.trained_length)
        result = run.measure(
            hf_posext.search, journal, objective=objective, population=population, generations=generations
        )
        if rank():
            return
        result.save(run.output)
        say(result.describe())
        say(f"plan: {run.output}")


def _print(recommendation: hf_posext.Recommendation) -> None:
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
