"""`inspect` and `methods`: what a model has, and what can be done with it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from .app import app
from .console import PlainConsole, say
from .options import TrustRemoteCode

if TYPE_CHECKING:
    from ..plan import ExtensionPlan
    from ..scheme import PositionalScheme

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the methods, with the paper of each."""
    from dataclasses import asdict

    from ..methods import list_methods

    found = list_methods()
    if as_json:
        say(json.dumps([asdict(method) for method in found], indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("method", no_wrap=True)
    table.add_column("extends")
    table.add_column("what it is, and its paper")
    for method in found:
        paper = f"\n{method.url}" if method.url else ""
        extends = "any" if len(method.kinds) > 4 else ", ".join(method.kinds)
        table.add_row(method.name, extends, escape(f"{method.title}: {method.summary}") + paper)
    PlainConsole().print(table)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Folder or Hub id; its config is enough, no weights are read.")],
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Show how a model encodes position, the length it was trained on, and which methods apply.

    Of a folder that was saved with a patch, or with an adapter trained under one, also the plan that is in force; all
    else is told of the model as it is without.
    """
    from ..methods.text import by_reason
    from ..patching import detect_scheme
    from .loading import base_of, load_config, saved_plan

    plan, base = saved_plan(model), base_of(model)
    scheme = detect_scheme(load_config(model, trust_remote_code)) if plan is None else plan.scheme
    refusals = _refusals(scheme)
    if as_json:
        found = {"model": model, "base": base, "plan": plan and plan.to_dict()}
        say(json.dumps({**found, "scheme": scheme.to_dict(), "methods": refusals}, indent=2))
        return
    console = PlainConsole()
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(no_wrap=True)
    facts.add_column()
    for name, value in _facts(model, base, plan, scheme):
        facts.add_row(name, escape(value))
    for reason, names in by_reason(refusals).items():
        facts.add_row("not" if reason else "applies", escape(", ".join(names) + (f": {reason}" if reason else "")))
    console.print(facts)


def _refusals(scheme: PositionalScheme) -> dict[str, str | None]:
    """Why each method does not apply; `None` for one that does."""
    from ..methods import as_method, list_methods

    return {method.name: as_method(method.name).applies_to(scheme) for method in list_methods()}


def _facts(
    model: str, base: str | None, plan: ExtensionPlan | None, scheme: PositionalScheme
) -> list[tuple[str, str]]:
    def tokens(length: int | None) -> str:
        return "unknown" if length is None else f"{length} tokens"

    facts = [
        ("model", f"{model} ({scheme.model_type})"),
        *([("adapter of", base)] if base else []),
        *([("in force", plan.describe())] if plan else []),
        ("positions", f"{scheme.kind} (generalization: {scheme.generalization})"),
        ("trained length", f"{tokens(scheme.trained_length)} ({scheme.trained_length_source})"),
        ("shipped length", tokens(scheme.shipped_length)),
    ]
    for rotary in scheme.rotaries:
        name = f"rotary {rotary.name}".rstrip()
        window = f", window {rotary.window}" if rotary.window else ""
        turns = f"theta {rotary.theta:g}, {rotary.pairs} pairs, rope type {rotary.shipped_type}{window}"
        facts.append((name, turns))
    return facts
