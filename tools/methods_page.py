"""Tables of `docs/methods.md`: summary, cost, servers and measurements of each method."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pages import ROOT, table
from transformers import AutoConfig

from hf_posext import detect_scheme
from hf_posext.errors import ExportError, PosExtError
from hf_posext.export.servers import serve_llama_cpp, serve_sglang, serve_vllm
from hf_posext.methods import as_method, methods
from hf_posext.plan import ExtensionPlan
from hf_posext.reporting.tables import finite_interval

MEASURED = ROOT / "results" / "methods"
SERVERS = {"vLLM": serve_vllm, "SGLang": serve_sglang, "llama.cpp": serve_llama_cpp}


def methods_table(names: list[str] | None = None) -> str:
    """Return the table of methods: name, scheme, summary, paper; of all methods also their files and published code.

    Args:
        names (`list[str]`, *optional*): methods to list. Defaults to every registered method.
    """
    rows = []
    for name, method in methods().items():
        if names is None or name in names:
            extends = "any" if name == "none" else ", ".join(method.kinds)
            paper = f"[{method.title}]({method.url})" if method.url else method.title
            code = f", [code]({method.code})" if method.code and names is None else ""
            file = Path(inspect.getfile(method)).relative_to(ROOT)
            label = f"`{name}`" if names else f"[`{name}`](../{file})"
            rows.append((label, extends, method.summary(), paper + code))
    return table(("method", "extends", "what it does", "paper"), rows, left=4)


def measured_tables() -> str:
    """Return a table for each measured group of methods, under its title."""
    texts = []
    for path in sorted(MEASURED.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        facts, rows = content["provenance"], content["rows"]
        by_method: dict[str, dict[int, Mapping[str, Any]]] = {}
        for row in rows:
            by_method.setdefault(row["method"], {})[row["length"]] = row
        trained, *lengths = sorted({row["length"] for row in rows})
        keys = any(row.get("passkey") is not None for row in rows)
        heads = ["method", "cost of a forward", "servers", f"gain at {trained}"]
        heads += [*(f"{length // trained}x" for length in lengths), *["passkeys"] * keys]
        lines = []
        for name in sorted(by_method, key=lambda name: -by_method[name][lengths[-1]]["gain"]):
            plan, gains = _plan(name, facts), by_method[name]
            cells = [_cost(plan), _servers(plan, facts), f"{gains[trained]['gain']:.3f}"]
            cells += [_gain(gains[length]) for length in lengths]
            if keys:
                share, trials = gains[lengths[-1]]["passkey"], gains[lengths[-1]]["passkey_trials"]
                cells.append(f"{round(share * trials)} of {trials}")
            lines.append((f"`{name}`", *cells))
        title = f"**{path.stem.capitalize()}**, {facts['model'].rpartition('/')[2]}, trained on {trained} tokens:"
        file = path.relative_to(ROOT)
        origin = f"[`{file}`](../{file}): `{facts['command']}`"
        texts += [title, table(heads, lines, left=3), origin]
    return "\n\n".join(texts)


def _gain(row: Mapping[str, Any]) -> str:
    interval = finite_interval(row, "gain_ci95")
    return f"{row['gain']:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def _plan(label: str, facts: Mapping[str, Any]) -> ExtensionPlan:
    """Return the plan of a measured row. Labels leave lists out; the method's example replaces those."""
    scheme = detect_scheme(AutoConfig.from_pretrained(ROOT / facts["model"]))
    lengths = {"factor": 8, "trained_length": facts["trained_length"]}
    try:
        return as_method(label).plan(scheme, **lengths)
    except PosExtError:
        return methods()[label.partition("(")[0]].example(scheme).plan(scheme, **lengths)


def _cost(plan: ExtensionPlan) -> str:
    if not plan.rotates_late:
        return "none"
    return "rotation in attention, by row" if plan.follows_rows else "rotation in attention"


def _servers(plan: ExtensionPlan, facts: Mapping[str, Any]) -> str:
    """Return the servers that compute a plan from an export."""
    config = AutoConfig.from_pretrained(ROOT / facts["model"])
    obstacle = None
    if plan.rotates_late or plan.slopes or any(entry.rope_parameters is None for entry in plan.rotaries):
        obstacle = "positions that a config cannot say"
    able = []
    for name, serve in SERVERS.items():
        try:
            serve(config, plan, obstacle)
        except ExportError:
            continue
        able.append(name)
    return ", ".join(able) or "none"
