"""`explain` and `app`: the cause of a break past the trained length, in words, in a picture and on a page."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ..errors import InvalidParameterError
from ..packages import require
from . import options
from .app import app
from .console import PlainConsole, say

if TYPE_CHECKING:
    from ..diagnosis import Diagnosis

NAMES = {"none": "as it is"}


@app.command()
def explain(
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(help="Folders or Hub ids; their weights are read.", metavar="MODEL")],
    dataset: Annotated[str | None, typer.Option(help="Texts to read, in the forms of compare. Default: none.")] = None,
    methods: Annotated[
        str | None, typer.Option(help="Methods to draw and to measure. Default: draw all that apply.")
    ] = None,
    target_length: Annotated[
        int | None, typer.Option(help="Target length in tokens. Default: 4 times the trained length.")
    ] = None,
    trained_length: options.TrainedLength = None,
    original_length: options.OriginalLength = None,
    plot: Annotated[Path | None, typer.Option(help="PNG to write; several models become columns.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, tables included.")] = False,
    documents: options.Documents = None,
    start: options.Start = 0,
    text_column: options.TextColumn = None,
    split: options.Split = None,
    revision: options.Revision = None,
    dtype: options.Dtype = "float32",
    device: Annotated[str, typer.Option(help="Device of torch: cpu, cuda:0, mps.")] = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
) -> None:
    """Explain how a model encodes position, up to what length it was trained, and what longer input does.

    With a data set, also find the token where its loss departs. With several models, each takes the methods that apply
    to it.
    """
    from ..methods import as_method
    from ..methods.text import split_outside_brackets

    chosen = None if methods is None else [name for name in split_outside_brackets(methods, ",") if name]
    for name in chosen or ():
        as_method(name)
    if plot is not None and plot.suffix.lower() != ".png":
        raise InvalidParameterError(f"Expected the name of a PNG, got {plot}. Pass --plot {plot.with_suffix('.png')}.")

    # The imports that take seconds come after the checks that need none of them.
    from ..diagnosis import diagnose
    from ..evaluation import load_documents
    from ..patching import detect_scheme
    from .loading import load_body, load_model, require_unpatched

    for model in models:
        require_unpatched(model, "explain describes a model without one", "show its plan with hf-posext inspect")
    texts = None
    if dataset is not None:
        texts = load_documents(dataset, text_column=text_column, split=split, revision=revision, limit=documents)
    diagnoses: list[Diagnosis] = []
    for model in models:
        body = texts is None  # positions need no head
        opening = (model, dtype, device, trust_remote_code)
        network, tokenizer = (load_body(*opening), None) if body else load_model(*opening)
        fitting = chosen
        if chosen is not None and len(models) > 1:
            scheme = detect_scheme(network)
            fitting = [name for name in chosen if as_method(name).applies_to(scheme) is None]
        diagnoses.append(
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
        content = [diagnosis.to_dict() for diagnosis in diagnoses]
        say(json.dumps(content if len(content) > 1 else content[0], indent=1))
    else:
        _print(diagnoses)
    if plot is not None:
        _draw(diagnoses, plot)
        say(f"picture: {plot}", err=as_json)


def _draw(diagnoses: list[Diagnosis], path: Path) -> None:
    from ..reporting.signals import plot_classes

    if not any(diagnosis.signals for diagnosis in diagnoses):
        raise InvalidParameterError("None of the models has positions that can be drawn. Leave out --plot.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(diagnoses) > 1:
        plot_classes(diagnoses, path)
    else:
        diagnoses[0].plot(path)


def _print(diagnoses: list[Diagnosis]) -> None:
    console = PlainConsole()
    for index, diagnosis in enumerate(diagnoses):
        if index:
            console.print()
        facts = Table(box=None, show_header=False, pad_edge=False)
        facts.add_column(no_wrap=True)
        facts.add_column()
        for name, value in _facts(diagnosis):
            facts.add_row(name, escape(value))
        console.print(facts)
        console.print()
        console.print(escape(diagnosis.verdict))


def _facts(found: Diagnosis) -> list[tuple[str, str]]:
    from ..methods.frequencies import first_rotary

    trained = "unknown" if found.trained_length is None else f"{found.trained_length} tokens"
    facts = [
        ("model", f"{found.model} ({found.scheme.model_type})"),
        ("positions", f"{found.scheme.kind} (generalization: {found.generalization}): {found.reason}"),
        ("trained length", f"{trained} ({found.trained_length_source})"),
        ("target length", f"{found.target_length} tokens"),
    ]
    if found.untrained:
        facts.append(("untrained rows", f"{found.untrained[0]} to {found.untrained[1]}"))
    if found.critical_dimension is not None:
        rotary = 2 * first_rotary(found.scheme).pairs
        facts.append(("whole turns", f"{found.critical_dimension} of {rotary} rotary channels of a head"))
    if "phases" in found.tables:
        unseen = found.tables["phases"].groupby("method", sort=False).new.sum()
        facts.append(
            ("unseen phases", ", ".join(f"{NAMES.get(str(name), name)} {count}" for name, count in unseen.items()))
        )
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
        place = f"token {found.departure}{span}, by {found.rise:.2f} nats per token" if found.departure else "nowhere"
        facts.append(("loss departs", place))
    return [*facts, *(("note", note) for note in found.notes)]


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
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the first import of huggingface_hub reads it
    from ..app import make_shelf
    from ..app.server import serve
    from .loading import load_model

    shelf = make_shelf(
        model or [], dataset, start, lambda folder: load_model(folder, "float32", "cpu", trust_remote_code)
    )
    serve(shelf, port, lambda address: say(f"the page is at {address} (Ctrl+C ends it)"))
