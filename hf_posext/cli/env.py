"""`env`: what a bug report has to contain."""

from __future__ import annotations

import json
import os
import platform
from typing import Annotated

import typer

from .app import app
from .console import say

PACKAGES = (
    *("hf_posext", "transformers", "torch", "tokenizers", "safetensors", "huggingface_hub", "numpy", "triton"),
    *("accelerate", "datasets", "evaluate", "matplotlib", "pandas", "scipy", "peft", "gradio", "gguf"),
)


@app.command()
def env(
    model: Annotated[str | None, typer.Argument(help="Folder or Hub id whose plan to print.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print versions, devices and, of a model that was saved with a patch, the plan. For bug reports."""
    import torch

    from ..packages import versions_of
    from .loading import load_config, saved_plan

    plan = None if model is None else saved_plan(model)
    if model is not None and plan is None:
        load_config(model)  # refuses a model that is not there
    versions = {**versions_of(*PACKAGES), "python": platform.python_version(), "platform": platform.platform()}
    devices = [f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"]
    devices += [f"cuda:{i}: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    if as_json:
        found = {"versions": versions, "devices": devices, "model": model, "plan": plan and plan.to_dict()}
        say(json.dumps(found, indent=2))
        return
    for name, version in versions.items():
        say(f"{name:<16} {version}")
    for device in devices:
        say(f"{'device':<16} {device}")
    if model is not None:
        say(f"{'plan':<16} {plan.describe() if plan else 'none'}")
        if plan:
            say(json.dumps(plan.to_dict(), indent=2))
