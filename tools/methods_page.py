"""Tables of `docs/methods.md`: what each method does, what it costs, who can serve it, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from hf_posext import detect_scheme
from hf_posext.errors import ExportError, PosExtError
from hf_posext.export import llama_cpp, sglang, vllm
from hf_posext.methods import as_method
from hf_posext.methods.base import methods
from hf_posext.plan import ExtensionPlan
from hf_posext.reporting.tables import finite_interval

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "results" / "methods"
SERVERS = {"vLLM": vllm, "SGLang": sglang, "llama.cpp": llama_cpp}


def methods_table(names: list[str] | None = None) -> str:
    """Table of methods: name, scheme, summary, paper and published code.

    Args:
        names (`list[str]`, *optional*): methods to list; every registered one by default.
    """
    lines = ["| method | extends | what it does | paper |", "|---|---|---|---|"]
    for name, method in methods().items():
        if names is None or name in names:
            extends = "any" if name == "none" else ", ".join(method.kinds)
            paper = f"[{method.title}]({method.url})" if method.url else method.title
            code = f", [code]({method.code})" if method.code and names is None else ""
            lines.append(f"| `{name}` | {extends} | {method.summary()} | {paper}{code} |")
    return "\n".join(lines)


def measured_tables() -> str:
    """A table for each group of methods that was measured, under its title."""
    texts = []
    for path in sorted(MEASURED.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        facts, rows = found["provenance"], found["rows"]
        by_method: dict[str, dict[int, Mapping[str, Any]]] = {}
        for row in rows:
            by_method.setdefault(row["method"], {})[row["length"]] = row
        trained, *lengths = sorted({row["length"] for row in rows})
        keys = any(row.get("passkey") is not None for row in rows)
        heads = [f"gain at {trained}", *(f"{length // trained}x" for length in lengths)]
        heads += ["passkeys", "cost of a forward", "servers"] if keys else ["cost of a forward", "servers"]
        plans = {name: _plan(name, facts) for name in by_method}
        lines = [
            f"**{path.stem.capitalize()}**, {facts['model'].rpartition('/')[2]}, trained on {trained} tokens:",
            "",
            f"| method | {' | '.join(heads)} |",
            "|---|" + "---:|" * (len(heads) - 2) + "---|---|",
        ]
        best = sorted(by_method, key=lambda name: -by_method[name][lengths[-1]]["gain"])
        for name in best:
            cells = [f"{by_method[name][trained]['gain']:.3f}", *(_gain(by_method[name][one]) for one in lengths)]
            if keys:
                row = by_method[name][lengths[-1]]
                cells.append(f"{round(row['passkey'] * row['passkey_trials'])} of {row['passkey_trials']}")
            lines.append(f"| `{name}` | {' | '.join([*cells, _cost(plans[name]), _servers(plans[name], facts)])} |")
        lines += ["", f"[`{path.relative_to(ROOT)}`](../{path.relative_to(ROOT)}): `{facts['command']}`"]
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def _gain(row: Mapping[str, Any]) -> str:
    interval = finite_interval(row, "gain_ci95")
    return f"{row['gain']:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def _plan(label: str, facts: Mapping[str, Any]) -> ExtensionPlan:
    """Return the plan that a row was measured with; labels leave lists out, and an example stands for those."""
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
    """Return the servers that compute a plan from an export, as the exports themselves decide."""
    config = AutoConfig.from_pretrained(ROOT / facts["model"])
    obstacle = None
    if plan.rotates_late or plan.slopes or any(entry.rope_parameters is None for entry in plan.rotaries):
        obstacle = "positions that a config cannot say"
    able = []
    for name, server in SERVERS.items():
        try:
            server.serve(config, plan, obstacle)
        except ExportError:
            continue
        able.append(name)
    return ", ".join(able) or "none"
