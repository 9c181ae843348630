"""`explain`: why a model breaks past the length that it was trained on, in words and in a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ..errors import InvalidParameterError
from . import options
from .app import app
from .console import PlainConsole, say

if TYPE_CHECKING:
    from ..diagnosis import Diagnosis

NAMES = {"none": "as it is"}


@app.command()
def explain(
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(help="Folders or Hub ids; weights are read.", metavar="MODEL...")],
    dataset: Annotated[str | None, typer.Option(help="Texts to read, as of compare; none if not given.")] = None,
    methods: Annotated[
        str | None, typer.Option(help="To draw, and to read the texts with; all that apply are drawn if not given.")
    ] = None,
    target_length: Annotated[int | None, typer.Option(help="Tokens to look at; 4 x trained if not given.")] = None,
    trained_length: options.TrainedLength = None,
    original_length: options.OriginalLength = None,
    plot: Annotated[Path | None, typer.Option(help="PNG to draw; of several models, a column for each.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, tables included.")] = False,
    documents: options.Documents = None,
    start: options.Start = 0,
    text_column: options.TextColumn = None,
    split: options.Split = None,
    revision: options.Revision = None,
    dtype: options.Dtype = "float32",
    device: Annotated[str, typer.Option(help="As torch calls it: cpu, cuda:0, mps.")] = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
) -> None:
    """Say how a model encodes position, how far that was trained, and what becomes of longer input.

    With a data set also where its loss departs. Of several models, each takes those of the methods that apply to it.
    """
    from ..methods import as_method
    from ..methods.text import split_outside_brackets

    chosen = None if methods is None else [name for name in split_outside_brackets(methods, ",") if name]
    for name in chosen or ():
        as_method(name)
    if plot is not None and plot.suffix.lower() != ".png":
        raise InvalidParameterError(f"plot is {plot}; give the name of a PNG, as in --plot {plot.with_suffix('.png')}")

    # The imports that take seconds come after the checks that need none of them.
    from ..diagnosis import diagnose
    from ..evaluation import load_documents
    from ..patching import detect_scheme
    from .loading import load_body, load_model, require_unpatched

    for model in models:
        require_unpatched(model, "explain tells what a model is without one", "see its plan by hf-posext inspect")
    texts = None
    if dataset is not None:
        texts = load_documents(dataset, text_column=text_column, split=split, revision=revision, limit=documents)
    found: list[Diagnosis] = []
    for model in models:
        body = texts is None  # positions need no head
        opening = (model, dtype, device, trust_remote_code)
        network, tokenizer = (load_body(*opening), None) if body else load_model(*opening)
        fitting = chosen
        if chosen is not None and len(models) > 1:
            scheme = detect_scheme(network)
            fitting = [name for name in chosen if as_method(name).applies_to(scheme) is None]
        found.append(
            diagnose(
                network,
                tokenizer,
                texts,
                methods=fitting,
                target_length=target_length,
                trained_length=options.renamed_length(context, trained_length, original_length),
                start=start,
                seed=seed,
            )
        )
    if as_json:
        say(json.dumps([one.to_dict() for one in found] if len(found) > 1 else found[0].to_dict(), indent=1))
    else:
        _print(found)
    if plot is not None:
        _draw(found, plot)
        say(f"picture: {plot}", err=as_json)


def _draw(found: list[Diagnosis], path: Path) -> None:
    from ..reporting.three_panels import plot_classes

    if not any(one.signals for one in found):
        raise InvalidParameterError("no model here has positions that can be drawn; leave out --plot")
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(found) > 1:
        plot_classes(found, path)
    else:
        found[0].plot(path)


def _print(found: list[Diagnosis]) -> None:
    console = PlainConsole()
    for index, one in enumerate(found):
        if index:
            console.print()
        facts = Table(box=None, show_header=False, pad_edge=False)
        facts.add_column(no_wrap=True)
        facts.add_column()
        for name, value in _facts(one):
            facts.add_row(name, escape(value))
        console.print(facts)
        console.print()
        console.print(escape(one.verdict))


def _facts(found: Diagnosis) -> list[tuple[str, str]]:
    from ..methods.frequencies import first_rotary

    trained = "unknown" if found.trained_length is None else f"{found.trained_length} tokens"
    facts = [
        ("model", f"{found.model} ({found.scheme.model_type})"),
        ("positions", f"{found.scheme.kind} (generalization: {found.generalization}): {found.reason}"),
        ("trained length", f"{trained} ({found.trained_length_source})"),
        ("looked at", f"{found.target_length} tokens"),
    ]
    if found.untrained:
        facts.append(("untrained rows", f"{found.untrained[0]} to {found.untrained[1]}"))
    if found.critical_dimension is not None:
        rotary = 2 * first_rotary(found.scheme).pairs
        facts.append(("whole turns", f"{found.critical_dimension} of {rotary} rotary channels of a head"))
    if "phases" in found.tables:
        new = found.tables["phases"].groupby("method", sort=False).new.sum()
        facts.append(("new phases", ", ".join(f"{NAMES.get(str(name), name)} {count}" for name, count in new.items())))
    if "reach" in found.tables:
        reach = found.tables["reach"].reach
        facts.append(
            ("reach of heads", f"{reach.min():.0f} to {reach.max():.0f} tokens (1 % of the nearest's weight)")
        )
    if "buckets" in found.tables:
        facts.append(("last bucket", f"distances from {found.tables['buckets']['first'].iloc[-1]} on"))
    if "losses" in found.tables:
        interval = found.departure_interval
        span = f" [{interval[0]}, {interval[1]}]" if interval else ""
        told = f"token {found.departure}{span}, by {found.rise:.2f} nats per token" if found.departure else "nowhere"
        facts.append(("loss departs", told))
    return [*facts, *(("note", note) for note in found.notes)]
