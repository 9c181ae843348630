"""How to open an adapter, with this package and without, in words for its README."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from ..patching.saved_config import REPLACED_KEY, open_patched_config
from ..patching.untrusted import read_json
from ..plan import ExtensionPlan
from .directory import CONFIG_FILE, AdapterDirectory
from .match import computes


def how_to_open(directory: Path) -> str:
    """The part of a card that says how to open an adapter, or a checkpoint, with this package and without.

    Args:
        directory (`Path`): of the adapter or checkpoint.
    """
    adapter = AdapterDirectory.read(directory) if (directory / CONFIG_FILE).is_file() else None
    plan = ExtensionPlan.load(directory)
    environment = Environment(
        loader=PackageLoader("hf_posext.adapters", "."), undefined=StrictUndefined, keep_trailing_newline=True
    )
    return environment.get_template("how_to_open.md.jinja").render(
        plan=plan,
        adapter=adapter is not None,
        base=public_name(adapter.base_name) if adapter else "",
        by_base=adapter is not None and REPLACED_KEY not in read_json(directory / CONFIG_FILE),
        by_config=_in_config(directory, plan),
        peft_type=adapter.config["peft_type"] if adapter else "",
    )


def _in_config(directory: Path, plan: ExtensionPlan) -> bool:
    """Whether the config in a directory says the positions."""
    if not (directory / "config.json").is_file():
        return False
    return computes(open_patched_config(directory), plan)


def card_data(adapter: AdapterDirectory) -> ModelCardData:
    """The metadata by which the Hub files an adapter."""
    name = adapter.base_name
    on_hub = name is not None and name.count("/") == 1 and not Path(name).exists() and not name.startswith(".")
    return ModelCardData(
        library_name="peft",
        base_model=name if on_hub else None,
        tags=tags(adapter.plan),
        pipeline_tag="text-generation" if adapter.config.get("task_type") == "CAUSAL_LM" else None,
    )


def tags(plan: ExtensionPlan) -> list[str]:
    """Of a model with this plan: the package, what it is for, and the methods by name."""
    methods = (str(entry.get("name", plan.method)) for entry in plan.parameters)
    return ["hf_posext", "long-context", "position-encoding", *dict.fromkeys(methods)]


def adapter_readme(directory: Path) -> str:
    """The README of an adapter that has no measured results yet."""
    adapter = AdapterDirectory.read(directory)
    title = f"# Adapter for {public_name(adapter.base_name)} under {adapter.plan.method}\n\n"
    text = f"---\n{card_data(adapter).to_yaml()}\n---\n\n{title}{how_to_open(directory)}"
    return str(ModelCard(text))


def public_name(name: str | None) -> str:
    """A base model as a card may name it: not by a path of somebody's machine."""
    if name is None:
        return "the base model"
    return Path(name).name if Path(name).is_absolute() else name
