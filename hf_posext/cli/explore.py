"""`inspect`, `methods` and `env`: the scheme of a model, the methods that apply, and the environment."""

from __future__ import annotations

import json
import os
import platform
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

PACKAGES = (
    *("hf_posext", "transformers", "torch", "tokenizers", "safetensors", "huggingface_hub", "numpy", "triton"),
    *("accelerate", "datasets", "evaluate", "matplotlib", "pandas", "scipy", "peft", "gradio", "gguf"),
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the methods, with the paper of each."""
    from dataclasses import asdict

    from ..methods import list_methods

    listed = list_methods()
    if as_json:
        say(json.dumps([asdict(method) for method in listed], indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("method", no_wrap=True)
    table.add_column("extends")
    table.add_column("what it is, and its paper")
    for method in listed:
        paper = f"\n{method.url}" if method.url else ""
        extends = "any" if len(method.kinds) > 4 else ", ".join(method.kinds)
        table.add_row(method.name, extends, escape(f"{method.title}: {method.summary}") + paper)
    PlainConsole().print(table)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id. Only its config is read.")],
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Show how a model encodes position, the length it was trained on, and which methods apply.

    For a model that was saved with a patch, or with an adapter trained under one, also show the plan. Everything else
    describes the model without its patch.
    """
    from ..methods.text import by_reason
    from ..patching import detect_scheme
    from .loading import base_of, load_config, saved_plan

    plan, base = saved_plan(model), base_of(model)
    scheme = detect_scheme(load_config(model, trust_remote_code)) if plan is None else plan.scheme
    refusals = _refusals(scheme)
    if as_json:
        content = {"model": model, "base": base, "plan": plan and plan.to_dict()}
        say(json.dumps({**content, "scheme": scheme.to_dict(), "methods": refusals}, indent=2))
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
    """Return the reason for which each method does not apply; `None` if it does."""
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
        frequencies = f"theta {rotary.theta:g}, {rotary.pairs} pairs, rope type {rotary.shipped_type}{window}"
        facts.append((name, frequencies))
    return facts


@app.command()
def env(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Folder or Hub id whose plan to print.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print versions and devices for a bug report, and the plan of a model that was saved with a patch."""
    import torch

    from ..packages import versions_of
    from .loading import load_config, saved_plan

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
    for name, version in versions.items():
        say(f"{name:<16} {version}")
    for device in devices:
        say(f"{'device':<16} {device}")
    if model is not None:
        say(f"{'plan':<16} {plan.describe() if plan else 'none'}")
        if plan:
            say(json.dumps(plan.to_dict(), indent=2))
